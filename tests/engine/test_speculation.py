"""Speculation never changes the text: greedy and sampled, any draft, any K, any placement of the experts."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
from support.speculation import llm, prompts, texts

from edge_speq import EdgeLlama
from edge_speq.drafting import draft_model
from edge_speq.engine import generation
from edge_speq.engine.draft_length.controller import BACK_OFF, FIRST, TRIAL_MOST
from edge_speq.gguf import bundled as demo


@pytest.fixture(scope="module")
def greedy(bundled: tuple[Path, Path]) -> list[str]:
    with llm(bundled[0]) as plain:
        return texts(plain, prompts()[:12])


@pytest.mark.parametrize("k", [1, 4, 8])
def test_greedy_text_equals_the_text_without_a_draft(bundled: tuple[Path, Path], greedy: list[str], k: int) -> None:
    target, draft = bundled
    with llm(target, draft=draft, draft_tokens=k) as speculating:
        assert texts(speculating, prompts()[:12]) == greedy
        stats = speculating.stats()
    assert stats.speculation.accepted > 0
    assert stats.speculation.accepted < stats.speculation.drafted


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "repeat_penalty": 1.2}, {"temperature": 2.0, "min_p": 0.0}])
def test_sampled_text_equals_the_text_without_a_draft(bundled: tuple[Path, Path], options: dict[str, float]) -> None:
    """Sample and match draws the same random numbers as decoding token by token."""
    target, draft = bundled
    sampling = {"temperature": 0.9, "seed": 5} | options
    with llm(target) as plain, llm(target, draft=draft, draft_tokens=4) as speculating:
        assert texts(speculating, prompts()[:6], **sampling) == texts(plain, prompts()[:6], **sampling)
        assert speculating.stats().speculation.drafted > 0


def test_a_twin_draft_is_seen_through_its_routing(tiny) -> None:
    """The model as its own draft: every guess is right, and the experts of all drafted tokens but the last are seen."""
    model = tiny.moe("qwen3moe")
    # room for every expert of all blocks, but only demanded or foreseen ones get in
    with llm(model, draft=model, resident=1.0, policy="lru", draft_tokens=4) as blind:
        expected = texts(blind, ["ab", "cd"])
        assert blind.stats().foresight == "none"
        assert blind.stats().experts.prefetched == 0
    with llm(model, draft=model, resident="3/4", draft_tokens=4) as seeing:
        assert texts(seeing, ["ab", "cd"]) == expected
        stats = seeing.stats()
    assert stats.foresight == "twin"
    assert stats.speculation.acceptance > 0.95  # the end of a completion may cut a verified run
    assert stats.experts.prefetched > 0
    assert stats.experts.prefetched_used <= stats.experts.prefetched


def test_misses_and_transfers_add_up(bundled: tuple[Path, Path]) -> None:
    target, draft = bundled
    with llm(target, draft=draft, resident="1/4", draft_tokens=4) as model:
        texts(model, prompts()[:4])
        stats = model.stats()
    experts = stats.experts
    assert experts.misses == experts.fetched + experts.cpu_computed
    assert experts.late <= experts.fetched
    assert experts.bytes_wasted <= experts.bytes_fetched
    assert experts.slots == sum(stats.plan.slots) <= experts.total / 4


def test_bytes_are_those_of_the_transfers(tiny) -> None:
    model = tiny.moe("qwen3moe")
    with llm(model, draft=model, resident="3/4", draft_tokens=4) as twin:
        texts(twin, ["ab", "cd"])
        stats = twin.stats()
    assert len(stats.plan.slots) == 1  # one group: every expert has the same size
    loads = stats.experts.fetched - stats.experts.late + stats.experts.prefetched
    assert stats.experts.bytes_fetched == loads * stats.plan.slot_bytes / stats.experts.slots


def test_foresight_beats_lru_where_lru_thrashes(bundled: tuple[Path, Path]) -> None:
    """A third of the experts and K = 4: one step demands more than the slots hold. Counters, not times."""
    target, draft = bundled
    misses = {}
    for policy in ("lru", "auto"):
        with llm(target, draft=draft, resident="1/3", draft_tokens=4, policy=policy) as model:
            texts(model, prompts()[:3])
            misses[policy] = model.stats().experts.misses
    assert misses["auto"] < 0.9 * misses["lru"]


class FakeTime:
    """Seconds that pass in verify steps only: one each, and `extra` for every drafted token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, extra: float) -> None:
        self.now, self.widths = 0.0, []
        extend = EdgeLlama.extend

        def timed(model: EdgeLlama, text: list[int], drafted: list[int]) -> None:
            extend(model, text, drafted)
            self.now += 1 + extra * len(drafted)
            self.widths.append(len(drafted))

        monkeypatch.setattr(EdgeLlama, "extend", timed)
        monkeypatch.setattr(generation.Generation, "clock", lambda _: self.now)


