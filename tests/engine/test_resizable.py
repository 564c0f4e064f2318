"""Slots that change while a model is loaded: by hand, in the middle of a text, and by a shared budget."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from support import speculation

from edge_speq import Budget, EdgeError, EdgeLlama, _native

PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"max_tokens": 40, "temperature": 0.0}


@pytest.fixture
def pair(bundled: tuple[Path, Path]) -> Iterator[EdgeLlama]:
    with speculation.llm(bundled[0], draft=bundled[1], resident="1/2", draft_tokens="auto") as model:
        yield model


def text(model: EdgeLlama) -> str:
    model.reset()
    return str(model.create_completion(PROMPT, **GREEDY)["choices"][0]["text"])


def test_slots_shrink_and_grow_between_requests(pair: EdgeLlama) -> None:
    before, expected = pair.memory_used(), text(pair)
    half = pair.stats().plan
    small = pair.resize(resident="1/4")
    assert (small.slot_bytes, small.max_draft_tokens) < (half.slot_bytes, half.max_draft_tokens)
    assert pair.memory_used() == before - (half.slot_bytes - small.slot_bytes)
    assert text(pair) == expected
    stats = pair.stats()
    assert stats.plan == small
    assert stats.experts.slots == sum(small.slots)
    assert pair.resize(resident=1.0).max_draft_tokens == half.max_draft_tokens  # the routing has room for no more
    assert text(pair) == expected
    assert pair.resize(vram_budget=before).slot_bytes <= half.slot_bytes
    assert pair.memory_used() <= before


def test_slots_shrink_in_the_middle_of_a_text(pair: EdgeLlama) -> None:
    prompt = pair.tokenize(PROMPT.encode())
    expected = list(itertools.islice(pair.generate(prompt, temp=0.0), 40))
    pair.reset()
    got = []
    for i, token in enumerate(itertools.islice(pair.generate(prompt, temp=0.0), 40)):
        got.append(token)
        if i % 8 == 3:
            pair.resize(resident=("1/4", "1/3", "1/2")[i // 8 % 3])
    assert got == expected


def test_another_thread_may_shrink_the_slots_while_a_text_is_generated(pair: EdgeLlama) -> None:
    expected, plans, failures, done = text(pair), [], [], threading.Event()

    def squeeze() -> None:
        try:
            while not done.is_set():
                plans.extend(pair.resize(resident=share) for share in ("1/4", "1/2"))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=squeeze)
    thread.start()
    texts = [text(pair) for _ in range(5)]
    done.set()
    thread.join()
    assert texts == [expected] * 5
    assert not failures
    assert len(plans) > 2


def test_impossible_bounds_change_nothing(pair: EdgeLlama) -> None:
    held, made = pair.memory_used(), pair.stats().plan
    for bounds in ({"resident": 0.001}, {"vram_budget": "1MiB"}):
        with pytest.raises(EdgeError, match=r"at least|smallest possible"):
            pair.resize(**bounds)
    assert (pair.memory_used(), pair.stats().plan) == (held, made)


def test_models_without_slots_have_none_to_resize(bundled: tuple[Path, Path]) -> None:
    with speculation.llm(bundled[0], resident=None, policy="all") as model, pytest.raises(EdgeError, match="no slots"):
        model.resize(resident="1/2")


def test_slots_that_cannot_be_allocated_leave_a_model_that_works(pair: EdgeLlama) -> None:
    expected = text(pair)
    _native.fail("allocation", 1)
    with pytest.raises(EdgeError, match=r"cannot allocate|failed"):
        pair.resize(resident="1/4")
    assert text(pair) == expected  # experts on the CPU
    assert pair.stats().experts.slots == 0
    pair.resize(resident="1/4")
    assert text(pair) == expected
    assert pair.stats().experts.slots > 0


# --- one budget for several models ------------------------------------------------------------------------


def open_model(path: Path, budget: Budget, **options: Any) -> contextlib.AbstractContextManager[EdgeLlama]:
    return contextlib.closing(EdgeLlama(str(path), vram_budget=budget, n_ctx=256, n_threads=2, **options))


def test_models_share_a_budget_and_return_it(bundled: tuple[Path, Path]) -> None:
    budget = Budget("24MiB")
    with open_model(bundled[0], budget) as first:
        expected, alone = text(first), first.memory_used()
        with open_model(bundled[0], budget) as second:
            assert first.memory_used() + second.memory_used() <= budget.bytes
            assert first.memory_used() < alone
            assert abs(first.stats().plan.slot_bytes - second.stats().plan.slot_bytes) < 2**18
            assert text(first) == text(second) == expected
        assert first.memory_used() == alone
        assert text(first) == expected


def test_a_model_that_does_not_fit_is_refused_and_the_others_keep_their_slots(bundled: tuple[Path, Path]) -> None:
    budget = Budget("14MiB")
    with open_model(bundled[0], budget) as first:
        alone = first.memory_used()
        with pytest.raises(EdgeError, match="MiB"), open_model(bundled[0], budget):
            pass
        gc.collect()
        assert first.memory_used() == alone


def test_two_models_that_load_at_once_stay_within_the_budget(bundled: tuple[Path, Path]) -> None:
    budget = Budget("26MiB")
    with contextlib.ExitStack() as stack:
        models, failures = [], []

        def load() -> None:
            try:
                models.append(stack.enter_context(open_model(bundled[0], budget)))
            except EdgeError as error:
                failures.append(error)

        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert sum(model.memory_used() for model in models) <= budget.bytes
        assert text(models[0]) == text(models[1])


def test_a_resize_cannot_break_a_budget(bundled: tuple[Path, Path]) -> None:
    budget = Budget("24MiB")
    with open_model(bundled[0], budget) as first, open_model(bundled[0], budget) as second:
        first.resize(resident=1.0)
        first.resize(vram_budget="1GiB")
        assert first.memory_used() + second.memory_used() <= budget.bytes
    with contextlib.closing(EdgeLlama(str(bundled[0]), vram_budget="12MiB", n_ctx=256)) as model:
        model.resize(resident=1.0)
        assert model.memory_used() <= 12 << 20
        with pytest.raises(EdgeError, match="needs a bound"):
            model.resize()


def test_a_model_that_is_collected_while_another_loads_leaves_its_bytes(bundled: tuple[Path, Path]) -> None:
    budget = Budget("24MiB")
    lost = EdgeLlama(str(bundled[0]), vram_budget=budget, n_ctx=256)
    lost.itself = lost  # only the collector finds it
    del lost
    gc.collect()
    with open_model(bundled[0], budget) as model:
        assert model.memory_used() > budget.bytes * 0.8


def test_closed_models_say_so_and_other_threads_may_ask_until_then(bundled: tuple[Path, Path]) -> None:
    for _ in range(10):
        model = EdgeLlama(str(bundled[0]), resident="1/2", n_ctx=64)
        asked, failures = threading.Event(), []

        def ask(model: EdgeLlama = model, asked: threading.Event = asked, failures: list[Any] = failures) -> None:
            try:
                for _ in range(200):
                    model.stats()
                    asked.set()
                    model.resize(resident="1/4")
            except EdgeError:
                pass  # closed
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        asked.wait()
        model.close()
        thread.join()
        assert not failures
        for call in (model.save_state, model.memory_used, lambda model=model: model.resize(resident="1/4")):
            with pytest.raises(EdgeError, match="closed"):
                call()
        assert model.stats().used_bytes == 0


def test_a_budget_needs_a_size() -> None:
    for size in ("much", "-1"):
        with pytest.raises(EdgeError):
            Budget(size)


@pytest.mark.parametrize("resizes", [True, False])
@pytest.mark.parametrize("where", ["llama_decode", "llama_synchronize"])  # native calls that Ctrl-C is raised after
def test_a_step_that_ctrl_c_left_is_ended_before_slots_go_and_before_the_next(
    pair: EdgeLlama, where: str, resizes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, native = text(pair), getattr(llama_cpp, where)

    def interrupted(*arguments: Any) -> Any:
        native(*arguments)
        monkeypatch.undo()
        raise KeyboardInterrupt

    pair.reset()
    monkeypatch.setattr(llama_cpp, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        text(pair)
    hook = pair._hook
    assert hook is not None
    assert hook.decoding is (where == "llama_synchronize")  # then the end itself was left out
    if resizes:
        pair.resize(resident="1/8")
        assert not hook.decoding
    ended: list[bool] = []
    forsake = hook.abandon_step
    monkeypatch.setattr(hook, "abandon_step", lambda: ended.append(hook.decoding) or forsake())
    assert text(pair) == expected
    assert ended == ([] if resizes or where == "llama_decode" else [True])  # before the next one begins
