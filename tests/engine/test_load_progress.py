"""Progress that llama.cpp reports while it loads a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import llama_cpp
import pytest

from edge_speq import EdgeError
from edge_speq.engine.load_progress import LoadProgress
from edge_speq.gguf import bundled
from edge_speq.runtime import loading


def attach(callback: Any) -> tuple[LoadProgress, Any]:
    progress, params = LoadProgress(callback), llama_cpp.llama_model_default_params()
    request: Any = SimpleNamespace(model=bundled.path(bundled.DRAFT), draft=None)
    progress.attach(request, params, llama_cpp.llama_model_default_params())
    return progress, params


def load(params: Any) -> None:
    loading.load_model(bundled.path(bundled.DRAFT), params, "draft").close()


def test_llama_cpp_reports_fractions() -> None:
    fractions: list[float] = []
    _kept, params = attach(fractions.append)
    load(params)
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)


def test_false_ends_the_load() -> None:
    progress, params = attach(lambda _: False)
    with pytest.raises(EdgeError, match="cannot load"):
        load(params)
    with pytest.raises(EdgeError, match="was cancelled"):
        progress.raise_error("draft")


def test_an_exception_ends_the_load_and_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: float) -> bool:
        raise KeyboardInterrupt

    progress, params = attach(interrupted)
    with pytest.raises(EdgeError, match="cannot load"):
        load(params)
    with pytest.raises(KeyboardInterrupt):
        progress.raise_error("draft")
    assert capfd.readouterr().err == ""
