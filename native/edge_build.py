"""PEP 517 backend: builds one wheel of llama-cpp-python, patched, with edge_speq's native library inside.

The pinned sdist (upstream.toml) comes through pip or from EDGE_SPEQ_LLAMA_SOURCE; wheels are cached by content.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from _build import cache, source
from _build.patches import apply_patches
from _build.toolchain import Settings, toolchain
from _build.upstream import Upstream

NATIVE = Path(__file__).resolve().parent
# llama.cpp's Hugging Face converter with all that it reads: data for `edge-speq convert hf`, which runs it by path
CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py/gguf", "models/templates", "LICENSE")


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    from scikit_build_core.build import get_requires_for_build_wheel as requires

    return requires(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    from scikit_build_core.build import prepare_metadata_for_build_wheel as prepare

    return prepare(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    upstream = Upstream.load(NATIVE / "upstream.toml")
    origin = source.identify(upstream)
    key = cache.key({"source": origin.digest, "recipe": cache.recipe(NATIVE, upstream), **toolchain(config_settings)})
    wheel = cache.find(key)
    if wheel is not None:
        print(f"edge_speq: the wheel was built before, copied from {wheel.parent}", flush=True)
        return Path(shutil.copy2(wheel, wheel_directory)).name
    with tempfile.TemporaryDirectory(prefix="edge-speq-") as work:
        tree = source.unpack(origin.path or source.fetch(upstream), Path(work))
        apply_patches([NATIVE / "patches" / name for name in upstream.patches], tree)
        overlay(tree)
        built = compile_wheel(tree, Path(wheel_directory).resolve(), upstream, config_settings)
    cache.store(key, built)
    return built.name


def overlay(tree: Path) -> None:
    """Puts our build files and sources over an unpacked, patched sdist, and its converter into the package."""
    for name in ("CMakeLists.txt", "pyproject.toml", "LICENSE"):
        shutil.copyfile(NATIVE / name, tree / name)
    for name in ("src", "include"):
        shutil.copytree(NATIVE / name, tree / "edge" / name)
    for name in CONVERTER:
        copy(tree / "vendor" / "llama.cpp" / name, tree / "llama_cpp" / "_convert" / name)


def copy(source_path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source_path.is_dir():
        shutil.copytree(source_path, target)
    else:
        shutil.copyfile(source_path, target)


def compile_wheel(tree: Path, wheel_directory: Path, upstream: Upstream, config_settings: Settings) -> Path:
    from scikit_build_core.build import build_wheel as build

    settings = {**(config_settings or {}), "cmake.define.EDGE_SPEQ_LLAMA_COMMIT": upstream.llama_cpp_commit}
    before = Path.cwd()
    os.chdir(tree)
    try:
        return wheel_directory / build(str(wheel_directory), settings)
    finally:
        os.chdir(before)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    from scikit_build_core.build import build_sdist as build

    return build(sdist_directory, config_settings)


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []


# An editable install is an ordinary wheel: the Python files are patched copies, there is nothing to edit in place.
get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel
build_editable = build_wheel
