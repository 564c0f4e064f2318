"""Comparison of policies: one row per policy, printed as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edge_speq.errors import EdgeError
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.learned.network_file import LEARN, Weights
from edge_speq.simulate.bounds import Bounds, bounds
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.placement import slots_for
from edge_speq.simulate.replay import Replay, ReplayOutcome
from edge_speq.simulate.window_quality import window
from edge_speq.trace import Step, Trace

Row = dict[str, Any]
WINDOW = 4  # tokens over which the quality of predictions is computed


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    policies: Sequence[str]
    shares: Sequence[float]
    link_bytes_per_s: int
    block_ms: float | None = None  # None: half of the transfer time of an expert, as in the engine's deterministic mode
    draft_ms: float | None = None  # per draft token; None: the compute time of a step, as for a draft of equal size
    cpu_ms: float | None = None  # per expert on the CPU
    governed: bool = False
    by_class: bool = False
    foresight: Weights | None = None  # trained predictor, for policies auto and learned


def simulate(
    traces: Sequence[Trace], options: SimulateOptions, said: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Return a row for each policy and one for Belady's rule, per trace, share and class of texts.

    A share that is too small for a trace's draft length is reported through `said` and skipped. Raises EdgeError if
    every share was skipped.
    """
    if "learned" in options.policies and options.foresight is None:
        raise EdgeError("policy learned needs a trained predictor", LEARN, usage=True)
    rows: list[Row] = []
    refused = None
    for trace in traces:
        for share in options.shares:
            try:
                context = make_setting(trace, share, options)
            except EdgeError as error:
                refused = error
                said(f"{trace.path.name}: {error.message}")
                continue
            for domain, steps in _classes(trace, options.by_class):
                rows += _rows(trace, steps, domain, share, context, options)
    if not rows and refused is not None:
        raise refused
    return rows


def make_setting(trace: Trace, share: float, options: SimulateOptions) -> PolicyContext:
    experts = trace.experts
    if not experts.n_blocks:
        raise EdgeError(f"{trace.path} is of a model without routed experts", "record a MoE")
    learned = options.foresight
    if learned is not None:
        learned.require(experts, trace.draft_experts)
    slots = slots_for(experts, share, trace.k_max)
    link = options.link_bytes_per_s
    made = PolicyContext.nominal(experts, slots, trace.k_max, link, learned, has_twin=_has_twin(trace))
    if options.block_ms is not None:
        draft_ms = options.block_ms * experts.n_blocks if trace.k_max else 0.0
        made = dataclasses.replace(made, block_ms=options.block_ms, draft_ms=draft_ms)
    return made if options.draft_ms is None else dataclasses.replace(made, draft_ms=options.draft_ms)


def _has_twin(trace: Trace) -> bool:
    """Return true if the draft is a twin: a draft with the target's experts. Old traces only show its routing."""
    return bool(trace.meta.get("is_twin", any(step.foreseen is not None for step in trace.steps)))


def _classes(trace: Trace, by_class: bool) -> Iterator[tuple[str, Sequence[Step]]]:
    if by_class:
        for domain in dict.fromkeys(trace.domains):
            yield domain, trace.of_domain(domain)
    yield "all", trace.steps


def _rows(
    trace: Trace, steps: Sequence[Step], domain: str, share: float, context: PolicyContext, options: SimulateOptions
) -> Iterator[Row]:
    costs = StepCosts.of_setting(context)
    if options.cpu_ms is not None:
        costs = dataclasses.replace(costs, cpu_ms=options.cpu_ms)
    best = bounds(steps, context, costs)
    timed = {"governed": options.governed, "drafts": options.governed}
    lru = Replay("lru", context, costs).run(steps)
    quality = window(steps, trace.experts, WINDOW) if context.has_twin else None
    about = {
        "trace": trace.path.name,
        "domain": domain,
        "resident": share,
        "slots": sum(context.slots),
        "k": trace.k_max,
        "link_bytes_per_s": context.link_bytes_per_s,
    }
    yield about | _belady_row(best, lru)
    for name in options.policies:
        outcome = lru if name == "lru" else Replay(name, context, costs, **timed).run(steps)
        row = about | _row(outcome, lru, best)
        if quality is not None:
            row["foresight"] = dataclasses.asdict(quality)
        yield row


