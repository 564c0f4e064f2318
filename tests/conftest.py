"""Fixtures: tiny models written on the spot, the bundled pair, and the markers' switches."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tests share the cores: a spinning thread stops the others

# started in the background of a script: commands that tests interrupt would inherit that Ctrl-C is ignored
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# commands of tests find no profile of whoever runs them
os.environ["EDGE_SPEQ_CONFIG"] = str(Path(__file__).parent / "data" / "no-config")

import pytest
from support.tiny_models import TinyModels

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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModels]:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def twin(bundled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled target with its experts at 2 bits."""
    return draft.twin(bundled[0], tmp_path_factory.mktemp("twin") / "twin.gguf")
