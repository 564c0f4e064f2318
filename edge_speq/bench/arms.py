"""Arms of a benchmark (combinations of policy and options), loaded with equal bytes on the compute device."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_speq import _native
from edge_speq.bench.instrumented import InstrumentedLlama, StockLlama
from edge_speq.bench.matrix import Case
from edge_speq.bench.measure import reading
from edge_speq.core import OWN_POLICIES, SLOT_POLICIES, Experts
from edge_speq.gguf import model as gguf_model
from edge_speq.planning import planner
from edge_speq.planning.load_request import READS_PREDICTOR, READS_TRACE
from edge_speq.runtime import loading
from edge_speq.texts import Texts

SLOTS = SLOT_POLICIES
WARM_UP = 16  # tokens generated after each load, to build graphs and fill slots
DEFAULT_RESIDENT = "1/4"
CONTEXT_STEP = 256  # llama_context pads n_ctx to this many cells
ROOM_TO_SPARE = 16  # cells for draft tokens of the last verify step


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Checked settings of one benchmark."""

    model: str
    draft: str | None
    policies: tuple[str, ...]
    draft_tokens: tuple[int | str, ...]
    threads: tuple[int | None, ...]
    cases: tuple[Case, ...]
    texts: Texts
    repetitions: int
    resident: str | None
    vram_budget: int | str | None
    baseline: str
    throttle_link: int | None = None  # bytes per second
    on_miss: tuple[str, ...] = ("auto",)  # for policies that are not published systems
    next_layer_prefetch: bool | None = None
    deterministic: bool = False
    emulation: str | None = None  # description of the emulated machine, copied to every row
    load_mode: str = "auto"  # of arms without slots: "mmap", "none", or the faster one
    warm_up: bool = True
    predictor: str | None = None  # a file of tune --learn
    trace: str | None = None  # a file of trace


@dataclass(frozen=True, slots=True)
class Arm:
    """One combination of policy and options."""

    policy: str
    draft_tokens: int | str
    threads: int | None
    on_miss: str = "auto"

    @property
    def name(self) -> str:
        on_miss = "" if self.on_miss == "auto" else f", on miss {self.on_miss}"
        threads = f", {self.threads} threads" if self.threads else ""
        return f"{self.policy}{on_miss}, K={self.draft_tokens}{threads}"


@dataclass(frozen=True, slots=True)
class Facts:
    """Properties of a loaded arm."""

    used_bytes: int
    resident_fraction: float | None
    n_cpu_moe: int | None
    load_mode: str
    placement: str  # "slots", "cpu-moe" or "all"
    slots: tuple[int, ...]
    experts: Experts
    n_threads: int
    n_batch: int
    n_ubatch: int
    flash_attn: bool
    is_uncounted: bool  # experts are mapped pages that used_bytes leaves out: no GPU and no slots
    lossy: bool = False  # a token runs fewer experts than the model's router chose


def arms(settings: BenchSettings) -> list[Arm]:
    """Return all combinations, in the order of the arguments."""
    return [
        Arm(policy, k, threads, on_miss)
        for threads in settings.threads
        for policy in settings.policies
        for on_miss in (settings.on_miss if policy in OWN_POLICIES else ("auto",))
        for k in settings.draft_tokens
    ]


def rotated(competitors: list[Arm], repetition: int) -> list[Arm]:
    """Return the arms, with another one first in each repetition, so that none always runs on the warmest machine."""
    start = repetition % len(competitors)
    return competitors[start:] + competitors[:start]


def reference(settings: BenchSettings) -> Arm:
    """Return the arm whose texts are the reference: policy lru, without a draft."""
    return Arm("lru", 0, settings.threads[0])


