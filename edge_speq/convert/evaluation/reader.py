"""Run a model on a text on the CPU, window by window, and read its logits and routing.

A window is decoded in pieces of PIECE tokens in one context, so that the memory for logits and activations depends on
the piece, not on the window.
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

from edge_speq import system
from edge_speq.convert.evaluation import graph
from edge_speq.errors import EdgeError
from edge_speq.gguf import container
from edge_speq.gguf import model as gguf_model

WINDOW = 512  # tokens read from an empty context
PIECE = 128  # tokens decoded together; with fewer, decoding is slower and attention rounds differently (64: by 1e-4)
FITS = 0.8  # share of the machine's memory that models may take
LEAST = 16  # tokens of the shortest window that is read

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(?:up|gate|gate_up)_exps\.weight")


class Reader:
    """A model for reading texts; close it after use.

    `routing` has the expert ids of the last window, [n_tokens, n_expert_used], by block.
    """

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
        """Load the model. `piece`: tokens decoded together, by default piece_of(model)."""
        import llama_cpp
        from llama_cpp import _internals as internals

        from edge_speq import _native
        from edge_speq.runtime import loading

        _native.load_backends()
        checked = gguf_model.check_model(path, role)
        self.routing: dict[int, graph.Ids] = {}
        self._routed: dict[
            int, graph.Ids
        ] = {}  # routing of the last piece; blocks occur twice if gate and up are separate
        self._piece = piece or piece_of(checked)
        self._callback = graph.GraphCallback(wanted or self._is_routed, observe or self._keep_routing)
        model_params = llama_cpp.llama_model_default_params()
        # observed tensors must be in host memory; repacking weights would only take time and memory
        self._no_devices = (ctypes.c_void_p * 1)(None)
        model_params.devices = ctypes.addressof(self._no_devices)
        model_params.n_gpu_layers, model_params.use_extra_bufts = 0, False
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = WINDOW, self._piece, self._piece
        params.n_threads = params.n_threads_batch = n_threads or system.usable_cpus()
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
        """Yield the logits, [n, n_vocab], of each piece of a window of at most WINDOW tokens.

        They are views of native memory that the next piece overwrites.
        """
        self._context.kv_cache_clear()
        self.routing.clear()
        for start in range(0, len(window), self._piece):
            yield self._decode(window[start : start + self._piece], start)

    def logits(self, window: Tokens) -> Logits:
        """Return a copy of the logits of a whole window, [n, n_vocab]."""
        return np.concatenate([logits.copy() for logits in self.read(window)])

    def _decode(self, tokens: Tokens, n_past: int) -> Logits:
        import llama_cpp

        from edge_speq.runtime import loading

        self._routed.clear()
        try:
            # with logits of the last token only, the last block would skip the other tokens
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


def piece_of(*models: container.GGUFFile) -> int:
    """Return the tokens to decode together if these models are read alternately.

    PIECE, or WINDOW if the models do not fit in memory, because each piece then reads them from disk again.
    """
    total, memory = sum(path.stat().st_size for model in models for path in model.paths), system.memory()
    return WINDOW if memory is not None and total > FITS * memory[0] else PIECE


def windows(tokens: Tokens, most: int | None = None) -> Iterator[Tokens]:
    """Yield at most `most` tokens in windows of WINDOW tokens. The last window is left out if it is below LEAST."""
    for start in range(0, len(tokens) if most is None else min(most, len(tokens)), WINDOW):
        window = tokens[start : start + WINDOW] if most is None else tokens[start : min(start + WINDOW, most)]
        if len(window) >= LEAST:
            yield window


def read_text(path: str | Path | None) -> str:
    """Return a text file, or the bundled prompts (prose, code, chat and textbook). Raises EdgeError."""
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
