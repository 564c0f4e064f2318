"""Arithmetic on quantized blocks: multiply their scales, and dequantize or quantize rows with ggml's functions."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.errors import EdgeError
from edge_speq.gguf.container import TYPES
from edge_speq.gguf.rewrite import TYPE_IDS

Bytes = npt.NDArray[np.uint8]

# Byte offsets within a block of its half-precision scales, to which all values are proportional (ggml-common.h).
# IQ1_M spreads its scale over other fields, and NVFP4's scales cannot represent every factor.
HALVES: dict[str, tuple[int, ...]] = {
    "F16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,),
    "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
SCALABLE = frozenset((*HALVES, "F32", "BF16", "MXFP4"))


def block(type_name: str) -> tuple[int, int]:
    """Return the elements and bytes of a block."""
    _, elements, size = TYPES[TYPE_IDS[type_name]]
    return elements, size


def scale(blocks: Bytes, type_name: str, factor: int) -> Bytes:
    """Return blocks, [..., bytes of a block], with all values multiplied by a factor.

    Exact for powers of two; otherwise each scale is rounded to half precision (relative error up to 2^-11). Raises
    EdgeError if a scale would overflow.
    """
    if factor == 1:
        return blocks
    out: Bytes = np.ascontiguousarray(blocks).copy()
    if type_name == "MXFP4":
        _scale_exponent(out, factor)
        return out
    dtype: Any = np.float32 if type_name == "F32" else np.float16
    if type_name == "BF16":
        values = (out.view(np.uint16).astype(np.uint32) << 16).view(np.float32) * np.float32(factor)
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        _require_finite(values, type_name, factor)
        out = rounded.astype(np.uint16).view(np.uint8).reshape(out.shape)
        return out
    for offset in HALVES.get(type_name, (0,)):
        width = np.dtype(dtype).itemsize
        numbers = np.ascontiguousarray(out[..., offset : offset + width]).view(dtype)
        with np.errstate(over="ignore"):
            numbers = (numbers.astype(np.float32) * np.float32(factor)).astype(dtype)
        _require_finite(numbers, type_name, factor)
        out[..., offset : offset + width] = numbers.view(np.uint8)
    return out


def _scale_exponent(out: Bytes, factor: int) -> None:
    """Multiply MXFP4's scale, a power of two: byte e represents 2^(e - 128)."""
    power = factor.bit_length() - 1
    if 1 << power != factor or int(out[..., 0].max(initial=0)) + power > 254:
        raise _not_scalable("MXFP4", factor)
    out[..., 0] += power


def _require_finite(numbers: npt.NDArray[Any], type_name: str, factor: int) -> None:
    if not np.isfinite(numbers).all():
        raise _not_scalable(type_name, factor)


def _not_scalable(type_name: str, factor: int) -> EdgeError:
    return EdgeError(
        f"weights of type {type_name} cannot hold {factor} times their values", "give --requantize f32 or another type"
    )


@functools.cache
def _ggml() -> Any:
    from edge_speq._native import ggml

    lib = ggml.base()
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 3, ctypes.c_void_p,
    )  # fmt: skip
    return lib


class _Traits(ctypes.Structure):
    """struct ggml_type_traits of the pinned ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


def dequantize(data: bytes, type_name: str, columns: int) -> npt.NDArray[np.float32]:
    """Return the numbers of whole rows, [n_rows, columns]."""
    if type_name == "F32":
        return np.frombuffer(data, np.float32).reshape(-1, columns)
    elements, size = block(type_name)
    out = np.empty(len(data) // size * elements, np.float32)
    raw = np.frombuffer(data, np.uint8)
    traits = _ggml().ggml_get_type_traits(TYPE_IDS[type_name]).contents
    traits.to_float(raw.ctypes.data, out.ctypes.data, out.size)
    return out.reshape(-1, columns)


def quantize(numbers: npt.NDArray[np.float32], type_name: str) -> bytes:
    """Return the bytes of rows, [n_rows, columns], quantized by ggml without an importance matrix."""
    rows = np.ascontiguousarray(numbers, np.float32)
    if type_name == "F32":
        return rows.tobytes()
    n_rows, columns = rows.shape
    elements, size = block(type_name)
    out = np.empty(rows.size // elements * size, np.uint8)
    _ggml().ggml_quantize_chunk(TYPE_IDS[type_name], rows.ctypes.data, out.ctypes.data, 0, n_rows, columns, None)
    return out.tobytes()
