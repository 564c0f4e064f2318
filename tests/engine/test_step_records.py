"""on_step: a record of each verify step, and what an exception of it does."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_speq import EdgeLlama
from edge_speq.engine.step_records import StepRecord

PROMPT = "The old house stood at the end of the lane, and"


@contextlib.contextmanager
def watched(bundled: tuple[Path, Path], on_step: Any, **options: Any) -> Iterator[EdgeLlama]:
    options = {"resident": "1/2", "draft": bundled[1], "draft_tokens": 3, "n_ctx": 512, "n_threads": 1} | options
    with contextlib.closing(EdgeLlama(str(bundled[0]), on_step=on_step, **options)) as model:
        yield model


def test_the_records_add_up_to_the_counters(bundled: tuple[Path, Path]) -> None:
    records: list[StepRecord] = []
    with watched(bundled, records.append) as model:
        for n in (20, 1):
            model.create_completion(PROMPT, max_tokens=n, temperature=0.0)
        stats = model.stats()
    assert [record.is_prompt for record in records].count(True) == 2
    assert records[0].is_prompt and records[0].tokens == stats.timing.n_prompt // 2 and records[0].drafted == 0
    for name in ("hits", "misses", "fetched", "bytes_fetched", "cpu_computed"):
        assert sum(getattr(record, name) for record in records) == getattr(stats.experts, name), name
    assert sum(record.stall_ms for record in records) == pytest.approx(stats.experts.stall_ms)
    for name in ("drafted", "accepted"):
        assert sum(getattr(record, name) for record in records) == getattr(stats.speculation, name)
    assert all(record.tokens == 1 + record.drafted for record in records if not record.is_prompt)
    assert all(0 <= record.accepted <= record.drafted for record in records)
    assert all(record.seconds > 0 for record in records)


def test_the_text_and_the_counters_are_the_same_without_it(bundled: tuple[Path, Path]) -> None:
    told = []
    for on_step in (None, lambda _: None):
        with watched(bundled, on_step, deterministic=True) as model:
            text = model.create_completion(PROMPT, max_tokens=24, temperature=0.8, seed=3)["choices"][0]["text"]
            told.append((text, model.stats().experts))
    assert told[0] == told[1]


def test_without_slots_demands_are_none(bundled: tuple[Path, Path]) -> None:
    records: list[StepRecord] = []
    with watched(bundled, records.append, resident=None, policy="all") as model:
        model.create_completion(PROMPT, max_tokens=6)
    assert {(record.hits, record.misses, record.cpu_computed) for record in records} == {(None, None, None)}
    assert all(record.bytes_fetched == 0 for record in records)


class Failure(Exception):
    pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fatal", [0, 2, "last"])
def test_an_exception_ends_the_request_and_the_model_goes_on(
    bundled: tuple[Path, Path], fatal: int | str, stream: bool
) -> None:
    """Also that of the last step, which is settled while the generator is being closed."""
    seen: list[StepRecord] = []
    limit = 10

    def on_step(record: StepRecord) -> None:
        seen.append(record)
        done = sum(r.accepted + 1 for r in seen)
        if len(seen) - 1 == fatal or (fatal == "last" and done >= limit):
            raise Failure(str(fatal))

    with watched(bundled, on_step, draft_tokens=0) as model:
        with pytest.raises(Failure, match=str(fatal)):
            list(model.create_completion(PROMPT, max_tokens=limit, temperature=0.0, stream=stream))
        fatal = -1
        assert model.create_completion(PROMPT, max_tokens=4)["usage"]["completion_tokens"] == 4


def test_a_later_request_hears_nothing_of_an_earlier_error(bundled: tuple[Path, Path]) -> None:
    fails = True

    def on_step(_: StepRecord) -> None:
        if fails:
            raise Failure

    with watched(bundled, on_step, draft_tokens=0) as model:
        stream = model.generate(model.tokenize(PROMPT.encode()))
        next(stream)
        stream.close()
        fails = False
        assert model.create_completion(PROMPT, max_tokens=4)["usage"]["completion_tokens"] == 4


def test_a_record_is_frozen_and_can_be_sent_to_another_process() -> None:
    record = StepRecord(2, 1, 1, 3, 4, 4, 0, 100, 0.5, 0.0, 0.01, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.tokens = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(record)) == record