@pytest.mark.parametrize(("extra", "pays"), [(0.01, True), (3.0, False)])
def test_auto_drafts_as_long_as_it_pays(tiny, monkeypatch: pytest.MonkeyPatch, extra: float, pays: bool) -> None:
    """The model as its own draft, always right. Off, it decodes nothing and foresees nothing."""
    model = tiny.moe("qwen3moe")
    decoded: list[int] = []
    decode = draft_model.DraftModel._decode
    monkeypatch.setattr(
        draft_model.DraftModel, "_decode", lambda self, tokens: [decoded.append(len(tokens)), decode(self, tokens)]
    )
    with llm(model) as plain, llm(model, draft=model, resident="3/4") as speculating:
        expected = [t for t, _ in zip(plain.generate([5, 6], temp=0.0), range(100), strict=False)]
        fake = FakeTime(monkeypatch, extra)
        assert [t for t, _ in zip(speculating.generate([5, 6], temp=0.0), range(100), strict=False)] == expected
        stats = speculating.stats()
    on = [width > 0 for width in fake.widths[1:]]
    assert not any(on[: FIRST + 1])  # what a step costs without a draft
    assert on[FIRST + 1]
    assert stats.speculation.drafted == sum(fake.widths)
    assert stats.speculation.steps == len(on)
    assert max(decoded) >= FIRST  # what the draft missed is read at once, the last one alone, for its routing
    if pays:
        assert sum(on[2 * FIRST :]) > 0.6 * len(on[2 * FIRST :])
    else:
        assert sum(on) <= TRIAL_MOST and not any(on[-BACK_OFF:])


@pytest.mark.parametrize(("extra", "pays"), [(0.01, True), (3.0, False)])
def test_a_draft_reads_a_long_text_only_where_a_glance_leaves_hope(
    tiny, monkeypatch: pytest.MonkeyPatch, extra: float, pays: bool
) -> None:
    """At a glance it reads the last token, and is mostly wrong. Texts stay what they are."""
    model, prompt = tiny.moe("qwen3moe"), [5 + i % 50 for i in range(60)]
    decoded: list[int] = []
    decode = draft_model.DraftModel._decode
    monkeypatch.setattr(
        draft_model.DraftModel, "_decode", lambda self, tokens: [decoded.append(len(tokens)), decode(self, tokens)]
    )
    with llm(model) as plain, llm(model, draft=model, resident="3/4") as speculating:
        expected = [t for t, _ in zip(plain.generate(prompt, temp=0.0), range(100), strict=False)]
        fake = FakeTime(monkeypatch, extra)
        assert [t for t, _ in zip(speculating.generate(prompt, temp=0.0), range(100), strict=False)] == expected
        governor = speculating._speculator._governor
        alive = weakref.ref(speculating._speculator)
    assert decoded and decoded[0] == 1
    assert (max(decoded) >= len(prompt)) == pays
    assert any(width > 0 for width in fake.widths[1:])
    del speculating
    assert alive() is None and governor.unread() == 0  # no cycle keeps the draft


def test_a_fixed_number_of_draft_tokens_stays_whatever_it_costs(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.moe("qwen3moe")
    with llm(model, draft=model, resident=1.0, policy="lru", draft_tokens=3) as speculating:
        fake = FakeTime(monkeypatch, 50.0)
        list(zip(speculating.generate([5, 6], temp=0.0), range(80), strict=False))
    assert set(fake.widths[1:]) == {3}


def test_auto_does_without_a_draft_that_leaves_too_few_slots(bundled: tuple[Path, Path]) -> None:
    target, draft = bundled
    with llm(target, draft=draft, resident="1/2", vram_budget="1GiB") as whole:
        plan = whole.stats().plan
    with llm(target, resident="1/2", vram_budget="1GiB") as alone:
        draft_bytes = plan.fixed_bytes - alone.stats().plan.fixed_bytes
    assert draft_bytes > 0
    expert = plan.slot_bytes // sum(plan.slots)
    budget = plan.fixed_bytes + 6 * expert  # one token wants 5 slots, two want 9
    with llm(target, draft=draft, resident="1/2", vram_budget=budget) as model:
        stats = model.stats()
        text = texts(model, prompts()[:1])
    assert stats.plan.max_draft_tokens == 0
    assert "with a draft the slots would be too few" in stats.plan.reason
    assert plan.fixed_bytes - draft_bytes < stats.used_bytes <= budget
    with llm(target) as plain:
        assert text == texts(plain, prompts()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 4, 8])
def test_greedy_text_on_a_hundred_prompts(bundled: tuple[Path, Path], k: int) -> None:
    target, draft = bundled
    asked = [*prompts(), demo.PROMPT, "def main() -> None:"]
    assert len(asked) == 100
    with llm(target) as plain, llm(target, draft=draft, draft_tokens=k) as speculating:
        assert texts(speculating, asked) == texts(plain, asked)
