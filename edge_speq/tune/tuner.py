"""Tune the options of a model within bounds: measure costs, predict candidates, check the best ones."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edge_speq import system
from edge_speq import texts as prompts
from edge_speq.engine.step_records import StepRecord
from edge_speq.errors import EdgeError
from edge_speq.planning import profile as profiles
from edge_speq.planning.profile import TuneProfile
from edge_speq.policies.context import PolicyContext
from edge_speq.simulate.costs import StepCosts
from edge_speq.trace import Step
from edge_speq.tune import measure, predict
from edge_speq.tune.measure import FEWEST_TOKENS, MOST_TOKENS, PROMPT_TOKENS, DraftValue, Gauge, Live, Trial
from edge_speq.tune.predict import Candidate, Hybrid, Measured
from edge_speq.units import parse_share

LINK_FALLBACK = 12_500_000_000  # bytes per second, if no transfer could be measured


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """Model files, bounds, and arguments of llama_cpp.Llama of one tuning."""

    model: str
    draft: str | None = None
    bounds: dict[str, Any] = dataclasses.field(default_factory=dict)  # resident, vram_budget
    llama: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 150.0  # time limit; parts that do not fit are skipped and reported
    must_draft: bool = False  # consider only candidates with draft tokens: choose_draft tunes "no draft" separately


@dataclass(slots=True)
class _Recording:
    """Measurements and recorded steps of the first load."""

    measured: Measured
    steps: list[Step]
    setting: PolicyContext | None
    resident: float | None
    resident_alone: float | None
    load_seconds: float


@dataclass(slots=True)
class _Checked:
    chosen: dict[str, Any]
    predicted_tok_per_s: float | None = None  # None for the defaults, which are not predicted
    trial: Trial | None = None

    @property
    def tok_per_s(self) -> float | None:
        return None if self.trial is None else self.trial.tok_per_s

    @property
    def prediction_error(self) -> float | None:
        if self.predicted_tok_per_s is None or not self.tok_per_s:
            return None
        return self.predicted_tok_per_s / self.tok_per_s - 1


class Tuner:
    def __init__(self, request: TuneOptions, say: Callable[[str], None] = lambda _: None) -> None:
        self._request, self._say = request, say
        self._until = time.monotonic() + request.seconds
        self._skipped: list[str] = []
        self._texts = [prompt.text for prompt in prompts.bundled(1).chosen]
        self.n = FEWEST_TOKENS  # tokens to generate after each prompt
        self.draft_value: DraftValue | None = None  # set by `run`
        self.trial_seconds = 0.0  # expected time of one trial
        self.best: Trial | None = None  # trial of the chosen options, None if there was no time for it

    def run(self) -> TuneProfile:
        """Return the profile. Takes about the given time, unless loading the model takes longer.

        Raises EdgeError if the model cannot be loaded with these options.
        """
        made_for = profiles.key(self._request.model, self._request.draft)
        recording = self._record()
        measured = recording.measured
        if recording.setting is not None:
            measured = dataclasses.replace(measured, hybrid=self._hybrid(recording))
        n_threads = predict.best_threads(measured)
        scaled = predict.scaled(measured, n_threads)
        ranked = predict.candidates(
            scaled, recording.setting, recording.steps, recording.resident, recording.resident_alone
        )
        if self._request.must_draft:
            ranked = [candidate for candidate in ranked if candidate.draft_tokens]
        self.trial_seconds = recording.load_seconds + min(5.0, 0.3 * self._request.seconds)
        checked = self._check(ranked, n_threads, recording)
        self.best = checked[0].trial
        bounds = {name: self._request.bounds.get(name) for name in profiles.BOUNDS}
        return TuneProfile(made_for, bounds, checked[0].chosen, self._found(scaled, ranked, checked))

    # --- measuring -------------------------------------------------------------------------------------

    def _record(self) -> _Recording:
        self._say("loading")
        started = time.monotonic()
        records: list[StepRecord] = []
        with self._gauge("fetch", records.append) as llm:
            loaded = time.monotonic() - started
            self._choose_length(llm)
            self._say("recording text")
            tokens = measure.tokens_of(llm, self._texts, PROMPT_TOKENS)
            steps: list[Step] = []
            llm.sink = steps.append
            records.clear()
            done, texts = measure.live(llm, tokens, self.n, self._share_of_time(0.2), llm.begin_passage)
            llm.write()
            self.draft_value = measure.draft_value(llm, done)
            llm.sink = None
            drafting = [record for record in records if not record.is_prompt]
            records.clear()
            llm.limit(0)
            self._say("steps without a draft")
            alone, _ = measure.live(llm, tokens[:2], self.n, self._share_of_time(0.1))
            steps_alone = [record for record in records if not record.is_prompt]
            measured = self._operators(llm, max(texts, key=len), steps, drafting, steps_alone, alone)
            setting = self._setting(llm, measured)
            plan = llm.stats().plan
            share = None if plan.resident is None else self._alone(llm, plan.resident)
            return _Recording(measured, steps, setting, plan.resident, share, loaded)

    @contextlib.contextmanager
    def _gauge(self, on_miss: str, on_step: Callable[[StepRecord], None] | None = None) -> Any:
        options = self._options(draft_tokens="auto", on_miss=on_miss, must_draft=self._request.must_draft)
        llm = Gauge(self._request.model, on_step=on_step, **options)
        with contextlib.closing(llm):
            yield llm

    def _options(self, **chosen: Any) -> dict[str, Any]:
        return {"draft": self._request.draft, **self._request.bounds, **self._request.llama, **chosen}

    def _choose_length(self, llm: Gauge) -> None:
        """Choose the tokens per prompt so that all prompts together take about a tenth of the time."""
        tokens = measure.tokens_of(llm, self._texts[:1], PROMPT_TOKENS)
        tried, _ = measure.live(llm, tokens, FEWEST_TOKENS, self._share_of_time(0.1))
        tokens_in_time = self._request.seconds / 10 * tried.tok_per_s / len(self._texts)
        self.n = round(min(MOST_TOKENS, max(FEWEST_TOKENS, tokens_in_time)))

    def _operators(
        self,
        llm: Gauge,
        text: list[int],
        steps: Sequence[Step],
        drafting: Sequence[StepRecord],
        alone: Sequence[StepRecord],
        live: Live,
    ) -> Measured:
        """Return the measured costs.

        - `steps`, `drafting`: steps with the draft, as trace steps (empty without routing) and as step records.
        - `alone`, `live`: steps without the draft, as step records and in total.
        """
        k_max, default = llm.stats().plan.max_draft_tokens, llm.n_threads
        self._say("steps of each width")
        prompt = min(len(text) // 2, PROMPT_TOKENS // 2)
        widths = {w: llm.width(text, prompt, w, default, self._share_of_time(0.015)) for w in range(1, k_max + 2)}
        base = {w: found.base_ms for w, found in widths.items()}
        waited, n_bytes = (sum(getattr(w, name) for w in widths.values()) for name in ("stall_ms", "bytes_fetched"))
        python = max(0.0, _step_ms(alone) - base[1])  # per step
        sampling = max(0.0, 1e3 * (live.seconds - sum(step.seconds for step in alone)) / max(1, live.tokens))
        rest = base[k_max + 1] + python  # per step with k_max draft tokens, without drafting
        return Measured(
            base_ms=base,
            threads_ms=self._threads(llm, text, prompt, base, k_max),
            n_threads=default,
            draft_ms=_draft_ms(steps, [step for step in drafting if step.drafted == k_max], k_max, rest),
            overhead_ms=python + sampling,
            link_bytes_per_s=1e3 * n_bytes / waited if waited and n_bytes else None,
            order_bytes_per_s=llm.order_rate(),
            k_max=k_max,
            accepted=tuple((step.drafted, step.accepted) for step in drafting),
        )

    def _threads(
        self, llm: Gauge, text: list[int], prompt: int, base: dict[int, float], k_max: int
    ) -> dict[int, dict[int, float]]:
        """Return the ms of the narrowest and the widest step, for the default and a few other thread counts."""
        usable, cores = system.usable_cpus(), system.cores() or system.usable_cpus()
        tried = sorted({max(1, n) for n in (usable, min(cores, usable), cores // 2, cores // 4)} - {llm.n_threads})
        ends = sorted({1, k_max + 1})
        found = {llm.n_threads: {w: base[w] for w in ends}}
        for n in tried:
            if self._left() < 0.5 * self._request.seconds:
                self._skip(f"{n} threads: no time")
                continue
            self._say(f"{n} threads")
            found[n] = {w: llm.width(text, prompt, w, n, self._share_of_time(0.015)).base_ms for w in ends}
        return found

    def _setting(self, llm: Gauge, measured: Measured) -> PolicyContext | None:
        plan = llm.stats().plan
        if plan.placement != "slots":
            return None
        block_ms = measured.base_ms[1] / max(1, llm.experts.n_blocks)
        link = round(measured.link_bytes_per_s or measured.order_bytes_per_s or LINK_FALLBACK)
        return PolicyContext(
            llm.experts,
            plan.slots,
            plan.max_draft_tokens,
            link,
            block_ms,
            measured.draft_ms,
            has_twin=bool(llm.is_twin),
        )

    def _alone(self, llm: Gauge, resident: float) -> float:
        """Return the share of the experts in slots if the draft is not loaded."""
        plan = llm.stats().plan
        if plan.budget_bytes is None:
            return resident
        asked = self._request.bounds.get("resident")
        ceiling = 1.0 if asked is None else parse_share(asked)
        return float(min(ceiling, resident + llm.draft_bytes() / llm.experts.total_bytes))

    def _hybrid(self, recording: _Recording) -> Hybrid | None:
        """Return the costs of misses with on_miss hybrid, from a second load and steps without a draft.

        None if there is no time, loading fails, or nothing is missing; the reason is reported.
        """
        if self._left() < recording.load_seconds + 0.4 * self._request.seconds:
            self._skip("hybrid: no time to load the model again")
            return None
        self._say("hybrid execution")
        try:
            with self._gauge("hybrid") as llm:
                llm.limit(0)
                tokens = measure.tokens_of(llm, self._texts[:2], PROMPT_TOKENS)
                done, _ = measure.live(llm, tokens, self.n, self._share_of_time(0.15))
                costs = llm.hybrid_costs()
        except EdgeError as error:
            self._skip(f"hybrid: {error.message}")
            return None
        alone = self._device_misses(recording)
        if costs is None or not done.misses or not alone:
            self._skip("hybrid: nothing was missing")
            return None
        measured = recording.measured
        spent = 1e3 * done.seconds - done.tokens * (measured.base_ms[1] + measured.overhead_ms)
        return Hybrid(
            miss_ms=max(0.0, spent) / done.misses,
            miss_ratio=(done.misses / done.tokens) / alone,
            cpu_bytes_per_s=costs.cpu_bytes_per_s,
            link_bytes_per_s=costs.link_bytes_per_s,
            contention=costs.contention,
        )

    @staticmethod
    def _device_misses(recording: _Recording) -> float:
        """Return the misses per token with on_miss fetch and without draft tokens, from the replay."""
        assert recording.setting is not None
        out = predict.replayed(recording.setting, recording.steps, 0)
        return (out.counters.misses or 0) / max(1, out.tokens)

    # --- checking --------------------------------------------------------------------------------------

    def _check(self, ranked: Sequence[Candidate], n_threads: int, recording: _Recording) -> list[_Checked]:
        """Run the best candidate of each on_miss value, and the defaults, and return them with the fastest first.

        Candidates that were not run for lack of time are last. A candidate must beat the defaults by PREFERENCE.
        """
        default = {"draft_tokens": "auto", "on_miss": "auto", "n_threads": recording.measured.n_threads}
        checked = [_Checked(default)]
        for best in (next(c for c in ranked if c.on_miss == way) for way in dict.fromkeys(c.on_miss for c in ranked)):
            chosen = {"draft_tokens": best.draft_tokens, "on_miss": best.on_miss, "n_threads": n_threads}
            checked.append(_Checked(chosen, best.predicted_tok_per_s))
        for one in sorted(checked, key=lambda one: -(one.predicted_tok_per_s or float("inf"))):
            what = ", ".join(f"{name}={value}" for name, value in one.chosen.items())
            if self._left() < self.trial_seconds:
                self._skip(f"measuring {what}: no time")
                continue
            self._say(f"measuring {what}")
            one.trial = self.trial(one.chosen, self.n, self._share_of_time(0.1))
        least = 1 + predict.PREFERENCE  # relative speed that a candidate must exceed
        return sorted(checked, key=lambda one: -(one.tok_per_s or 0.0) * (least if one is checked[0] else 1.0))

    def trial(self, chosen: dict[str, Any], n: int, seconds: float) -> Trial:
        """Generate n tokens after each prompt with the chosen options. `seconds` limits each part of the trial."""
        return measure.trial(self._request.model, self._options(**chosen), self._texts, n, seconds)

    def _found(self, measured: Measured, ranked: Sequence[Candidate], checked: Sequence[_Checked]) -> dict[str, Any]:
        return {
            "costs": dataclasses.asdict(measured) | {"accepted": _acceptance(measured)},
            "candidates": [dataclasses.asdict(candidate) for candidate in ranked],
            "checked": [_row(one) for one in checked],
            "skipped": self._skipped,
            "seconds": round(self._request.seconds - self._left(), 1),
        }

    # --- time ------------------------------------------------------------------------------------------

    def _left(self) -> float:
        return self._until - time.monotonic()

    def _share_of_time(self, share: float) -> float:
        return max(1.0, min(share * self._request.seconds, self._left()))

    def _skip(self, what: str) -> None:
        self._skipped.append(what)
        self._say(f"left out: {what}")


def _row(one: _Checked) -> dict[str, Any]:
    return dataclasses.asdict(one) | {"tok_per_s": one.tok_per_s, "prediction_error": one.prediction_error}


def _draft_ms(steps: Sequence[Step], whole: Sequence[StepRecord], k_max: int, rest_ms: float) -> float:
    """Return the ms per token that the draft decodes; without recorded steps per token that it proposes."""
    if any(step.n_drafted for step in steps):
        return StepCosts.fit(steps).draft_ms
    return max(0.0, _step_ms(whole) - rest_ms) / k_max if k_max and whole else 0.0


def _step_ms(steps: Sequence[StepRecord]) -> float:
    """Return the typical ms of a step without its stall; 0 without steps."""
    return measure.typical([1e3 * step.seconds - step.stall_ms for step in steps]) if steps else 0.0


def _acceptance(measured: Measured) -> list[float]:
    """Return, for i = 1..k_max, the probability that the first i draft tokens of a step are all accepted."""
    whole = [accepted for drafted, accepted in measured.accepted if drafted == measured.k_max]
    return [sum(a >= i for a in whole) / len(whole) for i in range(1, measured.k_max + 1)] if whole else []
