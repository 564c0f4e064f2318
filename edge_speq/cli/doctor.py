"""edge-speq doctor: check that this installation and this machine can run models, and name a remedy if not.

The measurements take one or two seconds; with a MODEL, loading it comes on top.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_speq import __version__, system
from edge_speq.cli import arguments
from edge_speq.errors import EdgeError
from edge_speq.gguf import bundled
from edge_speq.gguf import model as gguf_model
from edge_speq.units import format_bytes, format_rate

MIN_DISK = 1 << 30  # bytes
MIN_MEMORY = 1 << 30
LARGE_EXPERT = 1 << 20
NOT_MODULES = re.compile(r"(lib)?ggml-(base|cpu)\b")  # linked, not loaded as a module
CUDA_RUNTIME = re.compile(rb"lib(?:cudart|cublas)\.so\.(\d+)")
CUDA_DRIVERS = ((13, 580), (12, 525), (0, 450))  # major version of CUDA, the oldest driver branch that runs it (Linux)
MOST_OF_A_MODULE = 64 << 20
EXTRAS = {  # extras of pyproject.toml, with the modules that are imported
    "serve": ("fastapi", "uvicorn", "starlette", "sse_starlette"),
    "convert": ("torch", "transformers", "safetensors", "sentencepiece", "google.protobuf", "yaml", "tqdm", "requests"),
    "train": ("torch",),
    "plot": ("matplotlib",),
    "desktop": ("PySide6",),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check.

    `status` is ok, note (an optional part is missing), warn (usable, with a drawback) or fail (not usable). `remedy`
    says what to do about it, except for ok.
    """

    name: str
    status: str
    text: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)  # the numbers of `text`, by name


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="check the installation and the machine",
        description="Checks the installation and the machine. Exit code 0 if models can be run, otherwise 1.",
    )
    arguments.add_model_file(p, "model for measuring disk and link (the bundled one)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("-v", "--verbose", action="store_true", help="show the log")
    p.set_defaults(command=doctor)


def doctor(options: argparse.Namespace) -> int:
    arguments.settle_model(options)
    findings = list(examine(options.model))
    usable = all(finding.status != "fail" for finding in findings)
    if options.json:
        print(json.dumps({"usable": usable, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        print("\n".join(line for finding in findings for line in lines(finding)))
        print("usable" if usable else "not usable: see the failed checks above")
    return 0 if usable else 1


def lines(finding: Finding) -> list[str]:
    remedy = [f"{'':18}-> {finding.remedy}"] if finding.remedy else []
    return [f"{finding.status:5} {finding.name:11} {finding.text}", *remedy]


def examine(model: str | None = None) -> Iterator[Finding]:
    yield python()
    build = native_build()
    yield build
    found = list(backends()) if build.status != "fail" else []
    yield from found
    if build.status != "fail":
        yield instruction_sets()
    yield driver()
    yield cpu()
    yield memory()
    yield locked_memory()
    yield page_locked()
    yield from bundled_models()
    yield disk()
    yield disk_rate(model)
    if build.status != "fail" and all(finding.status != "fail" for finding in found):
        yield link_rate(model)
    yield from extras()


def python() -> Finding:
    version = platform.python_version()
    text = f"edge_speq {__version__} on Python {version}, {platform.system()} {platform.machine()}"
    return Finding("package", "ok", text, values={"edge_speq": __version__, "python": version})


def native_build() -> Finding:
    """Check that the installed llama-cpp-python is the patched build and was built from the header beside it."""
    reinstall = "install the patched build that comes with edge_speq: pip install ./native ."
    try:
        import llama_cpp

        from edge_speq import _native

        commit = _native.llama_cpp_commit()
    except EdgeError as error:
        return Finding("llama.cpp", "fail", error.message, error.hint or reinstall)
    except Exception as error:  # whatever a broken installation raises while it is imported
        return Finding("llama.cpp", "fail", f"llama_cpp cannot be loaded: {error}", reinstall)
    text = f"patched llama-cpp-python {llama_cpp.__version__}, llama.cpp {commit[:10]}, built from its header"
    return Finding("llama.cpp", "ok", text, values={"llama_cpp_python": llama_cpp.__version__, "commit": commit})


def backends() -> Iterator[Finding]:
    """Check backend modules, and list the devices that they and the linked backends offer."""
    from edge_speq import _native

    with _captured("edge_speq") as warnings:
        try:
            _native.load_backends()
        except EdgeError as error:
            yield Finding("backends", "fail", error.message, error.hint or "correct or unset EDGE_SPEQ_BACKENDS")
    for path in backend_modules():
        yield module(path, warnings)
    found = _native.devices()
    for device in found:
        text = f"{device}: {format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free"
        yield Finding("device", "ok", text, values=dataclasses.asdict(device))
    if not any(device.is_gpu for device in found):
        remedy = "put a ggml backend module beside the installed libraries or name it in EDGE_SPEQ_BACKENDS"
        yield Finding("gpu", "warn", "no GPU backend: the CPU computes", remedy)


def backend_modules() -> list[Path]:
    """Return the modules in the folder of the installed libraries, and the modules that EDGE_SPEQ_BACKENDS names."""
    import llama_cpp

    named = [Path(name) for name in os.environ.get("EDGE_SPEQ_BACKENDS", "").split(os.pathsep) if name]
    folders = [Path(llama_cpp.__file__).parent / "lib", *(path for path in named if path.is_dir())]
    found = [path for folder in folders for path in sorted(folder.glob("*ggml-*.so"))]
    return [path for path in found if not NOT_MODULES.match(path.name)] + [path for path in named if path.is_file()]


def module(path: Path, warnings: list[str]) -> Finding:
    """Check that a backend module loads. If not, quote the dynamic linker or llama.cpp's log."""
    remedy = "install the driver or runtime library that it names, or build the module from this llama.cpp"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return Finding("module", "warn", f"{path.name} does not load: {error}", remedy)
    said = [text for text in warnings if path.name in text]
    return Finding("module", "warn", said[0], remedy) if said else Finding("module", "ok", f"{path.name} loads")


def instruction_sets() -> Finding:
    import llama_cpp

    return built_for(llama_cpp.llama_print_system_info().decode(errors="replace"))


def built_for(info: str) -> Finding:
    """Check how ggml was built, from its own description.

    A CUDA backend without CUDA graphs launches each kernel separately, which slows each token down. llama.cpp's build
    enables them; a build of ggml alone does not.
    """
    found = re.findall(r"(\w+) = 1\b", info)
    text, values = ", ".join(found) or "no instruction set extensions", {"features": found}
    if re.search(r"\bCUDA\b", info) and "USE_GRAPHS" not in found:
        return Finding(
            "built for", "warn", f"{text}; CUDA without graphs", "build it with -DGGML_CUDA_GRAPHS=ON", values
        )
    return Finding("built for", "ok", text, values=values)


def cpu() -> Finding:
    cores, usable = system.cores(), system.usable_cpus()
    text = f"{system.cpu_model()}, {f'{cores} cores, ' if cores else ''}{usable} of {os.cpu_count()} processors usable"
    return Finding("cpu", "ok", text, values={"cores": cores, "processors": os.cpu_count(), "usable": usable})


def memory() -> Finding:
    found = system.memory()
    if found is None:
        return Finding("memory", "ok", "unknown on this system")
    total, available = found
    values = {"total_bytes": total, "available_bytes": available}
    text = f"{format_bytes(available)} of {format_bytes(total)} available"
    if available < MIN_MEMORY:
        return Finding("memory", "warn", text, "close other programs: models are read through the page cache", values)
    return Finding("memory", "ok", text, values=values)


def locked_memory() -> Finding:
    limit = system.locked_memory_limit()
    if limit is None:
        return Finding("memlock", "ok", "no such limit on this system")
    text = "unlimited" if limit < 0 else f"{format_bytes(limit)}"
    note = "" if limit < 0 else ": use_mlock is bound by it, page-locked buffers of a GPU driver are not"
    return Finding("memlock", "ok", text + note, values={"limit_bytes": None if limit < 0 else limit})


def page_locked() -> Finding:
    """Report the largest total size of experts that is read into page-locked memory."""
    most = system.most_page_locked()
    if most is None:
        return Finding("pinned", "ok", "unknown on this system: models are mapped")
    text = f"experts of up to {format_bytes(most)} are read into page-locked memory for a GPU, larger ones are mapped"
    if sys.platform == "win32":
        text += "; Windows grants a driver about half of the RAM"
    return Finding("pinned", "ok", text, values={"most_bytes": most})


def driver() -> Finding:
    """Find GPU drivers and, if a CUDA backend is present, whether the NVIDIA driver is new enough for it."""
    found = system.gpu_drivers()
    installed, cuda = system.nvidia_driver(), cuda_version()
    needed = None if cuda is None else next(driver for version, driver in CUDA_DRIVERS if cuda >= version)
    values = {"modules": found, "nvidia_driver": installed, "cuda": cuda, "needed_driver": needed}
    text = ", ".join(found) or "none found"
    if cuda is None:
        return Finding("driver", "ok", text, values=values)
    text += f"; the CUDA {cuda} backend needs an NVIDIA driver of at least {needed}"
    if installed is None:
        return Finding("driver", "warn", f"{text}, none found", f"install NVIDIA driver {needed} or newer", values)
    if int(installed.partition(".")[0]) < (needed or 0):
        text += f", this one is {installed}"
        return Finding("driver", "warn", text, f"install NVIDIA driver {needed} or newer", values)
    return Finding("driver", "ok", text, values=values)


def cuda_version() -> int | None:
    """Return the major version of CUDA that a backend module is linked to, None without such a module."""
    try:
        modules = [path for path in backend_modules() if "cuda" in path.name]
    except Exception:  # whatever a broken installation raises while it is imported
        return None
    found = [int(match[1]) for path in modules for match in CUDA_RUNTIME.finditer(_start_of(path))]
    return max(found, default=None)


def _start_of(path: Path) -> bytes:
    """Return the first bytes of a library, which hold the names of the libraries that it needs."""
    try:
        with path.open("rb") as file:
            return file.read(MOST_OF_A_MODULE)
    except OSError:
        return b""


def disk_rate(model: str | None) -> Finding:
    """Measure the rate of reading the model from disk."""
    from edge_speq.tune import link_speed

    try:
        path = Path(model) if model is not None else bundled.path(bundled.MODEL)
        rate = link_speed.disk(path)
    except (OSError, EdgeError) as error:
        return Finding("disk speed", "warn", f"not measured: {error}", "name a file that can be read")
    if rate is None:
        return Finding("disk speed", "ok", "not measured: this system cannot drop cached file pages")
    text = f"{format_rate(rate.bytes_per_s)}, {format_bytes(rate.n_bytes)} of {path.name} read"
    values = {"bytes_per_s": rate.bytes_per_s, "n_bytes": rate.n_bytes}
    return Finding("disk speed", "ok", text, values=values)


def link_rate(model: str | None) -> Finding:
    """Measure the rate of expert transfers to the GPU."""
    from edge_speq.tune import link_speed

    if not link_speed.has_link():
        return Finding("link speed", "ok", "not measured: there is no GPU, experts move within RAM")
    try:
        with _captured("edge_speq"):
            rate = link_speed.link(model)
    except EdgeError as error:
        return Finding("link speed", "warn", f"not measured: {error.message}", error.hint or "name another MODEL")
    small = "" if rate.n_bytes >= LARGE_EXPERT else "; give a MODEL with larger experts, which transfer faster"
    text = f"{format_rate(rate.bytes_per_s)} with experts of {format_bytes(rate.n_bytes)}{small}"
    return Finding("link speed", "ok", text, values={"bytes_per_s": rate.bytes_per_s, "expert_bytes": rate.n_bytes})


def extras() -> Iterator[Finding]:
    for name, modules in EXTRAS.items():
        missing = [module for module in modules if not _importable(module)]
        values = {"extra": name, "missing": missing}
        if missing:
            text, remedy = f"{name}: {', '.join(missing)} missing", system.install_hint(name)
            yield Finding("optional", "note", text, remedy, values)
        else:
            yield Finding("optional", "ok", f"{name}: installed", values=values)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def bundled_models() -> Iterator[Finding]:
    for name in (bundled.MODEL, bundled.DRAFT):
        try:
            file = gguf_model.check_model(bundled.path(name))
        except EdgeError as error:
            yield Finding("demo", "warn", error.message, error.hint)
        else:
            yield Finding("demo", "ok", f"{name}, {format_bytes(file.size)}", values={"size_bytes": file.size})


def disk() -> Finding:
    """Check the free space of the folder with the bundled models, or of the current folder."""
    folder = Path.cwd()
    with contextlib.suppress(EdgeError):
        folder = bundled.path(bundled.MODEL).parent
    usage = shutil.disk_usage(folder)
    text = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} free in the model folder"
    values = {"free_bytes": usage.free, "total_bytes": usage.total}
    if usage.free < MIN_DISK:
        return Finding("disk", "warn", text, "free some space: models take gigabytes", values)
    return Finding("disk", "ok", text, values=values)


@contextlib.contextmanager
def _captured(name: str) -> Iterator[list[str]]:
    """Collect the warnings of a logger while the block runs, and keep them off the screen."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    texts: list[str] = []
    logger, handler = logging.getLogger(name), Keep(logging.WARNING)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield texts
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)
