"""The native passes over all experts that policies make (native/src/policy), typed.

Arrays are numpy's, one entry per expert at block * n_expert + expert. Pointers are prepared once: between two decodes
each Python call costs a cache miss. Raises EdgeError if the patched build is missing, and for routing that does not fit
the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq._native.hook import PREFETCH_REQUEST, Hook
from edge_speq._native.library import check, load
from edge_speq.core import Experts
from edge_speq.errors import EdgeError

Routing = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Marks = npt.NDArray[np.bool_]

MOST_KNOWN = 64  # arrays whose addresses are remembered
_KINDS = {
    "f": "float[]",
    "d": "double[]",
    "?": "uint8_t[]",
    "l": "int64_t[]",
    "q": "int64_t[]",
    "V": "edge_prefetch_request[]",
}


def _pointer(array: npt.NDArray[Any]) -> Any:
    return load()[0].from_buffer(_KINDS[array.dtype.char], array)


def _require(array: npt.NDArray[Any], n: int, kind: type) -> None:
    """Raise EdgeError unless the array is as native code, which trusts lengths, expects it."""
    if array.size != n or array.dtype != kind:
        raise EdgeError(f"{array.size} values of {array.dtype} where a policy needs {n} of {np.dtype(kind)}")


class _RoutingPointers:
    """Routing as native code takes it. The hook and a draft reuse one array per width, so its address is looked up
    once: between two decodes that takes 17 us."""

    def __init__(self) -> None:
        self._ffi, _ = load()
        self._known: dict[int, tuple[Any, Routing]] = {}
        self._copy: Routing | None = None

    def of(self, routing: Routing) -> Any:
        known = self._known.get(id(routing))  # unique as long as the array is kept here
        if known is not None:
            return known[0]
        made = self._ffi.new("edge_routing *")
        if not self._point(made, routing):
            self._copy = np.array(routing, dtype=np.int32, order="C")  # outlives the call
            self._point(made, self._copy)
            return made
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[id(routing)] = made, routing
        return made

    def _point(self, made: Any, routing: Routing) -> bool:
        """Return False if native code cannot read the array's memory order."""
        (n_blocks, n_tokens, n_used), (stride, *inner) = routing.shape, routing.strides
        if routing.dtype != np.int32 or inner != [4 * n_used, 4] or stride % 4 or stride < 4 * n_tokens * n_used:
            return False
        made.ids = self._ffi.cast("int32_t *", routing.__array_interface__["data"][0])
        made.n_blocks, made.n_tokens, made.n_used, made.stride = n_blocks, n_tokens, n_used, stride // 4
        return True


class _Scores:
    """A pointer to scores; slots keep theirs at one address."""

    def __init__(self, n_keys: int) -> None:
        self._n_keys = n_keys
        self._array: Floats | None = None
        self._pointer: Any = None

    def of(self, scores: Floats) -> Any:
        if scores is not self._array:
            _require(scores, self._n_keys, np.float32)
            self._array, self._pointer = scores, _pointer(scores)
        return self._pointer


class Rates:
    """Fraction of a predicted set that is demanded, and demands of other experts relative to their frequency.

    Both are learned step by step and bounded by `most`, (inside, outside), in scores."""

    def __init__(self, inside: float, most: tuple[float, float], smoothing: float) -> None:
        given = {"inside": inside, "outside": most[1], "max_inside": most[0], "max_outside": most[1]}
        self.struct: Any = load()[0].new("edge_rates *", {**given, "smoothing": smoothing})

    @property
    def inside(self) -> float:
        return float(self.struct.inside)

    @inside.setter
    def inside(self, inside: float) -> None:
        self.struct.inside = inside

    @property
    def outside(self) -> float:
        return float(self.struct.outside)

    @outside.setter
    def outside(self, outside: float) -> None:
        self.struct.outside = outside

    @property
    def chances(self) -> tuple[float, float]:
        """Demand probability of an expert inside, and the factor on the frequency of one outside."""
        s = self.struct
        return min(s.inside, s.max_inside), min(s.outside, s.max_outside)


