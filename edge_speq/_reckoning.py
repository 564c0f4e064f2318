"""The passes over all experts that policies make, in native code (native/src/reckoning.cpp), typed.

Arrays are numpy's, by key: block * n_expert + expert. What crosses is prepared once, since between two decodes every
function costs what it takes to bring it back into the caches. Raises EdgeError where the patched build is missing, and
for routing that is none of these experts'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq._library import check, load
from edge_speq._native import ORDER, Hook
from edge_speq.core import Experts
from edge_speq.errors import EdgeError

Routing = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Marks = npt.NDArray[np.bool_]

MOST_KNOWN = 64  # arrays whose places are remembered
_KINDS = {"f": "float[]", "d": "double[]", "?": "uint8_t[]", "l": "int64_t[]", "q": "int64_t[]", "V": "edge_order[]"}


def _pointer(array: npt.NDArray[Any]) -> Any:
    return load()[0].from_buffer(_KINDS[array.dtype.char], array)


def _require(array: npt.NDArray[Any], n: int, kind: type) -> None:
    """Native code trusts lengths."""
    if array.size != n or array.dtype != kind:
        raise EdgeError(f"{array.size} values of {array.dtype} where a policy needs {n} of {np.dtype(kind)}")


class _Ids:
    """Routing as native code takes it. The hook and a draft have one array for each width, which they give again with
    other contents: where it lies is found once, since between two decodes that takes 17 us."""

    def __init__(self) -> None:
        self._ffi, _ = load()
        self._known: dict[int, tuple[Any, Routing]] = {}
        self._copy: Routing | None = None

    def of(self, routing: Routing) -> Any:
        known = self._known.get(id(routing))  # which nothing else has as long as it is kept here
        if known is not None:
            return known[0]
        made = self._ffi.new("edge_ids *")
        if not self._point(made, routing):
            self._copy = np.array(routing, dtype=np.int32, order="C")  # outlives the call
            self._point(made, self._copy)
            return made
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[id(routing)] = made, routing
        return made

    def _point(self, made: Any, routing: Routing) -> bool:
        """False: its memory is not in an order that native code reads."""
        (n_blocks, n_tokens, n_used), (stride, *inner) = routing.shape, routing.strides
        if routing.dtype != np.int32 or inner != [4 * n_used, 4] or stride % 4 or stride < 4 * n_tokens * n_used:
            return False
        made.ids = self._ffi.cast("int32_t *", routing.__array_interface__["data"][0])
        made.n_blocks, made.n_tokens, made.n_used, made.stride = n_blocks, n_tokens, n_used, stride // 4
        return True


class _Scores:
    """Where scores are written to; slots keep theirs at one address."""

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
    """How often experts of a predicted set are demanded, and others relative to their frequency; learned step by step.
    Taken for `most` at most, which is one number for each."""

    def __init__(self, inside: float, most: tuple[float, float], smoothing: float) -> None:
        given = {"inside": inside, "outside": most[1], "most_inside": most[0], "most_outside": most[1]}
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
        """Of an expert inside, and what the frequency of one outside is multiplied by."""
        s = self.struct
        return min(s.inside, s.most_inside), min(s.outside, s.most_outside)


class Guess:
    """Experts that a step is expected to demand."""

    def __init__(self, n_keys: int, rates: Rates) -> None:
        self.n_keys = n_keys
        self.found: Marks = np.zeros(n_keys, dtype=bool)
        self.rates, self.marks = rates, _pointer(self.found)
        self.struct: Any = load()[0].new("edge_guess *", {"found": self.marks, "rates": rates.struct})

    @property
    def others(self) -> float:
        """Demands of those outside, if these kept to their frequency."""
        return float(self.struct.others)

    def set(self, found: Marks, others: float) -> None:
        self.found[:] = found
        self.struct.n_found, self.struct.others = int(np.count_nonzero(found)), others


class Waits:
    """What `waits` counts of all experts."""

    def __init__(self, experts: Experts, decay: float, least: float, often: Floats) -> None:
        ffi, self._lib = load()
        self._none = ffi.NULL
        self._n_keys = n_keys = experts.total
        self.often = often
        self.demanded: Marks = np.zeros(n_keys, dtype=bool)  # by the last step
        self.tally = np.zeros((3, experts.n_blocks), dtype=np.int64)  # foreseen, demanded, both
        self.orders: npt.NDArray[Any] = np.zeros(n_keys, dtype=ORDER)
        arrays = {"often": self.often, "demanded": self.demanded, "tally": self.tally, "orders": self.orders}
        self._pointers = {name: _pointer(array) for name, array in arrays.items()}
        sizes = {"n_blocks": experts.n_blocks, "n_expert": experts.n_expert, "decay": decay, "least": least}
        _require(often, n_keys, np.float32)
        self._struct: Any = ffi.new("edge_waits *", {**sizes, **self._pointers})
        self._ids, self._scores = _Ids(), _Scores(n_keys)

    def foresee(
        self, routing: Routing | None, width: int, now: Guess | None, then: Guess | None, scores: Floats
    ) -> npt.NDArray[Any]:
        """Writes scores. Orders for what `now` found, by key; the next call overwrites them."""
        given = self._given(routing, width, now, then)
        check(self._lib.edge_waits_foresee(self._struct, *given, self._scores.of(scores)))
        return self.orders[: 0 if now is None else now.struct.n_found]

    def prefetch(
        self,
        hook: Hook,
        routing: Routing | None,
        width: int,
        now: Guess | None,
        then: Guess | None,
        least: float,
        margin: float,
    ) -> None:
        """The same with the engine's scores, and its prefetch() of the orders; nothing is fetched where less than
        `least` of such sets was demanded."""
        hook.prefetch_waits(self._struct, *self._given(routing, width, now, then), least, margin)

    def _given(
        self, routing: Routing | None, width: int, now: Guess | None, then: Guess | None
    ) -> tuple[Any, int, Any, Any]:
        """As native code takes it."""
        none, n = self._none, self._n_keys
        if (now is not None and now.n_keys != n) or (then is not None and then.n_keys != n):
            raise EdgeError(f"a guess of other experts than these {n}")
        ids = none if routing is None else self._ids.of(routing)
        return ids, width, none if now is None else now.struct, none if then is None else then.struct

    def observe(self, routing: Routing, now: Guess | None, then: Guess | None, foreseen: Marks | None) -> None:
        """What a step demanded; the guesses' rates learn from it. foreseen: what is tallied."""
        none = self._none
        marks = none
        if now is not None and foreseen is now.found:
            marks = now.marks
        elif foreseen is not None:
            _require(foreseen, self.demanded.size, np.bool_)
            marks = _pointer(foreseen)
        status = self._lib.edge_waits_observe(
            self._struct,
            self._ids.of(routing),
            none if now is None else now.struct,
            none if then is None else then.struct,
            marks,
        )
        if status:
            check(status)

    def read(self, routing: Routing, width: int) -> None:
        """How often a prompt's tokens demanded experts, `width` of them a step; -1 where that is not known."""
        check(self._lib.edge_waits_read(self._struct, self._ids.of(routing), width))


