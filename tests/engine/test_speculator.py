"""Policies in the engine: they may be anybody's, and look further than the tokens that are drafted."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from support.speculation import llm, prompts, texts

from edge_speq import EdgeError, EdgeLlama
from edge_speq.core import POLICIES, SLOT_POLICIES
from edge_speq.engine.draft_length.lookahead_depth import PERIOD, TRIAL, LookaheadDepth
from edge_speq.policies import registry
from edge_speq.policies.base import Policy
from edge_speq.policies.published.draft_lengths import Cascade, Roofline

NEEDY = ("moe-prism", "moe-spec", "learned", "oracle")  # experts in parts, a text that may change, files of foresight

# --- policies -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(bundled: tuple[Path, Path]) -> list[str]:
    with llm(bundled[0], policy="lru", draft_tokens=0) as plain:
        return texts(plain, prompts()[:3])


@pytest.mark.parametrize("policy", [name for name in SLOT_POLICIES if name not in NEEDY])
def test_every_policy_writes_the_same_text(
    bundled: tuple[Path, Path], twin: Path, expected: list[str], policy: str
) -> None:
    with llm(bundled[0], draft=twin, draft_tokens=2, policy=policy) as model:
        assert texts(model, prompts()[:3]) == expected
        stats = model.stats()
    assert (stats.policy, stats.policy_failures) == (policy, 0)
    counts, none = ("lfru", "moe-spac"), ("lru", "cascade", "specmoeoff")
    assert stats.foresight == ("counts" if policy in counts else "none" if policy in none else "twin")
    e = stats.experts
    assert e.misses == e.fetched + e.cpu_computed
    if policy == "moe-spac":  # what is missing is computed; only a prefetch under way that a block waits for is fetched
        assert e.cpu_computed and e.fetched <= e.late
    else:
        assert e.fetched and not e.cpu_computed
    if policy in ("auto", "twin", "waits", "moe-speq", "sp-moe", "specmoeoff", "moe-spac"):
        assert e.prefetched


@pytest.mark.parametrize(("policy", "governor"), [("cascade", Cascade), ("moe-speq", Roofline)])
def test_a_published_governor_chooses_lengths_that_are_not_fixed(
    bundled: tuple[Path, Path], twin: Path, expected: list[str], policy: str, governor: type
) -> None:
    with llm(bundled[0], draft=twin, policy=policy) as model:
        made = model._speculator._policy
        assert made is not None and isinstance(made.governor, governor)
        assert texts(model, prompts()[:3]) == expected
        assert 0 < model.stats().speculation.mean_draft_tokens <= model.stats().plan.max_draft_tokens
        if policy == "moe-speq":  # its costs are this machine's by now
            assert isinstance(made.governor, Roofline) and made.governor.draft_ms == made.context.draft_ms > 0
    for options in ({"draft_tokens": 1}, {"deterministic": True}):
        with llm(bundled[0], draft=twin, policy=policy, **options) as model:
            made = model._speculator._policy
            assert made is not None and (made.governor is None) == (policy == "cascade" or "draft_tokens" in options)


def test_every_preset_can_be_asked_for() -> None:
    assert set(registry.PRESETS) <= set(POLICIES)


@pytest.mark.parametrize(("policy", "on_miss"), [("moe-spac", "fetch"), ("moe-speq", "hybrid"), ("lru", "hybrid")])
def test_where_a_published_system_computes_is_part_of_it(bundled: tuple[Path, Path], policy: str, on_miss: str) -> None:
    with pytest.raises(EdgeError, match=policy), llm(bundled[0], policy=policy, on_miss=on_miss):
        pass


def test_without_a_twin_its_policies_say_that_they_are_lru(
    bundled: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with llm(bundled[0], draft=bundled[1], draft_tokens=1, policy="sp-moe") as model:
        assert "sp-moe looks at the routing of a low-bit copy" in caplog.text
        assert model.stats().foresight == "none"
    with llm(bundled[0], draft=bundled[1], draft_tokens=1) as model:
        assert model.stats().foresight == "counts"  # auto: waits needs a twin


class Broken(Policy):
    """Fetches as it likes until it raises, or spoils the scores, at its third step."""

    name = "broken"
    is_timed = False  # it is its own governor
    where = ""

    def __init__(self, setting: registry.PolicyContext) -> None:
        super().__init__(setting)
        self._steps = 0
        if self.where == "governor":
            self.governor = self

    def _fail(self, where: str) -> None:
        if where == self.where and self._steps > 2:
            raise ZeroDivisionError("by me")

    def ahead(self, n_drafted: int) -> int:
        self._fail("ahead")
        return 2

    def on_draft_token(self, slots: registry.Slots, draft_routing: Any) -> None:
        self._fail("on_draft_token")

    def plan_prefetch(self, slots: registry.Slots, draft_routing: Any, n_drafted: int) -> None:
        self._steps += 1
        slots.scores[:] = np.nan if self.where == "scores" and self._steps > 2 else self._steps
        self._fail("plan_prefetch")

    def observe(self, routing: Any, *_: Any, **__: Any) -> None:
        self._fail("observe")

    def k(self) -> int:
        self._fail("governor")
        return 2


@pytest.mark.parametrize("where", ["ahead", "on_draft_token", "plan_prefetch", "scores", "observe", "governor"])
def test_a_policy_that_fails_costs_no_request(
    bundled: tuple[Path, Path],
    twin: Path,
    expected: list[str],
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Broken, "where", where)
    monkeypatch.setitem(registry.PRESETS, "waits", Broken)
    options = {} if where == "governor" else {"draft_tokens": 2}
    with llm(bundled[0], draft=twin, policy="waits", **options) as model, caplog.at_level(logging.WARNING):
        assert texts(model, prompts()[:3]) == expected
        stats = model.stats()
        assert model._hook is not None and not model._hook.scores.any()
    assert (stats.policy, stats.foresight, stats.policy_failures) == ("lru", "none", 1)
    assert stats.to_dict()["experts"]["policy_failures"] == 1
    assert [r.getMessage().split(":")[0] for r in caplog.records if "failed" in r.getMessage()] == [
        "policy broken failed, lru takes over"
    ]


# --- how far a draft looks ----------------------------------------------------------------------------------


def shown(model: EdgeLlama, prompt: str, n: int) -> list[tuple[int, int, np.ndarray | None]]:
    """Each call's k, tokens further, and the routing that it gave."""
    draft, calls = model._speculator._draft, []
    assert draft is not None
    propose = draft.propose

    def noted(text: Any, k: int, sampler: Any, ahead: int = 0, seen: Any = None) -> Any:
        drafted, routing = propose(text, k, sampler, ahead, seen)
        calls.append((len(drafted), ahead, None if routing is None else routing.copy()))
        return drafted, routing

    draft.propose = noted  # type: ignore[method-assign]
    model.create_completion(prompt, max_tokens=n, temperature=0.0)
    return calls


