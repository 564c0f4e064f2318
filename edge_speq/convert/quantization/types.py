"""Names of quantizations: of whole files (llama.cpp's ftypes, mixes of types) and of single tensors."""

from __future__ import annotations

from edge_speq.errors import EdgeError
from edge_speq.gguf.container import TYPES

# enum llama_ftype of llama.h, without ftypes whose default type cannot be a quantization target
# fmt: off
FTYPES: dict[str, int] = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20,
    "q2_k_s": 21, "iq3_xs": 22, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27, "iq2_s": 28,
    "iq2_m": 29, "iq4_xs": 30, "iq1_m": 31, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "mxfp4": 38,
}
# fmt: on
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}  # as llama-quantize has them
FLOATS = ("f32", "f16", "bf16")

# file type of a file whose experts have this type and whose other tensors are unchanged
LABELS = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

_IDS = {name.lower(): number for number, (name, _, _) in TYPES.items()}
_INTERNAL = {"q8_1", "q8_k", "i8", "i16", "i32", "i64", "f64", "nvfp4", "q1_0", "q2_0"}
# tensor_requires_imatrix of llama.cpp's src/llama-quant.cpp; q2_k only in a file of type q2_k_s
NEEDS_IMPORTANCE = ("iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s")


def ftype(name: str) -> int:
    """Return the ftype of a name such as q4_k_m. Raises EdgeError for an unknown name."""
    lower = name.lower()
    number = FTYPES.get(ALIASES.get(lower, lower))
    if number is None:
        raise EdgeError(f"{name!r} is not a file type", f"choose one of {', '.join(FTYPES)}", usage=True)
    return number


def tensor_types() -> list[str]:
    return [name for name in _IDS if name not in _INTERNAL]


def tensor_type(name: str) -> int:
    """Return the ggml type of a name such as q3_k. Raises EdgeError for an unknown name."""
    lower = name.lower()
    if lower not in _IDS or lower in _INTERNAL:
        raise EdgeError(f"{name!r} is not a tensor type", f"choose one of {', '.join(tensor_types())}", usage=True)
    return _IDS[lower]


def number(name: str) -> int:
    """Return the ggml type of a type name in a file, including types that users cannot request."""
    return _IDS[name.lower()]


def row_bytes(number: int, columns: int) -> int:
    """Return the bytes of a row. `columns` must be a multiple of the type's block."""
    _, block, block_bytes = TYPES[number]
    return columns // block * block_bytes


def label(name: str) -> int:
    """Return the best ftype for a file with experts of this type. llama.cpp requires a quantized one (see recipe)."""
    lower = LABELS.get(name.lower(), name.lower())
    return FTYPES.get(lower, FTYPES["q8_0"]) if lower not in FLOATS else FTYPES["q8_0"]