class Fleet:
    """Loads arms, and keeps as many in memory as device and host have room for.

    The anchor is the first arm with slots; it gets the user's bounds. The bytes that it uses are the budget of the
    other arms. Slots with another draft length get it as vram_budget, cpu-moe as room for whole layers of experts.
    Policy `all` is not bounded.
    """

    def __init__(self, settings: BenchSettings, say: Callable[[str], None]) -> None:
        self.facts: dict[Arm, Facts] = {}
        self.budget_bytes: int | None = None
        self.resident = settings.resident  # share of the anchor; None if a budget decides
        self._settings, self._say = settings, say
        self._open: dict[Arm, InstrumentedLlama] = {}
        self._mapped: dict[Arm, bool] = {}  # arms without slots: true if mapping the file is faster
        self._n_cpu_moe: dict[Arm, int | None] = {}  # found by dry loads
        self._anchor = next((arm for arm in arms(settings) if arm.policy in SLOTS), reference(settings))
        self._n_ctx = self._size = 0

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for model in self._open.values():
            model.close()
        self._open = {}

    def rebound(self, resident: str | None) -> None:
        """Change the share of the experts in slots, and close the arms that depend on it.

        Arms of policy `all` and the chosen load modes are kept, because they do not depend on the share.
        """
        self._settings = dataclasses.replace(self._settings, resident=resident)
        for arm in [arm for arm in self._open if arm.policy != "all"]:
            self._open.pop(arm).close()
        self.facts = {arm: facts for arm, facts in self.facts.items() if arm.policy == "all"}
        self.budget_bytes = None
        self._n_cpu_moe = {}

    def cancel(self) -> None:
        """Cancel the running graphs; callable from any thread."""
        for model in list(self._open.values()):
            model.cancel()

    def open(self, arm: Arm) -> InstrumentedLlama:
        """Return an arm, loaded and warmed up. Raises EdgeError if it cannot be loaded."""
        if self.budget_bytes is None:
            _native.load_backends()
            self._settle_bounds()
            self._load(self._anchor)
            facts = self.facts[self._anchor]
            self.budget_bytes = facts.used_bytes + (facts.experts.total_bytes if facts.is_uncounted else 0)
        if arm not in self._open:
            self._load(arm)
        return self._open[arm]

    def _load(self, arm: Arm) -> None:
        while self._open and not self._has_room(arm):  # arms run in a cycle: the last one is needed latest
            self._open.popitem()[1].close()
        if arm.policy not in SLOTS:
            self._open[arm] = self._stock(arm)
        else:
            self._say(f"loading {arm.name}")
            self._open[arm] = self._slots(arm)
        if arm not in self.facts:
            self.facts[arm] = _facts(self._open[arm])
        self._warm(self._open[arm])

    def _has_room(self, arm: Arm) -> bool:
        known, free_bytes = self.facts.get(arm), _native.compute_device().free_bytes
        need = known.used_bytes if known is not None else (self.budget_bytes or 0) + self._size * (arm.policy == "all")
        # each model has its page-locked copy of the experts; without room, only some models would be mapped
        return free_bytes >= need + planner.AUTO_MARGIN and loading.fits_in_memory(self._size)

    def _settle_bounds(self) -> None:
        """Compute the budget and the context size once, because the free memory changes during the run."""
        if not self._n_ctx:
            self._vram_budget = planner.budget(self._settings.vram_budget, _native.compute_device())
        bounded = self._settings.resident is not None or self._vram_budget is not None
        self.resident = self._settings.resident if bounded else DEFAULT_RESIDENT
        self._n_ctx, self._size = self._context(), gguf_model.check_model(self._settings.model).size

    def _context(self) -> int:
        """Return the context size of the longest test in tokens. A generation test reads a whole text."""
        longest = max(len(prompt.text.encode()) for prompt in self._settings.texts.chosen)
        needs = [
            c.n_depth + c.n_tokens + (longest if not c.n_prompt and not c.n_depth else 0) for c in self._settings.cases
        ]
        return -(-(max(needs) + WARM_UP + ROOM_TO_SPARE) // CONTEXT_STEP) * CONTEXT_STEP

    def _slots(self, arm: Arm) -> InstrumentedLlama:
        bounds: dict[str, Any] = {"vram_budget": self.budget_bytes}
        if arm.draft_tokens == self._anchor.draft_tokens:
            bounds = {"resident": self.resident, "vram_budget": self._vram_budget}
        if arm.policy in OWN_POLICIES:
            bounds |= {"on_miss": arm.on_miss, "next_layer_prefetch": self._next_layer_prefetch(arm)}
        if arm.policy in READS_PREDICTOR:
            bounds["predictor"] = self._settings.predictor
        if arm.policy in READS_TRACE:
            bounds["trace"] = self._settings.trace
        return InstrumentedLlama(self._settings.model, policy=arm.policy, **bounds, **self._options(arm))

    def _next_layer_prefetch(self, arm: Arm) -> bool | None:
        return None if arm.on_miss == "fetch" else self._settings.next_layer_prefetch

    def _stock(self, arm: Arm) -> InstrumentedLlama:
        mapped = self._mapped.get(arm)
        if mapped is None and self._settings.load_mode != "auto":
            mapped = self._settings.load_mode == "mmap"
        elif mapped is None and arm.policy == "all" and _native.compute_device().is_gpu:
            mapped = True  # the weights are on the device either way
        return self._faster_load(arm) if mapped is None else self._load_stock(arm, mapped)

    def _faster_load(self, arm: Arm) -> StockLlama:
        """Load the arm with the file mapped and with the file read into memory, and return the faster one."""
        models = dict[bool, StockLlama]()
        times = dict[bool, float]()
        try:
            for mapped in (True, False):
                if models and not self._has_room(arm):
                    models.pop(True).close()
                models[mapped] = self._load_stock(arm, mapped)
                self._warm(models[mapped])
                times[mapped] = self._tried(models[mapped])
            best = self._mapped[arm] = times[True] <= times[False]
            return models.pop(best) if best in models else self._load_stock(arm, best)
        finally:
            for model in models.values():
                model.close()

    def _load_stock(self, arm: Arm, mapped: bool) -> StockLlama:
        self._say(f"loading {arm.name}, {'mapped' if mapped else 'read into memory'}")
        budget = self.budget_bytes if arm.policy == "cpu-moe" else None
        options = self._options(arm) | {"use_mmap": mapped, "n_cpu_moe": self._n_cpu_moe.get(arm)}
        model = StockLlama(self._settings.model, device_budget=budget, policy=arm.policy, **options)
        self._n_cpu_moe[arm] = model.n_cpu_moe
        return model

    def _options(self, arm: Arm) -> dict[str, Any]:
        settings = self._settings
        options: dict[str, Any] = {
            "draft": settings.draft,
            "draft_tokens": arm.draft_tokens,
            "throttle_link": settings.throttle_link,
            "deterministic": settings.deterministic,
            "n_ctx": self._n_ctx,
        }
        return options | ({"n_threads": arm.threads, "n_threads_batch": arm.threads} if arm.threads else {})

    def _tried(self, model: InstrumentedLlama) -> float:
        """Return the seconds of a short version of the tests: a prompt, and some tokens if a test generates tokens."""
        texts, cases = self._settings.texts, self._settings.cases
        case = max(cases, key=lambda case: (case.n_gen > 0, case.n_prompt))
        read = reading(model, case, texts.chosen[0], texts)
        tokens, generates = [*read.before, *read.prompt], case.n_gen > 0
        model.reset()
        started = time.perf_counter()
        with contextlib.closing(model.generate(tokens, temp=0.0)) as stream:
            for _ in range(1 + WARM_UP * generates):
                next(stream)
        return time.perf_counter() - started

    def _warm(self, model: InstrumentedLlama) -> None:
        """Generate WARM_UP tokens after the start of the first prompt."""
        model.reset()
        prompt = self._settings.texts.chosen[0].text
        stream = model.generate(model.words(prompt, add_bos=True)[:WARM_UP], temp=0.0)
        with contextlib.closing(stream):
            for _ in range(1 + WARM_UP):
                next(stream)


def _facts(model: InstrumentedLlama) -> Facts:
    made = model.stats()
    return Facts(
        used_bytes=made.used_bytes,
        resident_fraction=model.resident_fraction(),
        n_cpu_moe=model.n_cpu_moe,
        load_mode="mmap" if model.is_mapped else "none",
        placement=made.plan.placement,
        slots=made.plan.slots,
        experts=model.experts,
        n_threads=model.n_threads,
        n_batch=model.n_batch,
        n_ubatch=int(model.context_params.n_ubatch),
        flash_attn=bool(model.context_params.flash_attn_type > 0),
        is_uncounted=made.plan.placement != "slots" and not model.device.is_gpu,
        lossy=made.lossy,
    )
