"""Observe the inputs of a model's weights on the CPU, through llama.cpp's evaluation callback and ctypes.

llama.cpp calls the callback before every graph node, to ask whether to observe it, and again after the node has run,
as in tools/imatrix. Matrix products are recognized by their shapes and the weight's name, since operation numbers
change between versions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

F32, I32 = 0, 26  # enum ggml_type

Rows = npt.NDArray[np.float32]  # [n_tokens, 1 or n_expert_used, columns]; for a dense weight [.., n_tokens, columns]
Ids = npt.NDArray[np.int32]  # [n_tokens, n_expert_used]


class GraphTensor(ctypes.Structure):
    """The first fields of struct ggml_tensor of the pinned ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )

    def array(self, dtype: type[np.float32] | type[np.int32]) -> npt.NDArray[Any]:
        """Return a strided view, [ne2, ne1, ne0], of 4-byte elements in CPU memory. The next node may overwrite it."""
        size = sum((self.ne[i] - 1) * self.nb[i] for i in range(3)) + 4
        raw = np.ctypeslib.as_array(ctypes.cast(self.data, ctypes.POINTER(ctypes.c_uint8)), (size,))
        shape, strides = (self.ne[2], self.ne[1], self.ne[0]), (self.nb[2], self.nb[1], self.nb[0])
        view: npt.NDArray[Any] = np.ndarray(shape, dtype, raw, 0, strides)
        return view


Observer = Callable[[str, GraphTensor, Rows, "Ids | None"], None]


class GraphCallback:
    """Calls `observe(name, weight, rows, ids)` for every product of a weight with `wanted(name)`.

    `ids` are the chosen experts, None for dense weights. An exception ends the graph and is kept in `error`, because
    ctypes would only print it.
    """

    def __init__(self, wanted: Callable[[str], bool], observe: Observer) -> None:
        import llama_cpp

        self._wanted, self._observe = wanted, observe
        self.error: BaseException | None = None
        self.function: Any = llama_cpp.ggml_backend_sched_eval_callback(self._call)

    def _call(self, address: int, ask: bool, _user: object) -> bool:
        try:
            return self._node(GraphTensor.from_address(address), ask)
        except BaseException as error:  # also KeyboardInterrupt
            self.error = error
            return False

    def _node(self, node: GraphTensor, ask: bool) -> bool:
        """Before a node runs (`ask`), return true to observe it. Afterwards, observe it and return true to continue."""
        if not node.src[0] or not node.src[1]:
            return not ask
        weight, x = GraphTensor.from_address(node.src[0]), GraphTensor.from_address(node.src[1])
        if not weight.name.endswith(b".weight") or x.type != F32:
            return not ask
        if weight.ne[0] != x.ne[0] or node.ne[0] != weight.ne[1] or x.nb[0] != 4:
            return not ask
        name = weight.name.decode()
        if not self._wanted(name):
            return not ask
        if not ask:
            ids = GraphTensor.from_address(node.src[2]).array(np.int32)[0] if node.src[2] else None
            self._observe(name, weight, x.array(np.float32), ids)
        return True