class Prediction:
    """Experts that a step is predicted to demand."""

    def __init__(self, n_keys: int, rates: Rates) -> None:
        self.n_keys = n_keys
        self.found: Marks = np.zeros(n_keys, dtype=bool)
        self.rates, self.marks = rates, _pointer(self.found)
        self.struct: Any = load()[0].new("edge_prediction *", {"found": self.marks, "rates": rates.struct})

    @property
    def others(self) -> float:
        """Demands expected outside the set at their usual frequency."""
        return float(self.struct.others)

    def set(self, found: Marks, others: float) -> None:
        self.found[:] = found
        self.struct.n_found, self.struct.others = int(np.count_nonzero(found)), others


class NextUseKernel:
    """State of the next-use policy, whose score is minus the expected number of steps until the next demand."""

    def __init__(self, experts: Experts, decay: float, min_frequency: float, frequency: Floats) -> None:
        ffi, self._lib = load()
        self._none = ffi.NULL
        self._n_keys = n_keys = experts.total
        self.frequency = frequency
        self.demanded: Marks = np.zeros(n_keys, dtype=bool)  # by the last step
        self.tally = np.zeros((3, experts.n_blocks), dtype=np.int64)  # predicted, demanded, both
        self.requests: npt.NDArray[Any] = np.zeros(n_keys, dtype=PREFETCH_REQUEST)
        arrays = {
            "frequency": self.frequency,
            "demanded": self.demanded,
            "tally": self.tally,
            "requests": self.requests,
        }
        self._pointers = {name: _pointer(array) for name, array in arrays.items()}
        shape = {"n_blocks": experts.n_blocks, "n_expert": experts.n_expert}
        given = {"decay": decay, "min_frequency": min_frequency}
        _require(frequency, n_keys, np.float32)
        self._struct: Any = ffi.new("edge_next_use *", {**shape, **given, **self._pointers})
        self._ids, self._scores = _RoutingPointers(), _Scores(n_keys)

    def plan(
        self, routing: Routing | None, width: int, now: Prediction | None, then: Prediction | None, scores: Floats
    ) -> npt.NDArray[Any]:
        """Write scores. Return requests for the experts in `now`, in key order; the next call overwrites them."""
        given = self._given(routing, width, now, then)
        check(self._lib.edge_next_use_plan(self._struct, *given, self._scores.of(scores)))
        return self.requests[: 0 if now is None else now.struct.n_found]

    def prefetch(
        self,
        hook: Hook,
        routing: Routing | None,
        width: int,
        now: Prediction | None,
        then: Prediction | None,
        min_share: float,
        margin: float,
    ) -> None:
        """Plan with the engine's scores and submit the requests. Nothing is fetched if less than min_share of such
        predictions was demanded."""
        hook.prefetch_next_use(self._struct, *self._given(routing, width, now, then), min_share, margin)

    def _given(
        self, routing: Routing | None, width: int, now: Prediction | None, then: Prediction | None
    ) -> tuple[Any, int, Any, Any]:
        """Return the arguments as native code takes them."""
        none, n = self._none, self._n_keys
        if (now is not None and now.n_keys != n) or (then is not None and then.n_keys != n):
            raise EdgeError(f"a prediction of other experts than these {n}")
        ids = none if routing is None else self._ids.of(routing)
        return ids, width, none if now is None else now.struct, none if then is None else then.struct

    def observe(
        self, routing: Routing, now: Prediction | None, then: Prediction | None, foreseen: Marks | None
    ) -> None:
        """Learn frequencies, the rates of the predictions and, from foreseen marks, the tally of a step."""
        none = self._none
        marks = none
        if now is not None and foreseen is now.found:
            marks = now.marks
        elif foreseen is not None:
            _require(foreseen, self.demanded.size, np.bool_)
            marks = _pointer(foreseen)
        status = self._lib.edge_next_use_observe(
            self._struct,
            self._ids.of(routing),
            none if now is None else now.struct,
            none if then is None else then.struct,
            marks,
        )
        if status:
            check(status)

    def on_prefill(self, routing: Routing, width: int) -> None:
        """Learn frequencies from prefill routing, `width` tokens per step; ids of -1 are unknown."""
        check(self._lib.edge_next_use_on_prefill(self._struct, self._ids.of(routing), width))


