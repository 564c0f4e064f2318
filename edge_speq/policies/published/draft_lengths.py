"""Published rules for the draft length. The engine's own rule is edge_speq.engine.draft_length.controller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from edge_speq.policies.context import PolicyContext

SMOOTHING = 0.9


class DraftLengthRule(Protocol):
    """Chooses the draft length of each step."""

    is_timed: bool  # True: it depends on the seconds of steps

    def k(self) -> int:
        """Return the number of tokens to draft in the next step."""

    def observe(self, accepted: int, *, mismatch: bool, seconds: float | None = None) -> None:
        """Learn from one verify step.

        Args:
            accepted: drafted tokens that the target accepted.
            mismatch: True if the target rejected the next drafted token.
            seconds: time to draft and verify; None if not comparable.
        """


class Fixed:
    """Always drafts k tokens."""

    is_timed = False

    def __init__(self, k: int) -> None:
        self._k = k

    def k(self) -> int:
        return self._k

    def observe(self, accepted: int, *, mismatch: bool, seconds: float | None = None) -> None: ...


class Cascade:
    """Test-and-set of Cascade (arXiv 2506.20675).

    A test phase tries up to TRIALS lengths in ascending order, for TEST steps each. It stops once the utility
    U = tokens / (seconds / seconds without a draft) no longer grows. The best length is set for SET steps. If no length
    reaches U = 1, nothing is drafted, and SET doubles.
    """

    is_timed = True
    TEST, SET, TRIALS = 4, 16, 4
    ALIKE = 0.1  # utilities closer than this end the climb
    BASE_EVERY = 100  # steps after which the base is measured again

    def __init__(self, k_max: int) -> None:
        self._k_max = k_max
        self._base: float | None = None
        self._steps_since_base = 0
        self._set = self.SET
        self._tried: dict[int, float] = {}
        self._begin(0, self.TEST, testing=True)

    def k(self) -> int:
        return self._k

    def observe(self, accepted: int, *, mismatch: bool, seconds: float | None = None) -> None:
        if seconds is None or not self._k_max:
            return
        self._seconds += seconds
        self._tokens += accepted + 1
        self._left -= 1
        self._steps_since_base += 1
        if self._left == 0:
            self._turn()

    def _begin(self, k: int, steps: int, *, testing: bool) -> None:
        self._k, self._left, self._testing = k, steps, testing
        self._seconds, self._tokens = 0.0, 0

    def _turn(self) -> None:
        if not self._testing:
            self._tried = {}
            stale = self._steps_since_base >= self.BASE_EVERY
            self._begin(0 if stale else 1, self.TEST, testing=True)
        elif self._k == 0:
            self._base, self._steps_since_base = self._seconds / self._tokens, 0
            self._begin(1, self.TEST, testing=True)
        else:
            self._climb()

    def _climb(self) -> None:
        assert self._base is not None
        utility = self._tokens * self._base / self._seconds if self._seconds else 1.0
        before = list(self._tried.values())[-1:]
        self._tried[self._k] = utility
        stops = (self._k == 1 and utility < 1) or len(self._tried) >= self.TRIALS or self._k >= self._k_max
        if before:
            stops = stops or utility < before[0] or abs(utility - before[0]) < self.ALIKE * before[0]
        if not stops:
            self._begin(self._k + 1, self.TEST, testing=True)
            return
        best = max(self._tried, key=lambda k: self._tried[k])
        if self._tried[best] < 1:
            self._begin(0, self._set, testing=False)
            self._set *= 2
        else:
            self._set = self.SET
            self._begin(best, self.SET, testing=False)


class Roofline:
    """MoE-SpeQ's Amortization Roofline (arXiv 2511.14102, section 5).

    It chooses the k in [1, k_max] with the largest k_accept(k) / T_cycle(k), where

        k_accept(k) = sum over i of the product of p_j up to i       (p_j: moving average of acceptance at place j)
        T_cycle(k) = max(k * T_draft, T_first) + |E_new(k)| * T_transfer + T_verify

    T_first is one transfer. The paper counts E_new as the lookahead buffer without the cached experts. Here it is the
    moving average of the misses of steps with that k. As published, k is never 0.
    """

    is_timed = False

    def __init__(self, k_max: int, *, draft_ms: float, transfer_ms: float, verify_ms: float) -> None:
        self._k_max = k_max
        self.draft_ms, self.verify_ms, self._transfer_ms = draft_ms, verify_ms, transfer_ms
        self._p = [0.8] * max(1, k_max)
        self._misses: dict[int, float] = {}
        self._k = min(1, k_max)

    def k(self) -> int:
        return self._k

    def missed(self, k: int, n: int) -> None:
        """Record that a step with k drafted tokens had n misses."""
        before = self._misses.get(k, float(n))
        self._misses[k] = SMOOTHING * before + (1 - SMOOTHING) * n

    def observe(self, accepted: int, *, mismatch: bool, seconds: float | None = None) -> None:
        for place in range(min(accepted + mismatch, self._k_max)):
            self._p[place] += (1 - SMOOTHING) * ((place < accepted) - self._p[place])
        if self._k_max:
            self._k = max(range(1, self._k_max + 1), key=self._rate)

    def _rate(self, k: int) -> float:
        accepted, reach = 0.0, 1.0
        for p in self._p[:k]:
            reach *= p
            accepted += reach
        cycle = max(k * self.draft_ms, self._transfer_ms) + self._new(k) * self._transfer_ms + self.verify_ms
        return (accepted + 1) / cycle  # 1: every verify step yields one token of the target

    def _new(self, k: int) -> float:
        """Return the expected misses; for an untried length, scale those of the nearest one by the step's width."""
        if k in self._misses or not self._misses:
            return self._misses.get(k, 0.0)
        near = min(self._misses, key=lambda tried: abs(tried - k))
        return self._misses[near] * (k + 1) / (near + 1)


def roofline(context: PolicyContext) -> list[float]:
    """Return the nominal T_cycle of steps with 0, 1, ... drafted tokens, relative to the first, [k_max + 1].

    It adds drafting, computing, and the transfers of the expected misses if all experts are equally likely.
    """
    experts = context.experts
    resident = min(1.0, sum(context.slots) / max(1, experts.total))
    unused = 1 - experts.n_expert_used / max(1, experts.n_expert)  # probability that a token does not use an expert

    def cycle_ms(k: int) -> float:
        missing = experts.total * (1 - unused ** (k + 1)) * (1 - resident)
        return k * context.draft_ms + experts.n_blocks * context.block_ms + missing * context.transfer_ms

    alone = cycle_ms(0)
    return [cycle_ms(k) / alone if alone else 1.0 for k in range(context.k_max + 1)]
