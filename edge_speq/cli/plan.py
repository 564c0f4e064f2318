"""edge-speq plan: what a model would hold where under a budget, without loading its weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_speq.cli import arguments
from edge_speq.cli.inspect import summarize
from edge_speq.gguf_model import check_model

if TYPE_CHECKING:
    from edge_speq.core import Plan
    from edge_speq.survey import Request, Survey

NO_GPU = "no GPU: the CPU computes, and weights, which are mapped file pages, are not counted"


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="what would go where",
        description="What a model would hold on the compute device, with the arguments of run. Loads no weights.",
    )
    arguments.add_model(p)
    arguments.add_output(p, json="print one JSON object")
    p.set_defaults(command=plan)


def plan(options: argparse.Namespace) -> int:
    from edge_speq import survey

    arguments.with_demo_defaults(options)
    wanted = survey.request(options.model, **arguments.edge_options(options))
    model_params, context_params = native_params(options)
    draft_params, _keep_alive = survey.prepare(wanted, model_params, context_params)
    found = survey.survey(wanted, model_params, draft_params, context_params)
    summary = summarize_plan(wanted, found, survey.decide(wanted, found), context_params.n_ctx)
    print(json.dumps(summary) if options.json else report(summary))
    return 0


def native_params(options: argparse.Namespace) -> tuple[Any, Any]:
    """The parameters of model and context that llama_cpp.Llama makes of the same arguments, as it makes them."""
    from llama_cpp import Llama

    class Params(Llama):  # type: ignore[misc]  # llama_cpp is not strictly typed
        _redirect_output = False

        def _configure(self, model_params: Any, context_params: Any) -> None:
            made.extend((model_params, context_params))
            raise _NotLoadedError

    made: list[Any] = []
    try:
        Params(options.model, n_gpu_layers=-1, verbose=False, **arguments.llama_options(options))
    except _NotLoadedError:
        return made[0], made[1]
    raise AssertionError("llama_cpp.Llama calls _configure before it loads")


class _NotLoadedError(Exception):
    pass


def summarize_plan(wanted: Request, found: Survey, decided: Plan, n_ctx: int) -> dict[str, Any]:
    experts, on_gpu = found.experts, wanted.device.is_gpu
    slots = decided.slots or (0,) * len(experts.groups)
    resident = experts.total_bytes if decided.policy == "all" and on_gpu else decided.slot_bytes
    drafts = wanted.draft is not None and decided.k_max > 0  # a plan may do without the draft
    fixed = found.target.total + (found.draft.total if drafts else 0)
    # the routing leaves and padding that a plan counts besides what was surveyed
    overhead = decided.fixed_bytes - fixed if decided.fixed_bytes else 0
    return {
        "model": _file(wanted.model),
        "draft": None if wanted.draft is None else _file(wanted.draft),
        "n_ctx": n_ctx,
        "device": dataclasses.asdict(wanted.device),
        "memory": {
            "target": _memory(found.target),
            "draft": _memory(found.draft) if drafts else None,
            "overhead_bytes": overhead,
            "expert_bytes": resident,
            "total_bytes": fixed + overhead + resident,
            "budget_bytes": decided.budget_bytes,
        },
        "groups": [
            dataclasses.asdict(group) | {"slots": n, "slot_bytes": n * group.expert_bytes}
            for n, group in zip(slots, experts.groups, strict=True)
        ],
        "plan": dataclasses.asdict(decided),
    }


def _file(path: Path) -> dict[str, Any]:
    summary = summarize(check_model(path))
    return {
        "path": str(path),
        "dense_bytes": summary["dense_bytes"],
        "expert_bytes": summary["experts"]["total_bytes"],
    }


def _memory(used: Any) -> dict[str, int]:
    return {**dataclasses.asdict(used), "total_bytes": used.total}


def report(summary: dict[str, Any]) -> str:
    device, memory, decided = summary["device"], summary["memory"], summary["plan"]
    where = (
        ""
        if device["is_gpu"]
        else "; no GPU: the CPU computes, and weights, which are mapped file pages, are not counted"
    )
    bound = "no budget" if memory["budget_bytes"] is None else f"of a budget of {_mib(memory['budget_bytes'])}"
    lines = [
        f"plan       {decided['reason']}",
        f"device     {device['name']} ({device['description']}), {_mib(device['free_bytes'])} of "
        f"{_mib(device['total_bytes'])} free{where}",
        *_parts(summary),
        *_experts(summary),
        f"sum        {_mib(memory['total_bytes'])}, {bound}",
        f"draft      {_speculation(summary)}",
    ]
    return "\n".join(lines)


def _parts(summary: dict[str, Any]) -> list[str]:
    """One line for each kind of memory that is not experts, target and draft side by side."""
    memory, lines = summary["memory"], []
    names = {"dense": "model_bytes", "KV": "context_bytes", "compute": "compute_bytes"}
    for name, key in names.items():
        parts = [f"{_mib(memory['target'][key])} target"]
        if memory["draft"] is not None:
            parts.append(f"{_mib(memory['draft'][key])} draft")
        if name == "dense" and not summary["device"]["is_gpu"]:
            files = [summary["model"]["dense_bytes"]]
            if memory["draft"] is not None:
                files.append(summary["draft"]["dense_bytes"] + summary["draft"]["expert_bytes"])
            parts.append(f"{' and '.join(_mib(n) for n in files)} not counted")
        lines.append(f"{name:10} {', '.join(parts)}")
    if memory["overhead_bytes"]:
        lines.append(f"routing    {_mib(memory['overhead_bytes'])} with padding")
    return lines


def _experts(summary: dict[str, Any]) -> list[str]:
    policy, groups = summary["plan"]["policy"], summary["groups"]
    if policy != "slots":
        total = _mib(sum(group["n_experts"] * group["expert_bytes"] for group in groups))
        where = {"all": "all resident", "cpu-moe": "computed on the CPU"}[policy]
        return [f"experts    {total}, {where}"] if groups else []
    return [
        f"{'experts' if group is groups[0] else '':10} {group['slots']} of {group['n_experts']} in slots, "
        f"{_mib(group['slot_bytes'])}: {group['n_blocks']} blocks with {_mib(group['expert_bytes'])} an expert"
        for group in groups
    ]


def _speculation(summary: dict[str, Any]) -> str:
    if summary["draft"] is None:
        return "none"
    k = summary["plan"]["k_max"]
    return f"up to {k} tokens a step" if k else "not loaded: the slots would be too few"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.2f} MiB"
