"""What a policy is: it says what experts are worth and which ones to fetch, before each step, and learns from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_speq import _native, foresight
from edge_speq.core import Experts
from edge_speq.foresight.weights import Weights
from edge_speq.presets.governors import Governor
from edge_speq.trace import Step, Trace

Scores = npt.NDArray[np.float32]
Routing = npt.NDArray[np.int32]


class Slots(Protocol):
    """What keeps the experts: _native.Hook in the engine, residency.Residency in a replay."""

    @property
    def scores(self) -> Scores: ...

    def prefetch(self, orders: npt.NDArray[Any], byte_budget: int = ..., margin: float = ...) -> int:
        """margin: what the priorities of absent experts are less by."""

    def states(self) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """What a policy may know of the machine and the model."""

    experts: Experts
    slots: tuple[int, ...]  # of each expert group
    k_max: int
    link_bytes_per_s: int
    block_ms: float  # that a block takes to compute
    draft_ms: float  # that one drafted token takes
    has_twin: bool = False  # the draft's routing maps expert to expert
    learned: Weights | None = None  # foresight that was trained for this model and draft
    known: Trace | None = None  # recorded steps of the text that is going to be written

    @classmethod
    def nominal(
        cls,
        experts: Experts,
        slots: tuple[int, ...],
        k_max: int,
        link_bytes_per_s: int,
        learned: Weights | None = None,
        *,
        has_twin: bool,
        known: Trace | None = None,
    ) -> Setting:
        """A laptop, until something is measured: a block computes half as long as an expert travels, a draft's token
        takes as long as the target's."""
        block_ms = int(5e8 * experts.groups[0].expert_bytes / link_bytes_per_s) / 1e6
        draft_ms = block_ms * experts.n_blocks if k_max else 0.0
        return cls(experts, slots, k_max, link_bytes_per_s, block_ms, draft_ms, has_twin, learned, known)

    @property
    def transfer_ms(self) -> float:
        """Of the largest expert."""
        return 1e3 * max(group.expert_bytes for group in self.experts.groups) / self.link_bytes_per_s


class Policy:
    """The base, which is LRU: nothing is worth more than anything else, so what was used last stays."""

    name = "lru"
    sees = "none"  # what it knows of later demands: "counts" of earlier ones, or the routing of a "twin" too
    needs_twin = False  # without one it is lru
    reads_prompts = False  # it learns from them, and they may leave experts in slots
    lossy = False
    hybrid = False  # missing experts are computed on the CPU
    split = 1  # parts that a slot's experts are in; ids of `demanded` are then those of parts
    place = "slots"  # or "stream": a layer's experts are all sent for each step; "cpu": none ever is

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.governor: Governor | None = None  # None: as many drafted tokens as the caller likes

    @property
    def reads_draft(self) -> bool:
        """Whether it can make something of the draft's routing."""
        return self.setting.has_twin

    @property
    def quality(self) -> foresight.Quality | None:
        """How well it foresaw the target's experts."""
        return None

    def begin_replay(self, steps: Sequence[Step]) -> None:
        """Said before recorded steps are replayed: all of them."""

    def verifying(self, tokens: Sequence[int]) -> None:
        """Said before `foresee`: the ids of the last token of text and of the drafted ones after it."""

    def resized(self, slots: tuple[int, ...]) -> None:
        """The slots of each group are others from now on."""
        self.setting = dataclasses.replace(self.setting, slots=slots)

    @property
    def expert_budget(self) -> int:
        """Experts that a verify step runs of a block at most, 0 for no such bound: lossy."""
        return 0

    def measured(self, draft_ms: float, block_ms: float) -> None:
        """What this machine takes for a drafted token and a block."""
        self.setting = dataclasses.replace(self.setting, draft_ms=draft_ms, block_ms=block_ms)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        """Orders for absent experts that have earned a slot, where nobody fetches on demand."""
        return NO_ORDERS

    def ahead(self, n_drafted: int) -> int:
        """Tokens that the draft runs on beyond those that it proposes, for their routing; each takes its time."""
        return 0

    def drafting(self, slots: Slots, draft_routing: Routing) -> None:
        """The draft goes on to its next token; draft_routing: [n_blocks, n, n_expert_used] of those so far."""

    def foresee(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        """The step of the last token and n_drafted drafted ones is about to run. draft_routing begins with these as far
        as the draft decoded them, and may go on with tokens beyond them."""

    def observe(self, routing: Routing, n_accepted: int) -> None:
        """routing: [n_blocks, n_tokens, n_expert_used] of the step, of which n_accepted drafted tokens were kept."""

    def read(self, routing: Routing) -> None:
        """routing: [n_blocks, n_tokens, n_expert_used] of the last tokens of a prompt, -1 where it is not known. Slots
        did not serve it; the text after it will ask for much the same."""

    def demanded(self, routing: Routing, gates: npt.NDArray[np.float16] | None) -> Routing:
        """What the step really asks for. Lossy policies ask for less: an id may be -1."""
        return routing


class Foreseeing(Policy):
    """One of edge_speq.foresight's objects, used just as edge_speq.lookahead uses it in the engine."""

    def __init__(self, setting: Setting, name: str, source: foresight.Foresight) -> None:
        super().__init__(setting)
        self.name, self.source, self.sees = name, source, source.name

    @property
    def quality(self) -> foresight.Quality | None:
        return self.source.quality if isinstance(self.source, foresight.Twin) else None

    def foresee(self, slots: Slots, draft_routing: Routing | None, n_drafted: int) -> None:
        shown = None if draft_routing is None else draft_routing[:, :n_drafted]
        slots.scores[:] = self.source.worth()
        orders = foresight.orders(self.source.expect(shown))
        slots.prefetch(orders, _native.NO_BUDGET if self.source.worth_fetching() else 0)

    def observe(self, routing: Routing, n_accepted: int) -> None:
        self.source.observe(routing)

    def admissions(self, slots: Slots) -> npt.NDArray[Any]:
        return foresight.admissions(self.source.worth(), slots.states())


class CpuMoe(Policy):
    """Every expert is computed where it lies."""

    name = "cpu-moe"
    place = "cpu"


def make_orders(block: npt.NDArray[Any], expert: npt.NDArray[Any], priority: Any) -> npt.NDArray[Any]:
    """Orders with their own block as deadline."""
    out = np.empty(len(block), dtype=_native.PREFETCH_REQUEST)
    out["block"] = out["deadline"] = block
    out["expert"], out["priority"] = expert, priority
    return out


def order_of_each(experts: Experts) -> npt.NDArray[Any]:
    """An order for each expert of each block, to take orders from by key: block * n_expert + expert."""
    block, expert = np.divmod(np.arange(experts.total), max(1, experts.n_expert))
    return make_orders(block, expert, priority=0.0)


NO_ORDERS: npt.NDArray[Any] = np.zeros(0, dtype=_native.PREFETCH_REQUEST)


class Sets:
    """Sets of experts from routing, as booleans by key: block * n_expert + expert."""

    def __init__(self, experts: Experts) -> None:
        self._total = experts.total
        self._first = (np.arange(experts.n_blocks, dtype=np.intp) * experts.n_expert)[:, None, None]

    def of(self, routing: Routing) -> npt.NDArray[np.bool_]:
        found = np.zeros(self._total, dtype=bool)
        found[self.keys(routing)] = True
        return found

    def keys(self, routing: Routing) -> npt.NDArray[np.intp]:
        """Of every choice of every token, so that some come twice."""
        keys: npt.NDArray[np.intp] = (self._first[: len(routing)] + routing).ravel()
        return keys