@pytest.mark.parametrize("k", [1, 2])
def test_the_draft_routes_two_steps_from_the_first_on(bundled: tuple[Path, Path], twin: Path, k: int) -> None:
    """Also after a prompt that is wider than the graphs whose routing is seen."""
    with llm(bundled[0], draft=twin, draft_tokens=k, deterministic=True) as model:
        calls = shown(model, prompts()[0], 24)
        quality = model._speculator.quality
    assert len(prompts()[0]) > 60 and len(calls) > 6
    for drafted, ahead, routing in calls:
        assert (drafted, ahead) == (k, k + 2)
        assert routing is not None and routing.shape[1] == 2 * k + 2
    assert quality is not None and quality.precision.min() > 0.5 and quality.recall.min() > 0.5


def test_the_routing_is_that_of_the_tokens(bundled: tuple[Path, Path]) -> None:
    """The target as its own twin foresees its own routing exactly, for as long as its guesses are right."""
    with llm(bundled[0], draft=bundled[0], draft_tokens=2, deterministic=True) as model:
        calls = shown(model, prompts()[1], 30)
        quality = model._speculator.quality
    assert quality is not None
    np.testing.assert_array_equal(quality.precision, 1.0)
    np.testing.assert_array_equal(quality.recall, 1.0)
    for (_, _, before), (_, _, after) in itertools.pairwise(calls[:-1]):  # all accepted: three tokens on
        assert before is not None and after is not None
        np.testing.assert_array_equal(before[:, 3:], after[:, :3])


