"""ggml's base library, for the few functions that llama_cpp does not bind."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp

from edge_speq.errors import EdgeError

NAMES = ("libggml-base.so", "libggml-base.so.*", "libggml-base.dylib", "libggml-base.*.dylib", "ggml-base.dll")


def base() -> ctypes.CDLL:
    """Open the installed libggml-base, with or without a version in its name. Raises EdgeError if it is missing."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    for name in NAMES:
        for path in sorted(folder.glob(name)):
            return ctypes.CDLL(str(path))
    raise EdgeError(f"{folder} has no libggml-base", "install the patched build: pip install ./native .")
