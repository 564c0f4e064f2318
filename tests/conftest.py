"""Fixtures: tiny models written on the spot, the bundled pair, and the markers' switches."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tests share the cores: a spinning thread stops the others

# started in the background of a script: commands that tests interrupt would inherit that Ctrl-C is ignored
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# commands of tests find no profile of whoever runs them
os.environ["EDGE_SPEQ_CONFIG"] = str(Path(__file__).parent / "data" / "no-config")

import llama_cpp
import pytest
import tiny_models

from edge_speq import _native
from edge_speq.convert.quantization import draft
from edge_speq.gguf import bundled as demo


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")
    parser.addoption("--long", action="store_true", help="run the tests that take many seconds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_gpu = None
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))
        if "long" in item.keywords and not (config.getoption("--long") or config.getoption("--slow")):
            item.add_marker(pytest.mark.skip(reason="takes many seconds: run with --long, as CI does"))
        if "gpu" in item.keywords:
            has_gpu = _has_gpu() if has_gpu is None else has_gpu
            if not has_gpu:
                item.add_marker(pytest.mark.skip(reason="no GPU backend: see EDGE_SPEQ_BACKENDS"))


def _has_gpu() -> bool:
    _native.load_backends()
    return _native.compute_device().is_gpu


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    _native.load_backends()


@pytest.fixture(scope="session")
def bundled() -> tuple[Path, Path]:
    """The bundled target and draft."""
    return demo.path(demo.MODEL), demo.path(demo.DRAFT)


class TinyModels:
    """Writes each tiny model once, at first use, and quantizes it."""

    types = {  # noqa: RUF012
        "F16": None,
        "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
        "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
        "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
        "MXFP4": llama_cpp.LLAMA_FTYPE_MOSTLY_MXFP4_MOE,
        "IQ4_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
        "IQ3_S": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_S,
        "IQ2_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XS,
    }
    with_importance = ("IQ2_XS",)

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def moe(self, arch: tiny_models.Arch, kind: str = "F16", **options: Any) -> Path:
        name = "-".join([arch, *(f"{key}_{value}" for key, value in options.items())])
        return self._make(name, kind, partial(tiny_models.write_tiny, arch=arch, **{"n_layer": 4} | options))

    def dense(self, vocab: tiny_models.Vocab = "bytes") -> Path:
        return self._make(f"dense-{vocab}", "F16", partial(tiny_models.write_tiny_dense, vocab=vocab))

    def _make(self, name: str, kind: str, write: partial[Path]) -> Path:
        path = self._folder / f"{name}.{kind}.gguf"
        if not path.exists():
            if kind == "F16":
                write(path)
            else:
                whole = self._make(name, "F16", write)
                tiny_models.quantize(whole, path, self.types[kind], importance=kind in self.with_importance)
        return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModels]:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def twin(bundled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled target with its experts at 2 bits."""
    return draft.twin(bundled[0], tmp_path_factory.mktemp("twin") / "twin.gguf")
