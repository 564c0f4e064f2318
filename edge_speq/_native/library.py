"""Find, check and open libedge_speq."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.errors import EdgeError

ABI_VERSION = 9
INSTALL_HINT = "install the patched build that comes with edge_speq: pip install ./native ."


def package() -> Path:
    """Return the folder of the installed llama_cpp package."""
    import llama_cpp

    return Path(llama_cpp.__file__).parent


def _declarations(header: str) -> str:
    """Return the header as cffi's parser takes it: constants kept, the preprocessor's other lines dropped."""
    lines = [
        line for line in header.splitlines() if not line.startswith("#") or re.match(r"#define EDGE_[A-Z_]+ \d+$", line)
    ]
    text = "\n".join(lines).replace("EDGE_API ", "")
    return text.replace('extern "C" {\n', "").removesuffix("}\n").rstrip().removesuffix("}")


def _library_path(folder: Path) -> Path | None:
    names = ("libedge_speq.so", "libedge_speq.dylib", "edge_speq.dll")
    return next((folder / name for name in names if (folder / name).exists()), None)


@functools.cache
def load() -> tuple[Any, Any]:
    """Return (ffi, lib). Raises EdgeError for the stock llama-cpp-python and for a library of another header."""
    from cffi import FFI

    folder = package()
    header = folder / "include" / "edge_speq.h"
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    library = _library_path(Path(override) if override else folder / "lib")
    if library is None or not header.exists():
        raise EdgeError("the installed llama-cpp-python is the stock build, without the expert hook", INSTALL_HINT)
    ffi = FFI()
    ffi.cdef(_declarations(header.read_text(encoding="utf-8")))
    lib: Any = ffi.dlopen(str(library))
    if lib.edge_abi_version() != ABI_VERSION:
        raise EdgeError(f"{library.name} has ABI {lib.edge_abi_version()}, edge_speq needs {ABI_VERSION}", INSTALL_HINT)
    built_from: Any = ffi.string(lib.edge_header_sha256())
    if built_from.decode() != hashlib.sha256(header.read_bytes()).hexdigest():
        raise EdgeError(f"{library.name} was not built from {header.name} beside it", INSTALL_HINT)
    return ffi, lib


def check(status: int) -> None:
    """Raise EdgeError with the library's message unless status is EDGE_OK."""
    _, lib = load()
    if status != lib.EDGE_OK:
        raise EdgeError(text(lib.edge_last_error()))


def text(pointer: Any) -> str:
    """Decode a C string."""
    return str(load()[0].string(pointer).decode(errors="replace"))


def view(pointer: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return native memory as an array. The memory must outlive the array."""
    memory = load()[0].buffer(pointer, int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


def llama(pointer: int, kind: str) -> Any:
    """Return the address of a llama.cpp object as a `struct kind *`."""
    ffi, _ = load()
    return ffi.cast(f"struct {kind} *", pointer)


def llama_cpp_commit() -> str:
    """Return the llama.cpp commit that the library was built with."""
    return text(load()[1].edge_llama_cpp_commit())
