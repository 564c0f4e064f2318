"""The machine as its operating system describes it: processor, memory, limits. Unknown is None."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

GPU_MODULES = ("nvidia", "amdgpu", "xe", "i915")


def cpu_model() -> str:
    names = [value for key, value in _pairs("/proc/cpuinfo") if key in ("model name", "Model", "Hardware")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores() -> int | None:
    """Physical cores of the machine."""
    fields = _pairs("/proc/cpuinfo")
    packages = [value for key, value in fields if key == "physical id"]
    ids = [value for key, value in fields if key == "core id"]
    return len(set(zip(packages, ids, strict=False))) or None


def memory() -> tuple[int, int] | None:
    """Bytes of RAM in total and available, as a container's limit bounds them."""
    info = {key: int(value.split()[0]) << 10 for key, value in _pairs("/proc/meminfo") if value.endswith(" kB")}
    if "MemTotal" not in info:
        return None
    total, available = info["MemTotal"], info.get("MemAvailable", info.get("MemFree", 0))
    for limit, usage in _container_limits():
        total, available = min(total, limit), min(available, max(0, limit - usage))
    return total, available


def locked_memory_limit() -> int | None:
    """Bytes that RLIMIT_MEMLOCK lets this process lock, -1 without a limit."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return -1 if soft == resource.RLIM_INFINITY else soft


def gpu_drivers() -> list[str]:
    """Kernel modules of GPU drivers that are loaded, with their versions where these are not the kernel's. Linux."""
    found = []
    for name in GPU_MODULES:
        if Path(f"/sys/module/{name}").is_dir():
            found.append(f"{name} {_read(f'/sys/module/{name}/version').strip()}".strip())
    return found


def most_page_locked() -> int | None:
    """Bytes of experts that may be page-locked for a GPU: engine.fits_in_memory turned around."""
    found = memory()
    return None if found is None else max(0, (found[1] - (2 << 30)) * 4 // 5)


def _container_limits() -> list[tuple[int, int]]:
    """(limit, usage) of the control group, version 2 or 1, as seen from inside."""
    files = [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")]
    found = [tuple(_read(f"/sys/fs/cgroup/{name}").strip() for name in pair) for pair in files]
    return [(int(limit), int(usage)) for limit, usage in found if limit.isdecimal() and usage.isdecimal()]


def _pairs(path: str) -> list[tuple[str, str]]:
    lines = [line.partition(":") for line in _read(path).splitlines()]
    return [(key.strip(), value.strip()) for key, _, value in lines]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
