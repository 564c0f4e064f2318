"""Read the gate weights of a graph's (token, expert) pairs through llama.cpp's eval callback."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq._native import ggml

PROBS = re.compile(r"ffn_moe_probs-(\d+)")  # cb() of build_moe_ffn in llama.cpp's src/llama-graph.cpp


class GateReader:
    """Keeps the router probabilities of the last graph, one row per token.

    It treats ggml's tensors as opaque and reads only their names, sizes and bytes.
    """

    def __init__(self) -> None:
        self._ggml = _ggml_base()
        self._found: dict[int, npt.NDArray[np.float32]] = {}
        self._callback: Any = None

    def install(self, context_params: Any) -> None:
        """Set the eval callback in llama.cpp's context parameters."""
        self._callback = type(context_params.cb_eval)(self._seen)
        context_params.cb_eval = self._callback

    def clear(self) -> None:
        """Drop the values of the last graph."""
        self._found.clear()

    def of(self, routing: npt.NDArray[np.int32]) -> npt.NDArray[np.float16] | None:
        """Return the gate weights of routing, [n_blocks, n_tokens, n_expert_used], blocks in layer order.

        Returns None if the graph did not show the probabilities of all blocks.
        """
        n_blocks, n_tokens, _ = routing.shape
        rows = [probs.reshape(n_tokens, -1) for _, probs in sorted(self._found.items()) if probs.size % n_tokens == 0]
        if len(rows) != n_blocks:
            return None
        return np.take_along_axis(np.stack(rows), routing, axis=2).astype(np.float16)

    def _seen(self, tensor: int, ask: bool, _: Any) -> bool:
        match = PROBS.fullmatch(self._ggml.ggml_get_name(tensor).decode(errors="replace"))
        if match is None or ask:
            return match is not None
        values = np.empty(self._ggml.ggml_nelements(tensor), dtype=np.float32)
        self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        self._found[int(match[1])] = values
        return True


def _ggml_base() -> Any:
    library = ggml.base()
    library.ggml_get_name.argtypes, library.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    library.ggml_nelements.argtypes, library.ggml_nelements.restype = [ctypes.c_void_p], ctypes.c_int64
    get = library.ggml_backend_tensor_get
    get.argtypes, get.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None
    return library
