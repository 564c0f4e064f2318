"""Presets: the published systems and ours as policy objects that a replay runs side by side.

base       what a policy is; LRU, and a predictor as a policy
learned    foresight that was trained, and `auto` with a file of it      waits   while the twin drafts
oracle     foresight that is never wrong: a recorded trace               duel    while nothing drafts
published  MoE-SpeQ, SP-MoE, SpecMoEOff, MoE-SpAc, MoE-Prism, MoE-Spec, Cascade    governors   draft lengths
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from edge_speq.errors import EdgeError
from edge_speq.policies import prediction
from edge_speq.policies.auto import Auto
from edge_speq.policies.base import CpuMoe, Foreseeing, Policy
from edge_speq.policies.context import PolicyContext, Slots
from edge_speq.policies.learned import network_file
from edge_speq.policies.learned.policy import Learning
from edge_speq.policies.next_use import NextUse
from edge_speq.policies.oracle import Oracle
from edge_speq.policies.published.systems import CascadePolicy, MoePrism, MoeSpac, MoeSpec, MoeSpeq, SpecMoeOff, SpMoe
from edge_speq.policies.set_dueling import SetDueling
from edge_speq.units import require_choice

log = logging.getLogger("edge_speq")


def _auto(context: PolicyContext) -> Policy:
    if context.learned is not None:
        return Learning(context)
    return Auto(context) if context.has_twin else SetDueling(context)


def _twin(context: PolicyContext) -> Policy:
    experts = context.experts
    return Foreseeing(context, "twin", prediction.choose(experts, experts if context.has_twin else None))


def _lfru(context: PolicyContext) -> Policy:
    return Foreseeing(context, "lfru", prediction.choose(context.experts, None))


def _waits_keep(context: PolicyContext) -> Policy:
    return NextUse(context, fetches=False)


def _learned(context: PolicyContext) -> Policy:
    """Without a file it can only count; who takes its name from a user refuses that."""
    made: Policy = Learning(context, alone=True) if context.learned is not None else _lfru(context)
    made.name = "learned"
    return made


PRESETS: dict[str, Callable[[PolicyContext], Policy]] = {
    "lru": Policy,
    "lfru": _lfru,
    "auto": _auto,
    "twin": _twin,
    "waits": NextUse,
    "waits-keep": _waits_keep,
    "learned": _learned,
    "oracle": Oracle,
    "moe-speq": MoeSpeq,
    "sp-moe": SpMoe,
    "specmoeoff": SpecMoeOff,
    "moe-spac": MoeSpac,
    "moe-prism": MoePrism,
    "moe-spec": MoeSpec,
    "cascade": CascadePolicy,
    "cpu-moe": CpuMoe,
}


def make(name: str, context: PolicyContext) -> Policy:
    """The policy of that name. Raises EdgeError for another name."""
    require_choice("policy", name, tuple(PRESETS))
    return PRESETS[name](context)


def live(name: str, context: PolicyContext, *, is_fixed: bool, has_clock: bool, is_limited: bool = False) -> Policy:
    """That policy for the engine: without its own governor where the draft length is fixed, or where it would follow
    a clock and there is none. Raises EdgeError for another name, and for one whose governor knows no latency limit
    where the engine `is_limited` by one."""
    policy = make(name, context)
    if policy.needs_twin and not context.has_twin:
        log.warning("policy %s looks at the routing of a low-bit copy as draft: without one it is lru", policy.name)
    if policy.governor is not None and (is_fixed or (policy.governor.is_timed and not has_clock)):
        policy.governor = None
    if policy.governor is not None and is_limited:
        raise EdgeError(
            f"policy {policy.name} chooses draft lengths by a rule of its own, which knows no latency_limit_ms",
            "leave one of them out, or give a fixed speculation",
            usage=True,
        )
    return policy


def readers(policies: Sequence[str]) -> tuple[str, ...]:
    """Which policies read the file of --foresight where these run: it is a trace for `oracle`, learned for others.
    Raises EdgeError where both would be needed."""
    if Oracle.name not in policies:
        return network_file.READERS
    if "learned" in policies:
        raise EdgeError("policies oracle and learned read files of two kinds", "leave one of them out", usage=True)
    return (Oracle.name,)


def names(text: str) -> Sequence[str]:
    """The presets of a list like "lru,auto", all of them for "all". Raises EdgeError for a name that is none."""
    found = list(PRESETS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in found:
        require_choice("policy", name, tuple(PRESETS))
    return list(dict.fromkeys(found))


__all__ = ["PRESETS", "Policy", "PolicyContext", "Slots", "live", "make", "names", "readers"]