class Pool:
    """What one rule would keep of some experts. Of equal worth the first goes first."""

    def __init__(self, n_experts: int, size: int, struct: Any = None) -> None:
        """struct: where it lies, if that is part of something larger."""
        self._kept: Marks = np.zeros(n_experts, dtype=bool)
        self._pointer = _pointer(self._kept)
        self._struct: Any = load()[0].new("edge_pool *") if struct is None else struct
        self._struct.kept, self._struct.n = self._pointer, n_experts
        self.size = size

    @property
    def size(self) -> int:
        """Experts that it holds at most."""
        return int(self._struct.size)

    @size.setter
    def size(self, size: int) -> None:
        self._struct.size = size

    def demand(self, wanted: Marks, worth: Floats) -> int:
        """Misses of a step. What is worth least makes room, what was wanted last of all."""
        ffi, lib = load()
        _require(wanted, self._kept.size, np.bool_)
        _require(worth, self._kept.size, np.float32)
        missed = ffi.new("int32_t *")
        check(lib.edge_pool_demand(self._struct, _pointer(wanted), _pointer(worth), missed))
        return int(missed[0])


class Duel:
    """Pools of rules, and what the rules go by: recency, or how often steps demanded an expert, decaying."""

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
        self.often = np.zeros((len(decays), experts.total), dtype=np.float32)
        arrays = {
            "decays": np.array(decays, dtype=np.float32),
            "often": self.often,
            "latest": np.zeros(experts.total, dtype=bool),
            "used": np.zeros(self.n_sampled, dtype=np.float32),
            "missed": np.zeros(n_rules, dtype=np.float64),
        }
        self._pointers = {name: _pointer(array) for name, array in arrays.items()}  # which keep them
        self._native_pools = ffi.new("edge_pool[]", n_rules)
        self.pools = [Pool(self.n_sampled, 0, ffi.addressof(self._native_pools, i)) for i in range(n_rules)]
        shape = {"n_blocks": experts.n_blocks, "n_expert": experts.n_expert, "stride": stride, "n_rules": n_rules}
        given = {"last": last, "smoothing": smoothing, "hysteresis": hysteresis, "pools": self._native_pools}
        self._struct: Any = ffi.new("edge_duel *", {**shape, **given, **self._pointers})
        self._ids, self._scores = _Ids(), _Scores(experts.total)

    @property
    def best(self) -> int:
        """The rule that is followed."""
        return int(self._struct.best)

    def score(self, scores: Floats) -> None:
        status = self._lib.edge_duel_score(self._struct, self._scores.of(scores))
        if status:
            check(status)

    def observe(self, routing: Routing) -> None:
        status = self._lib.edge_duel_observe(self._struct, self._ids.of(routing))
        if status:
            check(status)

    def read(self, routing: Routing) -> None:
        """How often a prompt's tokens demanded experts; -1 where that is not known."""
        check(self._lib.edge_duel_read(self._struct, self._ids.of(routing)))