def _row(outcome: ReplayOutcome, lru: ReplayOutcome, best: Bounds) -> Row:
    c, parts = outcome.counters, outcome.parts
    misses = c.misses or 0
    return {
        "policy": outcome.policy,
        "lossy": outcome.lossy,
        "hits": (c.hits or 0) // parts,
        "misses": misses // parts,
        "late": c.late // parts,
        "hit_rate": c.hit_rate,
        "cpu_computed": c.cpu_computed,
        "prefetched": c.prefetched,
        "prefetched_used": c.prefetched_used,
        "bytes_fetched": c.bytes_fetched,
        "bytes_wasted": c.bytes_wasted,
        "prefetch_wasted": 1 - c.prefetched_used / c.prefetched if c.prefetched else None,
        "stall_ms": c.stall_ms,
        "miss_gap": _closed(lru.counters.misses, misses / parts, best.belady.misses),
        "read_gap": _closed(lru.counters.bytes_fetched, c.bytes_fetched, best.belady.bytes_fetched),
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "mean_draft_tokens": outcome.mean_draft_tokens,
        "acceptance": outcome.accepted / outcome.drafted if outcome.drafted else 0.0,
        "tok_per_s": outcome.tok_per_s,
        "bound_fraction": outcome.tok_per_s / best.tok_per_s if best.tok_per_s else None,
        "kept_pairs": outcome.kept_pairs,
        "failed": outcome.failed,
        **{f"foresight_{name}": value for name, value in (outcome.foreseen or {}).items()},
    }


def _belady_row(best: Bounds, lru: ReplayOutcome) -> Row:
    bound = ReplayOutcome(
        "belady", False, best.belady, lru.steps, best.tokens, lru.drafted, lru.accepted, best.overlap_ms
    )
    return _row(bound, lru, best)


def _closed(lru: float | None, value: float, best: float | None) -> float | None:
    """Return the share of the gap between LRU and Belady that a policy closes; None without a gap."""
    if lru is None or best is None or lru <= best:
        return None
    return (lru - value) / (lru - best)


# --- formats ---------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| trace | class | resident | K | policy | hit rate | misses | miss gap closed | read gap closed | MB read "
        "| wasted | foreseen: precision, recall, tokens ahead | stall, ms | k | tok/s | of bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["policy"] + (" (lossy)" if row["lossy"] else "") + (" FAILED" if row["failed"] else "")
        wasted = row["bytes_wasted"] / row["bytes_fetched"] if row["bytes_fetched"] else 0.0
        lines.append(
            f"| {row['trace']} | {row['domain']} | {row['resident']:.3g} | {row['k']} | {name} "
            f"| {_share(row['hit_rate'])} | {row['misses']} | {_share(row['miss_gap'])} | {_share(row['read_gap'])} "
            f"| {row['bytes_fetched'] / 1e6:.0f} | {_share(wasted)} | {_foreseen(row)} | {row['stall_ms']:.1f} "
            f"| {row['mean_draft_tokens']:.2f} | {row['tok_per_s']:.0f} "
            f"| {_share(row['bound_fraction'])} |"
        )
    failed = [f"\n{row['policy']} failed and lru took over: {row['failed']}" for row in rows if row["failed"]]
    return "\n".join(lines + list(dict.fromkeys(failed)))


def _foreseen(row: Row) -> str:
    if "foresight_precision" not in row:
        return ""
    figures = (row[f"foresight_{name}"] for name in ("precision", "recall"))
    return ", ".join([*(f"{figure:.2f}" for figure in figures), f"{row['foresight_lead_tokens']:.1f}"])


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def as_csv(rows: Sequence[Row]) -> str:
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue().rstrip("\n")


def _flat(row: Row) -> Row:
    rest = {name: value for name, value in row.items() if name != "foresight"}
    return rest | {f"foresight_{name}": value for name, value in row.get("foresight", {}).items()}


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps(_without_nan(list(rows)))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {"md": markdown, "csv": as_csv, "json": as_json}
