"""All policies by name, for the engine, bench and simulate.

base         the interface; LRU; a predictor as a policy      next_use     `waits`, which `auto` uses with a twin
set_dueling  `auto` without a twin                            learned      `learned`; `auto` with a predictor
oracle       perfect prediction from a recorded trace
published    MoE-SpeQ, SP-MoE, SpecMoEOff, MoE-SpAc, MoE-Prism, MoE-Spec and Cascade, with their draft lengths
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
    """Return `learned`. Without a predictor it falls back to lfru; load_for_policy() refuses that for users."""
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
    """Return a new policy by name. Raises EdgeError if the name is unknown."""
    require_choice("policy", name, tuple(PRESETS))
    return PRESETS[name](context)


def live(name: str, context: PolicyContext, *, is_fixed: bool, has_clock: bool, is_limited: bool = False) -> Policy:
    """Return a new policy for the engine.

    Args:
        name: the policy's name.
        context: facts about the machine and the model.
        is_fixed: the draft length is fixed, so the policy's own rule is dropped.
        has_clock: False in virtual time, in which timed rules are dropped.
        is_limited: the engine has a latency limit.

    Raises EdgeError if the name is unknown, or if the policy's own draft-length rule would ignore a latency limit.
    """
    policy = make(name, context)
    if policy.needs_twin and not context.has_twin:
        log.warning("policy %s looks at the routing of a low-bit copy as draft: without one it is lru", policy.name)
    if policy.governor is not None and (is_fixed or (policy.governor.is_timed and not has_clock)):
        policy.governor = None
    if policy.governor is not None and is_limited:
        raise EdgeError(
            f"policy {policy.name} has its own rule for draft lengths, which does not support latency_limit_ms",
            "leave one of them out, or give a fixed draft_tokens",
            usage=True,
        )
    return policy


def readers(policies: Sequence[str]) -> tuple[str, ...]:
    """Return the policies that read a file when these run: `oracle` reads a trace, others a trained predictor.

    Raises EdgeError if both kinds of file would be needed.
    """
    if Oracle.name not in policies:
        return network_file.READERS
    if "learned" in policies:
        raise EdgeError("policies oracle and learned read different kinds of file", "leave one of them out", usage=True)
    return (Oracle.name,)


def names(text: str) -> Sequence[str]:
    """Parse a list of policies like "lru,auto"; "all" names every one. Raises EdgeError if a name is unknown."""
    found = list(PRESETS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in found:
        require_choice("policy", name, tuple(PRESETS))
    return list(dict.fromkeys(found))


__all__ = ["PRESETS", "Policy", "PolicyContext", "Slots", "live", "make", "names", "readers"]