def test_the_draft_stops_at_the_end_of_its_context(bundled: tuple[Path, Path], twin: Path) -> None:
    options: dict[str, Any] = {"max_tokens": None, "temperature": 0.0, "logit_bias": {0: -100, 2: -100}}
    with llm(bundled[0], n_ctx=256) as plain, llm(bundled[0], n_ctx=256, draft=twin, draft_tokens=4) as model:
        model._speculator.depth.limit = lambda wanted: wanted  # type: ignore[method-assign]
        ends = [one("Once", **options) for one in (plain, model)]
    assert ends[0]["choices"] == ends[1]["choices"] and ends[1]["usage"]["total_tokens"] == 256


def test_only_a_twin_looks_further(bundled: tuple[Path, Path]) -> None:
    with llm(bundled[0], draft=bundled[1], draft_tokens=2, deterministic=True) as model:
        assert {ahead for _, ahead, _ in shown(model, prompts()[0], 12)} == {0}


def test_a_processor_in_python_is_asked_for_text_alone(bundled: tuple[Path, Path], twin: Path) -> None:
    """Looking further draws no token of the target's sampler, and the text stays what it is."""
    seen: list[int] = []

    def process(ids: Any, scores: Any) -> Any:
        seen.append(len(ids))
        return scores

    processors = llama_cpp.LogitsProcessorList([process])
    options: dict[str, Any] = {"max_tokens": 16, "temperature": 0.8, "seed": 4, "logits_processor": processors}
    with llm(bundled[0]) as plain, llm(bundled[0], draft=twin, draft_tokens=2, deterministic=True) as model:
        made = []
        for one in (plain, model):
            made.append((one.create_completion(prompts()[0], **options)["choices"], list(seen)))
            seen.clear()
    assert made[0] == made[1]


# --- how far it pays ----------------------------------------------------------------------------------------


def settled(token: float, stall: list[float], n: int = 12000, k: int = 2) -> list[int]:
    """The depth at each step when a token further takes `token` seconds and leaves stall[depth], with noise."""
    depth, random, taken = LookaheadDepth(fixed=False), np.random.default_rng(3), []
    for _ in range(n):
        now = depth.limit(k + 2)
        depth.observe(k, (k + now) * token + stall[now] * float(random.normal(1.0, 0.1)))
        taken.append(now)
    return taken


def test_the_depth_follows_what_pays() -> None:
    stall = [10.0, 7.0, 5.5, 4.8, 4.5]
    assert settled(0.01, stall)[0] == 1
    assert np.mean(settled(0.01, stall)[-4000:]) > 3.0
    assert np.median(settled(1.0, stall)[-4000:]) == 2  # the third token saves 0.7
    dear = settled(5.0, stall)
    assert np.mean(np.array(dear[-4000:]) == 0) > 0.95  # trials are ever rarer
    assert max(dear) <= 2


def test_the_depth_is_measured_at_one_length() -> None:
    depth = LookaheadDepth(fixed=False)
    for step in range(8 * (PERIOD + TRIAL)):
        depth.limit(4)
        depth.observe(2, 1.0)
        if step % 3 == 0:
            depth.observe(1, 1000.0)  # shorter steps now and then say nothing
            depth.observe(0, 1000.0)
    assert depth.depth == 1


def test_virtual_time_decides_nothing() -> None:
    depth = LookaheadDepth(fixed=True)
    for _ in range(500):
        depth.observe(2, 9.0)
    assert depth.limit(4) == 4
