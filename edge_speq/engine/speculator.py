"""Drafting and prefetching around each verify step: a draft, its length controller and a policy work together here."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.core import Speculation
from edge_speq.drafting.base import Draft, Routing, Text
from edge_speq.engine.draft_length.controller import DraftLengthController
from edge_speq.engine.draft_length.lookahead_depth import LookaheadDepth
from edge_speq.policies.base import Policy
from edge_speq.policies.context import Slots
from edge_speq.policies.draft_routing import Quality
from edge_speq.policies.prediction import NO_REQUESTS, Scores
from edge_speq.policies.published.draft_lengths import DraftLengthRule as AnyGovernor
from edge_speq.policies.published.draft_lengths import roofline

log = logging.getLogger("edge_speq")

SMOOTHING = 0.9
TELL_EVERY = 16  # steps between two calls of Policy.measured


class AdmittingSlots:
    """The hook's slots when misses are not fetched: prefetch() appends the policy's admissions to its requests."""

    def __init__(self, hook: _native.Hook, policy: Policy) -> None:
        self._hook, self._policy = hook, policy

    @property
    def scores(self) -> Scores:
        return self._hook.scores

    def states(self) -> npt.NDArray[np.uint8]:
        return self._hook.states()

    def prefetch(self, requests: npt.NDArray[Any], byte_budget: int = _native.NO_BUDGET, margin: float = 0.0) -> int:
        earned = self._policy.admissions(self._hook).copy()  # the array belongs to the policy
        earned["priority"] += margin  # admissions already include their own margin
        combined = np.concatenate([requests[: None if byte_budget else 0], earned])
        return self._hook.prefetch(combined, _native.NO_BUDGET, margin)


class Speculator:
    """Combines a draft, the controller of its length, and a policy that turns routing into prefetches.

    Args:
        draft: proposes tokens; None decodes without speculation.
        governor: chooses the draft length, unless the policy has its own rule.
        policy: scores experts and requests prefetches; None or no hook means no prefetching.
        hook: the native slots of the target.
        n_vocab: tokens of the target's vocabulary.
        admits: misses are not fetched on demand, so the policy's admissions are prefetched too.
        virtual: transfers take virtual time, so nothing may depend on measured time.

    If the policy raises, it is logged, counted in `failures`, and replaced by lru; the request continues.
    """

    def __init__(
        self,
        *,
        draft: Draft | None,
        governor: DraftLengthController,
        policy: Policy | None,
        hook: _native.Hook | None,
        n_vocab: int,
        admits: bool = False,
        virtual: bool = False,
    ) -> None:
        self.counts = Speculation()
        self.failures = 0
        self.depth = LookaheadDepth(fixed=virtual)
        self._draft, self._governor, self._hook = draft, governor, hook
        self._policy = policy if hook is not None else None
        self._admits, self._virtual, self._n_vocab = admits, virtual, n_vocab
        self._k_max = governor.k_max
        if self._policy is not None:
            governor.expect(roofline(self._policy.context))
        me = weakref.ref(self)  # a reference cycle would keep the draft until the garbage collector runs
        governor.unread = lambda: 0 if (own := me()) is None else own._unread()
        self._text: Text = np.zeros(0, dtype=np.intc)  # before the step
        self._seen_from: int | None = None  # position from which the draft sees the text during a probe
        self._tokens: list[int] = []  # of the step: the last one of text, then the drafted ones
        self._routing: Routing | None = None  # the draft's, of the drafted tokens and of some after them
        self._n_drafted = 0
        self._looks_further = False  # the policy uses routing beyond the drafted tokens
        self._is_first = True  # first step of the request, in which the draft reads the prompt
        self._draft_seconds = self._waited = 0.0
        self._draft_ms = self._block_ms = 0.0  # moving averages
        self._n_measured = 0

    def limit(self, k_max: int) -> None:
        """Draft at most k_max tokens per step from now on."""
        self._k_max = self._governor.k_max = k_max

    def resized(self, slots: tuple[int, ...]) -> None:
        """Tell the policy the new slot count of each expert group."""
        if self._policy is not None:
            self._safely(self._policy.resized, slots)

    @property
    def name(self) -> str:
        """The policy's source of predictions, as in Policy.sees."""
        return self._policy.sees if self._policy is not None else "none"

    @property
    def policy(self) -> str:
        """The name of the policy in use, "lru" after a failure."""
        return self._policy.name if self._policy is not None else "none"

    @property
    def quality(self) -> Quality | None:
        """Prediction quality of the policy; None if it does not predict demands."""
        return self._policy.quality if self._policy is not None else None

    @property
    def foreseen(self) -> dict[str, float] | None:
        """Summary of `quality` over all blocks; None before the first predicted step."""
        quality = self.quality
        return quality.summary() if quality is not None and quality.n_steps else None

    def begin(self) -> None:
        """Start a new request."""
        self._is_first, self._seen_from = True, None
        self._governor.begin()
        if self._draft is not None:
            self._draft.begin()

    # --- before the step -------------------------------------------------------------------------------

    def draft(self, text: Text, room: int, sampler: object) -> list[int]:
        """Return at most `room` drafted tokens that may continue text, all within the target's vocabulary."""
        self.counts.steps += 1
        self._routing, self._n_drafted, self._draft_seconds = None, 0, 0.0
        self._waited = self._seconds_waited()
        self._text = text
        self._tokens = [int(token) for token in text[-1:]]
        k = min(room, self._k_max, self._length())
        if self._draft is None or k <= 0:
            self._seen_from = None
            return []
        started = time.perf_counter()
        drafted, routing = self._draft.propose(self._shown(text), k, sampler, self._further(k), self._watcher())
        self._draft_seconds = time.perf_counter() - started
        if self._reads_draft:
            self._routing = routing
        # the draft's vocabulary may have more padding tokens; tokens drafted after one of those are useless
        unknown = next((i for i, token in enumerate(drafted) if not 0 <= token < self._n_vocab), None)
        drafted = drafted[:unknown]
        self._n_drafted = len(drafted)
        self._tokens += drafted
        self.counts.drafted += len(drafted)
        return drafted

    def _shown(self, text: Text) -> Text:
        """Return the part of the text that the draft sees: all of it, except during a probe."""
        if not self._governor.is_probe:
            self._seen_from = None
            return text
        if self._seen_from is None:
            self._seen_from = len(text) - 1
        return text[self._seen_from :]

    def _unread(self) -> int:
        """Return the tokens of text that the draft must read before it can draft."""
        own = self._policy.governor if self._policy is not None else None
        return 0 if self._draft is None or own is not None else self._draft.unread(self._text)

    @property
    def _reads_draft(self) -> bool:
        return self._policy is not None and self._policy.reads_draft

    def _length(self) -> int:
        own = self._policy.governor if self._policy is not None else None
        return self._governor.k() if own is None else int(self._safely(own.k) or 0)

    def _further(self, k: int) -> int:
        """Return the tokens that the draft decodes beyond its proposal, for their routing."""
        if self._policy is None or not self._reads_draft:
            return 0
        useful = self._safely(self._policy.ahead, k)
        self._looks_further = bool(useful)
        return self.depth.limit(useful) if useful else 0

    def _watcher(self) -> Callable[[Routing], None] | None:
        """Return the policy's callback for each drafted token, if it has one. None in virtual time, which stands still
        while the draft runs."""
        policy = self._policy
        if (
            policy is None
            or self._virtual
            or not self._reads_draft
            or type(policy).on_draft_token is Policy.on_draft_token
        ):
            return None

        def seen(routing: Routing) -> None:
            if self._policy is policy:
                self._safely(policy.on_draft_token, self._slots(policy), routing)

        return seen

    def plan_prefetch(self) -> None:
        """Let the policy score the experts and request prefetches for the verify step."""
        policy, hook = self._policy, self._hook
        if policy is None or hook is None or type(policy) is Policy:
            return
        hook.are_finite = None
        try:  # inline instead of _safely: caches are cold between two decodes, so a further call takes over 1 us
            policy.on_verify_begin(self._tokens)
            policy.plan_prefetch(self._slots(policy) if self._admits else hook, self._routing, self._n_drafted)
            if not (np.isfinite(hook.scores).all() if hook.are_finite is None else hook.are_finite):
                raise ValueError("its scores are not finite")
        except Exception as error:  # a policy may be third-party code
            self._replace(f"{type(error).__name__}: {error}")

    def _slots(self, policy: Policy) -> Slots:
        assert self._hook is not None
        return AdmittingSlots(self._hook, policy) if self._admits else self._hook

    # --- after the step --------------------------------------------------------------------------------

    def observe(self, n_tokens: int, n_accepted: int) -> None:
        """Pass the routing of a decode of n_tokens to the policy; n_accepted drafted tokens became text."""
        policy, hook = self._policy, self._hook
        if policy is None or hook is None or type(policy) is Policy:
            return
        routing = hook.routing()
        if routing.shape[1] != n_tokens:  # a prompt, whose routing covers only its last batch
            self._safely(self._on_prefill, policy, hook)
            return
        try:
            policy.observe(routing, n_accepted)
        except Exception as error:
            self._replace(f"{type(error).__name__}: {error}")

    @staticmethod
    def _on_prefill(policy: Policy, hook: _native.Hook) -> None:
        routing = hook.prefill_routing()
        if routing.shape[1]:
            policy.on_prefill(routing)

    def govern(self, kept: int, *, mismatch: bool, seconds: float | None) -> None:
        """Pass the outcome of a verify step to the draft-length controller. seconds: None if not comparable."""
        own: AnyGovernor | None = self._policy.governor if self._policy is not None else None
        self._governor.observe(kept, mismatch=mismatch, seconds=seconds, drafted=self._n_drafted)
        if own is not None:
            self._safely(lambda: own.observe(kept, mismatch=mismatch, seconds=seconds))
        if seconds is not None and not self._virtual:
            if not self._is_first:
                self._measure(seconds)
            self._is_first = False

    def _measure(self, seconds: float) -> None:
        if self._policy is None or not self._n_drafted:
            return
        waited = self._seconds_waited() - self._waited
        if self._looks_further:
            self.depth.observe(self._n_drafted, self._draft_seconds + waited)
        own = (seconds - self._draft_seconds - waited) / self._policy.context.experts.n_blocks
        self._n_measured += 1
        weight = max(1 - SMOOTHING, 1 / self._n_measured)
        self._draft_ms += weight * (1e3 * self._draft_seconds / self._n_drafted - self._draft_ms)
        self._block_ms += weight * (1e3 * max(own, 0.0) - self._block_ms)
        if self._n_measured % TELL_EVERY == 0:
            self._safely(self._policy.measured, self._draft_ms, self._block_ms)

    def _seconds_waited(self) -> float:
        """Return the total seconds that the target waited for transfers or for experts on the CPU."""
        if self._hook is None or self._virtual or not self._reads_draft:
            return 0.0
        counters = self._hook.counters()
        return (counters.stall_ms + counters.cpu_ms) / 1e3

    def _safely(self, act: Callable[..., Any], *arguments: Any) -> Any:
        """Call the policy. If it raises, replace it and return None."""
        try:
            return act(*arguments)
        except Exception as error:  # a policy may be third-party code
            self._replace(f"{type(error).__name__}: {error}")
            return None

    def _replace(self, reason: str) -> None:
        assert self._policy is not None and self._hook is not None
        log.warning("policy %s failed, lru takes over: %s", self._policy.name, reason)
        self.failures += 1
        self._policy = Policy(self._policy.context)
        self._hook.scores[:] = 0
        self._hook.prefetch(NO_REQUESTS)

    def shift(self, n_keep: int, n_discard: int) -> None:
        """Follow the target's context shift: n_discard tokens after the first n_keep were removed."""
        self._seen_from = None
        if self._draft is not None:
            self._draft.shift(n_keep, n_discard)

    def memory_used(self) -> int:
        """Return the bytes on the compute device of the draft and the slots."""
        used = self._draft.memory_used() if self._draft is not None else 0
        return used + (self._hook.bytes_held() if self._hook is not None else 0)
