"""What outside the sources decides the machine code: compilers, flags, CPU, platform."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TypeAlias

from .failure import fail

Settings: TypeAlias = dict[str, str | list[str]] | None  # PEP 517 config_settings

COMPILERS = {"CXX": ("c++", "g++", "clang++"), "CC": ("cc", "gcc", "clang")}
ENVIRONMENT = re.compile(
    r"CMAKE_(?!BUILD_PARALLEL_LEVEL)\w+|SKBUILD_\w+|C(XX|PP|UDA)?FLAGS|LDFLAGS|CC|CXX|CUDACXX|CUDAARCHS|CUDA_PATH"
    r"|ARCHFLAGS|MACOSX_DEPLOYMENT_TARGET"
)


def toolchain(config_settings: Settings) -> dict[str, str]:
    """Ingredients of the cache key: two machines or installs that agree on them can share a wheel."""
    ingredients = {
        "platform": sysconfig.get_platform(),
        "environment": json.dumps({k: v for k, v in os.environ.items() if ENVIRONMENT.fullmatch(k)}, sort_keys=True),
        "settings": json.dumps(dict(config_settings or {}), sort_keys=True),
        "c++": compiler("CXX", config_settings),
        "c": compiler("CC", config_settings),
        "cuda": version(shlex.split(os.environ.get("CUDACXX", "nvcc"))),
    }
    native = definition("GGML_NATIVE", config_settings) or "ON"
    if native.upper() not in ("OFF", "0", "FALSE", "NO"):
        ingredients["cpu"] = cpu()
    return ingredients


def definition(name: str, config_settings: Settings) -> str | None:
    """The value of -DNAME=... in CMAKE_ARGS or the build settings, the last one if several."""
    words = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    text = "\0".join(words).replace("-D\0", "-D")
    values = re.findall(rf"-D{name}(?::\w+)?=([^\0]*)", text)
    setting = (config_settings or {}).get(f"cmake.define.{name}")
    return setting if isinstance(setting, str) else values[-1] if values else None


def compiler(variable: str, config_settings: Settings) -> str:
    chosen = definition(f"CMAKE_{variable}_COMPILER", config_settings) or os.environ.get(variable)
    if chosen:
        command = shlex.split(chosen, posix=os.name == "posix")
    else:
        command = [name for name in COMPILERS[variable] if shutil.which(name)][:1]
    text = version(command)
    # On Windows CMake finds Visual Studio by itself, without a compiler on PATH.
    if not text and sys.platform != "win32":
        language = "C++" if variable == "CXX" else "C"
        fail(
            f"no {language} compiler: " + (f"{chosen} does not run" if chosen else "none on PATH"),
            f"install one (Debian: build-essential, macOS: xcode-select --install) or set {variable} to its path",
        )
    return text


def version(command: list[str]) -> str:
    """The command and what it says for --version; empty when it does not run."""
    try:
        ran = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{shlex.join(command)}\n{ran.stdout}"


def cpu() -> str:
    """Model and instruction sets: -march=native bakes them into the library."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(
            sorted({line for line in lines if re.match(r"(model name|flags|Features|CPU part)\s*:", line)})
        )
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return platform.processor()
