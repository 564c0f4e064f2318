"""Facts about the machine and the installation: processor, memory, limits, drivers, packages. None means unknown."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from pathlib import Path

GPU_MODULES = ("nvidia", "amdgpu", "xe", "i915")


def cpu_model() -> str:
    """Return the name of the processor, which psutil does not know."""
    names = [value for key, value in _pairs("/proc/cpuinfo") if key in ("model name", "Model", "Hardware")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Return the number of logical processors that this process may run on."""
    import psutil  # type: ignore[import-untyped, unused-ignore]  # lazy: it takes 20 ms

    if hasattr(psutil.Process, "cpu_affinity"):  # not on macOS
        with contextlib.suppress(psutil.Error, OSError):
            return len(psutil.Process().cpu_affinity())
    return os.cpu_count() or 1


def cores() -> int | None:
    """Return the number of physical cores of the machine."""
    import psutil

    cores: int | None = psutil.cpu_count(logical=False)
    return cores


def memory() -> tuple[int, int] | None:
    """Return the total and the available bytes of RAM, bounded by the limit of a container."""
    import psutil

    try:
        found = psutil.virtual_memory()
    except (psutil.Error, OSError, NotImplementedError, RuntimeError):
        return None
    total, available = int(found.total), int(found.available)
    for limit, usage in _container_limits():  # psutil ignores these limits
        total, available = min(total, limit), min(available, max(0, limit - usage))
    return total, available


def locked_memory_limit() -> int | None:
    """Return the bytes that RLIMIT_MEMLOCK lets this process lock, -1 without a limit; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return -1 if soft == resource.RLIM_INFINITY else soft


def gpu_drivers() -> list[str]:
    """Return the loaded kernel modules of GPU drivers, with their own versions if they have one. Linux only."""
    found = []
    for name in GPU_MODULES:
        if Path(f"/sys/module/{name}").is_dir():
            found.append(f"{name} {_read(f'/sys/module/{name}/version').strip()}".strip())
    return found


def nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver's kernel module, such as "580.159". Linux only."""
    return _read("/sys/module/nvidia/version").strip() or None


def most_page_locked() -> int | None:
    """Return the most expert bytes to page-lock for a GPU: the inverse of runtime.loading.fits_in_memory."""
    found = memory()
    return None if found is None else max(0, (found[1] - (2 << 30)) * 4 // 5)


def install_hint(extra: str) -> str:
    """Return the pip command that installs the packages of an optional extra of edge_speq.

    It names the packages, because `edge-speq[serve]` cannot be installed by name while the package is on no index.
    """
    from importlib import metadata  # lazy: it takes as long as the rest of `edge-speq --help`

    found = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    with contextlib.suppress(metadata.PackageNotFoundError):
        lines = metadata.requires("edge-speq") or []
        names = [line.partition(";")[0].strip() for line in lines if found.search(line)]
        if names:
            return f"pip install {' '.join(_quoted(name) for name in names)}"
    return f'pip install ".[{extra}]"'  # in a checkout that is not installed


def _quoted(requirement: str) -> str:
    plain = requirement.replace(" ", "")
    return plain if re.fullmatch(r"[\w.-]+", plain) else f'"{plain}"'  # double quotes also work in cmd.exe


def _container_limits() -> list[tuple[int, int]]:
    """Return (limit, usage) in bytes of the container's control group, version 2 or 1."""
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
