"""A model that reads a text on the CPU, window by window, and shows its logits and its routing.

A window is read in pieces of PIECE tokens, each after the other in one context: what is held (logits, activations of
all experts that the tokens chose) grows with a piece, not with the window.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import system as machine
from edge_speq.convert.evaluation import graph
from edge_speq.errors import EdgeError
from edge_speq.gguf import container as gguf_file
from edge_speq.gguf import model as gguf_model

WINDOW = 512  # tokens that are read from an empty context
PIECE = 128  # tokens that are decoded together: fewer take longer, and below it attention rounds otherwise (64: 1e-4)
FITS = 0.8  # of the machine's memory: what models may take; the rest is the program's and the system's
LEAST = 16  # tokens of a window that is worth reading

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(?:up|gate|gate_up)_exps\.weight")


class Reader:
    """Close it. `routing` holds, block by block, the expert ids [n_tokens, n_expert_used] of the last window."""

    def __init__(
        self,
        path: str | Path,
        role: str = "model",
        *,
        n_threads: int | None = None,
        wanted: Callable[[str], bool] | None = None,
        observe: graph.Observer | None = None,
        piece: int | None = None,
    ) -> None:
        """`piece`: tokens decoded together, piece_of(the model) by default."""
        import llama_cpp
        from llama_cpp import _internals as internals

        from edge_speq import _native
        from edge_speq.runtime import loading

        _native.load_backends()
        checked = gguf_model.check_model(path, role)
        self.routing: dict[int, graph.Ids] = {}
        self._routed: dict[int, graph.Ids] = {}  # of the last piece: blocks are met twice where gate and up are two
        self._piece = piece or piece_of(checked)
        self._callback = graph.GraphCallback(wanted or self._is_routed, observe or self._keep_routing)
        model_params = llama_cpp.llama_model_default_params()
        # no GPU: what is observed must lie in memory; nothing is repacked, which would only take time and space
        self._no_devices = (ctypes.c_void_p * 1)(None)
        model_params.devices = ctypes.addressof(self._no_devices)
        model_params.n_gpu_layers, model_params.use_extra_bufts = 0, False
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = WINDOW, self._piece, self._piece
        params.n_threads = params.n_threads_batch = n_threads or machine.usable_cpus()
        params.op_offload = params.offload_kqv = False
        params.cb_eval = self._callback.function
        with contextlib.ExitStack() as stack:
            self._model = stack.enter_context(contextlib.closing(loading.load_model(Path(path), model_params, role)))
            self._context = stack.enter_context(contextlib.closing(loading.create_context(self._model, params)))
            batch = internals.LlamaBatch(n_tokens=self._piece, embd=0, n_seq_max=1, verbose=True)
            self._batch: Any = stack.enter_context(contextlib.closing(batch))
            self.close = stack.pop_all().close
        self.n_vocab = int(self._model.n_vocab())

    def tokens(self, text: str) -> Tokens:
        return np.array(self._model.tokenize(text.encode(), self._adds_bos(), True), dtype=np.int32)

    def read(self, window: Tokens) -> Iterator[Logits]:
        """[n, n_vocab] of the pieces of a window of at most WINDOW tokens. Views of native memory: the next piece
        overwrites it."""
        self._context.kv_cache_clear()
        self.routing.clear()
        for start in range(0, len(window), self._piece):
            yield self._decode(window[start : start + self._piece], start)

    def logits(self, window: Tokens) -> Logits:
        """[n, n_vocab] of a whole window, a copy."""
        return np.concatenate([logits.copy() for logits in self.read(window)])

    def _decode(self, tokens: Tokens, n_past: int) -> Logits:
        import llama_cpp

        from edge_speq.runtime import loading

        self._routed.clear()
        try:
            # logits of every token: without them the last block would not see the others
            loading.decode(self._context, self._batch, tokens.tolist(), n_past, len(tokens), logits_all=True)
        except EdgeError:
            if self._callback.error is not None:
                raise self._callback.error from None
            raise
        for block, ids in self._routed.items():
            self.routing[block] = np.concatenate([self.routing[block], ids]) if n_past else ids
        pointer = llama_cpp.llama_get_logits(self._context.ctx)
        found: Logits = np.ctypeslib.as_array(pointer, (len(tokens), self.n_vocab))
        return found

    def _adds_bos(self) -> bool:
        import llama_cpp

        return bool(llama_cpp.llama_vocab_get_add_bos(self._model.vocab))

    @staticmethod
    def _is_routed(name: str) -> bool:
        return _EXPERTS.fullmatch(name) is not None

    def _keep_routing(self, name: str, _weight: graph.GraphTensor, _rows: graph.Rows, ids: graph.Ids | None) -> None:
        match = _EXPERTS.fullmatch(name)
        if ids is not None and match is not None:
            self._routed[int(match[1])] = ids.copy()


def piece_of(*models: gguf_file.GGUFFile) -> int:
    """Tokens that are decoded together where these models are read side by side: PIECE, but WINDOW where they do not
    fit in memory, since they are then read from disk again for each piece."""
    total, memory = sum(path.stat().st_size for model in models for path in model.paths), machine.memory()
    return WINDOW if memory is not None and total > FITS * memory[0] else PIECE


def windows(tokens: Tokens, most: int | None = None) -> Iterator[Tokens]:
    """At most `most` tokens in windows of WINDOW; what is left in the end counts when it has LEAST tokens."""
    for start in range(0, len(tokens) if most is None else min(most, len(tokens)), WINDOW):
        window = tokens[start : start + WINDOW] if most is None else tokens[start : min(start + WINDOW, most)]
        if len(window) >= LEAST:
            yield window


def read_text(path: str | Path | None) -> str:
    """A text file, or the prompts that come with edge_speq: prose, code, chat and textbook. Raises EdgeError."""
    if path is None:
        from edge_speq import texts as prompts

        texts = prompts.read(prompts.BUNDLED)
        return prompts.GAP.join(prompt.text for prompt in texts)
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise EdgeError(f"cannot read the text {path}: {error.strerror}", "give a text file", usage=True) from error
    if not text.strip():
        raise EdgeError(f"the text {path} is empty", "give a text of some thousand words", usage=True)
    return text