class Pool:
    """A simulated slot pool: what one rule would keep. Among equal scores the first index is evicted."""

    def __init__(self, n_experts: int, size: int, struct: Any = None) -> None:
        """struct: its native memory, if that is part of a larger array."""
        self._kept: Marks = np.zeros(n_experts, dtype=bool)
        self._pointer = _pointer(self._kept)
        self._struct: Any = load()[0].new("edge_pool *") if struct is None else struct
        self._struct.kept, self._struct.n = self._pointer, n_experts
        self.size = size

    @property
    def size(self) -> int:
        """Capacity in experts."""
        return int(self._struct.size)

    @size.setter
    def size(self, size: int) -> None:
        self._struct.size = size

    def demand(self, wanted: Marks, scores: Floats) -> int:
        """Demand the wanted experts and return the misses. Evict by lowest score, wanted ones last."""
        ffi, lib = load()
        _require(wanted, self._kept.size, np.bool_)
        _require(scores, self._kept.size, np.float32)
        missed = ffi.new("int32_t *")
        check(lib.edge_pool_demand(self._struct, _pointer(wanted), _pointer(scores), missed))
        return int(missed[0])


class SetDuelingKernel:
    """Eviction rules that compete on sampled blocks: recency, and decaying frequencies of demands."""

    def __init__(
        self,
        experts: Experts,
        stride: int,
        decays: Sequence[float],
        *,
        last: float,
        smoothing: float,
        hysteresis: float,
    ) -> None:
        ffi, self._lib = load()
        n_rules = 1 + len(decays)
        self.n_sampled = len(range(0, experts.n_blocks, stride)) * experts.n_expert
        self.frequency = np.zeros((len(decays), experts.total), dtype=np.float32)
        arrays = {
            "decays": np.array(decays, dtype=np.float32),
            "frequency": self.frequency,
            "latest": np.zeros(experts.total, dtype=bool),
            "used": np.zeros(self.n_sampled, dtype=np.float32),
            "missed": np.zeros(n_rules, dtype=np.float64),
        }
        self._pointers = {name: _pointer(array) for name, array in arrays.items()}  # which keep them
        self._native_pools = ffi.new("edge_pool[]", n_rules)
        self.pools = [Pool(self.n_sampled, 0, ffi.addressof(self._native_pools, i)) for i in range(n_rules)]
        shape = {"n_blocks": experts.n_blocks, "n_expert": experts.n_expert, "stride": stride, "n_rules": n_rules}
        given = {"last": last, "smoothing": smoothing, "hysteresis": hysteresis, "pools": self._native_pools}
        self._struct: Any = ffi.new("edge_dueling *", {**shape, **given, **self._pointers})
        self._ids, self._scores = _RoutingPointers(), _Scores(experts.total)

    @property
    def best(self) -> int:
        """Index of the rule that is followed."""
        return int(self._struct.best)

    def score(self, scores: Floats) -> None:
        """Write the followed rule's scores."""
        status = self._lib.edge_dueling_score(self._struct, self._scores.of(scores))
        if status:
            check(status)

    def observe(self, routing: Routing) -> None:
        """Learn from what a step demanded."""
        status = self._lib.edge_dueling_observe(self._struct, self._ids.of(routing))
        if status:
            check(status)

    def on_prefill(self, routing: Routing) -> None:
        """Learn frequencies from prefill routing; ids of -1 are unknown."""
        check(self._lib.edge_dueling_on_prefill(self._struct, self._ids.of(routing)))
