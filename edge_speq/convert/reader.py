"""A model that reads a text on the CPU, window by window, and shows its logits and its routing."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.convert import graph
from edge_speq.core import EdgeError

WINDOW = 512  # tokens that are read from an empty context
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
    ) -> None:
        import llama_cpp
        from llama_cpp import _internals as internals

        from edge_speq import _native, engine, machine

        _native.load_backends()
        checked = engine.check_model_file(path, role)
        self.routing: dict[int, graph.Ids] = {}
        self._callback = graph.Callback(wanted or self._is_routed, observe or self._keep_routing)
        model_params = llama_cpp.llama_model_default_params()
        # no GPU: what is observed must lie in memory; nothing is repacked, which would only take time and space
        self._no_devices = (ctypes.c_void_p * 1)(None)
        model_params.devices = ctypes.addressof(self._no_devices)
        model_params.n_gpu_layers, model_params.use_extra_bufts = 0, False
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = WINDOW
        params.n_threads = params.n_threads_batch = n_threads or machine.usable_cpus()
        params.op_offload = params.offload_kqv = False
        params.cb_eval = self._callback.function
        with contextlib.ExitStack() as stack:
            self._model = stack.enter_context(contextlib.closing(engine.load_model(checked, model_params, role)))
            self._context = stack.enter_context(contextlib.closing(engine.create_context(self._model, params)))
            batch = internals.LlamaBatch(n_tokens=WINDOW, embd=0, n_seq_max=1, verbose=True)
            self._batch: Any = stack.enter_context(contextlib.closing(batch))
            self.close = stack.pop_all().close
        self.n_vocab = int(self._model.n_vocab())

    def tokens(self, text: str) -> Tokens:
        return np.array(self._model.tokenize(text.encode(), self._adds_bos(), True), dtype=np.int32)

    def logits(self, window: Tokens) -> Logits:
        """[n, n_vocab] of a window of at most WINDOW tokens. A view of native memory: the next window overwrites it."""
        import llama_cpp

        from edge_speq import engine

        self._context.kv_cache_clear()
        self.routing.clear()
        try:
            # logits of every token: without them the last block would not see the others
            engine.decode(self._context, self._batch, window.tolist(), 0, len(window), logits_all=True)
        except EdgeError:
            if self._callback.error is not None:
                raise self._callback.error from None
            raise
        pointer = llama_cpp.llama_get_logits(self._context.ctx)
        found: Logits = np.ctypeslib.as_array(pointer, (len(window), self.n_vocab))
        return found

    def _adds_bos(self) -> bool:
        import llama_cpp

        return bool(llama_cpp.llama_vocab_get_add_bos(self._model.vocab))

    @staticmethod
    def _is_routed(name: str) -> bool:
        return _EXPERTS.fullmatch(name) is not None

    def _keep_routing(self, name: str, _weight: graph.Tensor, _rows: graph.Rows, ids: graph.Ids | None) -> None:
        match = _EXPERTS.fullmatch(name)
        if ids is not None and match is not None:
            self.routing[int(match[1])] = ids.copy()


def windows(tokens: Tokens, most: int | None = None) -> Iterator[Tokens]:
    """At most `most` tokens in windows of WINDOW; what is left in the end counts when it has LEAST tokens."""
    for start in range(0, len(tokens) if most is None else min(most, len(tokens)), WINDOW):
        window = tokens[start : start + WINDOW] if most is None else tokens[start : min(start + WINDOW, most)]
        if len(window) >= LEAST:
            yield window


def read_text(path: str | Path | None) -> str:
    """A text file, or the prompts that come with edge_speq: prose, code, chat and textbook. Raises EdgeError."""
    if path is None:
        from edge_speq.bench import prompts

        texts = prompts.read(prompts.BUNDLED)
        return prompts.GAP.join(prompt.text for prompt in texts)
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise EdgeError(f"cannot read the text {path}: {error.strerror}", "give a text file", usage=True) from error
    if not text.strip():
        raise EdgeError(f"the text {path} is empty", "give a text of some thousand words", usage=True)
    return text
