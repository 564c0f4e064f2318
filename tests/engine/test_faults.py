"""Whatever fails while a model loads or generates: the right exception, nothing leaked, and the next request works."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import speculation

from edge_speq import EdgeError, EdgeLlama, _native
from edge_speq.gguf import container

PROMPT = "Once upon a time"


def text(model: EdgeLlama) -> str:
    model.reset()
    return str(model.create_completion(PROMPT, max_tokens=24, temperature=0.0)["choices"][0]["text"])


def texts(model: EdgeLlama, n: int) -> list[str]:
    return [text(model) for _ in range(n)]


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    for fault in ("allocation", "copy", "routing"):
        _native.fail(fault, 0)


def held() -> tuple[int, int]:
    """Threads and open descriptors of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def test_every_allocation_may_fail_while_loading(bundled: tuple[Path, Path]) -> None:
    options: dict[str, Any] = {"draft": bundled[1], "resident": "1/2"}
    with speculation.llm(bundled[0], **options) as model:
        expected = text(model)
    before = held()
    failed = 0
    for nth in range(1, 20):
        _native.fail("allocation", nth)
        try:
            with speculation.llm(bundled[0], **options):
                break  # there are fewer than nth
        except EdgeError as error:
            failed += 1
            assert "allocat" in str(error)
    assert failed >= 2
    _native.fail("allocation", 0)
    with speculation.llm(bundled[0], **options) as model:
        assert text(model) == expected
    assert held() == before


@pytest.mark.parametrize("fault", ["copy", "routing"])
def test_every_copy_and_routing_read_may_fail_while_generating(bundled: tuple[Path, Path], fault: str) -> None:
    with speculation.llm(bundled[0], draft=bundled[1], resident="1/4", draft_tokens=2) as model:
        expected, before = text(model), held()
        for nth in (1, 2, 3, 7, 20, 55, 150):
            _native.fail(fault, nth)
            with pytest.raises(EdgeError, match="failed"):
                texts(model, 20)  # a resident expert needs no copy, so the nth may come in a later text
            assert text(model) == expected, f"{fault} {nth}"
        assert held() == before
        assert (model.stats().experts.failed > 0) == (fault == "copy")


def test_a_failed_prefetch_is_dropped_and_its_expert_fetched(bundled: tuple[Path, Path], twin: Path) -> None:
    with speculation.llm(bundled[0], draft=twin, resident="1/4", draft_tokens=2, deterministic=True) as model:
        expected = text(model)
        prefetched = model.stats().experts.prefetched
        assert prefetched
    with speculation.llm(bundled[0], draft=twin, resident="1/4", draft_tokens=2, deterministic=True) as model:
        for _ in range(40):
            _native.fail("copy", 1)
            model._hook.prefetch(one_absent_expert(model))
        assert text(model) == expected
        assert model.stats().experts.failed >= 39


def one_absent_expert(model: EdgeLlama) -> Any:
    import numpy as np

    block, expert = np.argwhere(model._hook.states() == 0)[0]
    return np.array([(block, expert, 99, 1.0)], dtype=_native.PREFETCH_REQUEST)


def test_a_callback_that_raises_ends_its_request_only(bundled: tuple[Path, Path]) -> None:
    class Broken(Exception):
        pass

    def processor(calls: list[int]) -> Any:
        def process(ids: Any, scores: Any) -> Any:
            calls.append(1)
            if len(calls) == 5:
                raise Broken
            return scores

        return process

    with speculation.llm(bundled[0], draft=bundled[1], resident="1/2", draft_tokens=2) as model:
        expected = text(model)
        for kind in ("logits_processor", "stopping_criteria"):
            callback = processor([]) if kind == "logits_processor" else stopper([], Broken)
            with pytest.raises(Broken):
                model.create_completion(PROMPT, max_tokens=24, temperature=0.0, **{kind: callback})
            assert text(model) == expected


def stopper(calls: list[int], error: type[Exception]) -> Any:
    def stop(ids: Any, logits: Any) -> bool:
        calls.append(1)
        if len(calls) == 5:
            raise error
        return False

    return stop


class Flaky(io.FileIO):
    """A file whose nth read fails, or returns half of what it should."""

    reads = nth = 0
    short = False

    def read(self, size: int | None = -1, /) -> Any:
        Flaky.reads += 1
        if Flaky.reads == Flaky.nth and not Flaky.short:
            raise OSError(5, "Input/output error")
        data = super().read(-1 if size is None else size)
        return data[: len(data) // 2] if Flaky.reads == Flaky.nth else data


@pytest.mark.parametrize("short", [False, True])
def test_every_read_of_a_header_may_fail_or_be_short(
    bundled: tuple[Path, Path], short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = container.read(bundled[0])
    monkeypatch.setattr(container, "FIRST_READ", 1000)  # so that there are several
    monkeypatch.setattr(Path, "open", lambda path, mode: Flaky(path))
    Flaky.short, Flaky.nth, Flaky.reads = short, 0, 0
    assert container.read(bundled[0]) == expected
    n_reads = Flaky.reads
    assert n_reads > 3
    for nth in range(1, n_reads + 1):
        Flaky.nth, Flaky.reads = nth, 0
        with pytest.raises(EdgeError, match="cannot be read"):
            container.read(bundled[0])
