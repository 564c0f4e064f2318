"""ggml's devices and backend modules."""

from __future__ import annotations

import functools
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from edge_speq._native.library import check, load, package, text
from edge_speq._native.log import route_llama_cpp_log
from edge_speq.errors import EdgeError

log = logging.getLogger("edge_speq")


@functools.cache
def load_backends() -> None:
    """Initialise llama.cpp, once: route its log to logging and load the ggml backend modules that EDGE_SPEQ_BACKENDS
    names or that are beside the libraries. Raises EdgeError if a named module does not load."""
    _, lib = load()
    import llama_cpp

    route_llama_cpp_log()
    llama_cpp.llama_backend_init()
    beside = sorted((package() / "lib").glob("*ggml-*.so"))
    named = [Path(p) for p in os.environ.get("EDGE_SPEQ_BACKENDS", "").split(os.pathsep) if p]
    for path in named:
        modules = sorted(path.glob("*ggml-*.so")) if path.is_dir() else [path]
        if not modules or not modules[0].exists():
            raise EdgeError(f"EDGE_SPEQ_BACKENDS names {path}, which holds no ggml backend module")
        for module in modules:
            check(lib.edge_backend_load(str(module).encode()))
    failed = [
        (module.name, text(lib.edge_last_error()))
        for module in beside
        if re.match(r"(lib)?ggml-(base|cpu)\b", module.name) is None and lib.edge_backend_load(str(module).encode())
    ]
    if failed and not compute_device().is_gpu:  # with a GPU, the failed one is a linked-in backend, which is no module
        log.warning("%s does not load, so the CPU computes: %s", *failed[0])


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    description: str
    is_gpu: bool
    is_integrated: bool  # shares the host's memory
    free_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.description})"


def devices() -> list[Device]:
    """Return all ggml devices of this process."""
    ffi, lib = load()
    n = ffi.new("int32_t *")
    check(lib.edge_device_count(n))
    found = []
    for i in range(n[0]):
        d = ffi.new("edge_device *")
        check(lib.edge_device_get(i, d))
        kind = bool(d.is_gpu), bool(d.is_integrated)
        found.append(Device(text(d.name), text(d.description), *kind, d.free_bytes, d.total_bytes))
    return found


def compute_device() -> Device:
    """Return the device of slots and dense weights: the first GPU, or the CPU without one."""
    found = devices()
    return next((d for d in found if d.is_gpu), next(d for d in found if d.name.startswith("CPU")))


def cpu_buffer_type() -> int:
    """Return ggml's buffer type of plain host memory."""
    ffi, lib = load()
    return int(ffi.cast("uintptr_t", lib.edge_cpu_buffer_type()))


def host_buffer_type() -> int:
    """Return the buffer type of memory that is page-locked for the first GPU; plain host memory without a GPU."""
    ffi, lib = load()
    return int(ffi.cast("uintptr_t", lib.edge_host_buffer_type()))
