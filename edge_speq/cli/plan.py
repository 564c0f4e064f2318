"""edge-speq plan: show the memory plan of a model without loading its weights, for this or another machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_speq.cli import arguments
from edge_speq.cli.inspect import summarize
from edge_speq.errors import EdgeError
from edge_speq.gguf.model import EXPERTS, check_model
from edge_speq.units import format_bytes, format_rate, parse_bytes, parse_rate

if TYPE_CHECKING:
    from edge_speq.core import Plan
    from edge_speq.planning.survey import ResolvedRequest, Survey
    from edge_speq.simulate.estimate import Laptop

NO_GPU = "no GPU: the CPU computes; weights are mapped file pages, which are not counted"
LINK = "12.5GB/s"  # PCIe 4 x8
LARGE = (
    32 << 20
)  # bytes of an expert: above, a transfer takes milliseconds, in which the CPU has no other miss to compute


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="show the memory plan of a model",
        description="Shows the memory that a model would use on the compute device, with the arguments of run. Loads "
        "no weights. With --ram or --link-bandwidth it plans for another machine, whose GPU has the memory of --vram, "
        "and estimates bytes and time per token.",
    )
    arguments.add_model(p)
    p.add_argument("--ram", metavar="SIZE", help="memory of the other machine, such as 16GiB")
    p.add_argument("--link-bandwidth", metavar="RATE", help=f"link to the other machine's GPU ({LINK})")
    p.add_argument("--trace", metavar="FILE", help="file of edge-speq trace for the estimate (default: even routing)")
    arguments.add_output(p, json="print one JSON object")
    p.set_defaults(command=plan)


def plan(options: argparse.Namespace) -> int:
    from edge_speq.engine.native_parameters import native_parameters
    from edge_speq.planning import survey
    from edge_speq.planning.load_request import LoadRequest

    arguments.with_demo_defaults(options)
    laptop = _laptop(options)
    request = survey.resolve(LoadRequest(options.model, **arguments.edge_options(options)))
    model_params, context_params = native_parameters(options.model, **arguments.llama_options(options))
    draft_params, _keep_alive = survey.prepare(request, model_params, context_params)
    found = survey.survey(request, model_params, draft_params, context_params)
    if laptop is not None:
        request, found = elsewhere(laptop, request, found)
    decided = survey.decide(request, found)
    summary = summarize_plan(request, found, decided, context_params.n_ctx)
    summary["estimate"] = None if laptop is None else _estimate(options, laptop, found, decided, summary)
    print(json.dumps(summary) if options.json else report(summary))
    return 0


def _laptop(options: argparse.Namespace) -> Laptop | None:
    """Return the other machine, or None for this one. Raises EdgeError if the description is incomplete."""
    from edge_speq.simulate.estimate import THREADS, Laptop

    if options.ram is None and options.link_bandwidth is None:
        if options.trace is not None:
            raise EdgeError(
                "--trace is for an estimate", "describe a machine: --vram, --ram, --link-bandwidth", usage=True
            )
        return None
    if options.vram_budget in (None, "auto"):
        raise EdgeError("another machine needs its --vram", "write it like --vram 6GiB", usage=True)
    ram = None if options.ram is None else parse_bytes(options.ram, "--ram")
    link = parse_rate(options.link_bandwidth or LINK, "--link-bandwidth")
    return Laptop(options.vram_budget, ram, link, options.threads or THREADS)


def elsewhere(laptop: Laptop, request: ResolvedRequest, found: Survey) -> tuple[ResolvedRequest, Survey]:
    """Return the same request and survey for the GPU of another machine.

    Without a GPU here, the bytes of the weights come from the files' headers. KV cache and compute buffers are those
    of the dry load on this machine.
    """
    from edge_speq._native import Device

    gpu = Device("laptop", "a GPU that is not this machine's", True, False, laptop.vram_bytes, laptop.vram_bytes)
    if not request.device.is_gpu:
        draft = found.draft
        if request.draft is not None:
            draft = dataclasses.replace(draft, model_bytes=_on_gpu(request.draft, experts=True))
        target = dataclasses.replace(found.target, model_bytes=_on_gpu(request.model, experts=False))
        found = dataclasses.replace(found, target=target, draft=draft)
    return dataclasses.replace(request, device=gpu), found


def _on_gpu(path: Path, *, experts: bool) -> int:
    """Return the bytes of a file's tensors that llama.cpp puts on a GPU.

    Token embeddings stay on the CPU unless they are also the output matrix.
    """
    tensors = check_model(path).tensors
    skipped = {"token_embd.weight"} if "output.weight" in tensors else set()
    return sum(
        t.n_bytes for t in tensors.values() if t.name not in skipped and (experts or not EXPERTS.fullmatch(t.name))
    )


def _estimate(
    options: argparse.Namespace, laptop: Laptop, found: Survey, decided: Plan, summary: dict[str, Any]
) -> dict[str, Any] | None:
    from edge_speq import trace
    from edge_speq.simulate.estimate import estimate

    experts = found.experts
    if not experts.n_blocks:
        return None
    recorded = None if options.trace is None else trace.read(options.trace)
    used = summary["model"]["dense_bytes"] + experts.total_bytes * experts.n_expert_used / experts.n_expert
    draft = summary["draft"]
    share = 1.0 if draft is None or draft["expert_bytes"] else min(1.0, draft["dense_bytes"] / used)
    return estimate(experts, decided, laptop, recorded, share)


def summarize_plan(request: ResolvedRequest, found: Survey, decided: Plan, n_ctx: int) -> dict[str, Any]:
    experts, on_gpu = found.experts, request.device.is_gpu
    slots = decided.slots or (0,) * len(experts.groups)
    resident = experts.total_bytes if decided.placement == "all" and on_gpu else decided.slot_bytes
    drafts = (
        request.draft is not None or request.draft_spec.itself
    ) and decided.max_draft_tokens > 0  # the plan may drop the draft
    fixed = found.target.total + (found.draft.total if drafts else 0)
    # the plan counts routing buffers and padding in addition to the survey
    overhead = decided.fixed_bytes - fixed if decided.fixed_bytes else 0
    return {
        "model": _file(request.model),
        "draft": _draft(request),
        "n_ctx": n_ctx,
        "device": dataclasses.asdict(request.device),
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
        "advice": _advice(max(g.expert_bytes for g in experts.groups)) if on_gpu and decided.slots else None,
    }


def _advice(expert_bytes: int) -> str | None:
    """Return a change that makes large experts faster (measured in docs/results), or None."""
    parts = 1 << max(0, math.ceil(math.log2(expert_bytes / LARGE)))
    if parts == 1:
        return None
    return (
        f"experts of {format_bytes(expert_bytes)} are so large that CPU and link cannot share the misses of a block: "
        f"split them with edge-speq convert split --sub-experts {parts} --no-profile"
    )


def _file(path: Path) -> dict[str, Any]:
    summary = summarize(check_model(path))
    return {
        "path": str(path),
        "dense_bytes": summary["dense_bytes"],
        "expert_bytes": summary["experts"]["total_bytes"],
    }


def _draft(request: ResolvedRequest) -> dict[str, Any] | None:
    """Return the draft's file and sizes; path "self" if the model drafts for itself."""
    if request.draft is not None:
        return _file(request.draft)
    if not request.draft_spec.itself:
        return None
    twin = request.draft_spec.twin
    path, n_bytes = ("self", 0) if twin is None else (str(twin.path), twin.n_bytes)
    return {"path": path, "dense_bytes": 0, "expert_bytes": n_bytes}


def _memory(used: Any) -> dict[str, int]:
    return {**dataclasses.asdict(used), "total_bytes": used.total}


def report(summary: dict[str, Any]) -> str:
    device, memory, decided = summary["device"], summary["memory"], summary["plan"]
    where = "" if device["is_gpu"] else f"; {NO_GPU}"
    bound = "no budget" if memory["budget_bytes"] is None else f"of a budget of {format_bytes(memory['budget_bytes'])}"
    lines = [
        f"plan       {decided['reason']}",
        f"device     {device['name']} ({device['description']}), {format_bytes(device['free_bytes'])} of "
        f"{format_bytes(device['total_bytes'])} free{where}",
        *_parts(summary),
        *_experts(summary),
        f"sum        {format_bytes(memory['total_bytes'])}, {bound}",
        f"draft      {_speculation(summary)}",
        *([f"advice     {summary['advice']}"] if summary["advice"] else []),
        *_estimated(summary["estimate"]),
    ]
    return "\n".join(lines)


def _estimated(estimate: dict[str, Any] | None) -> list[str]:
    if estimate is None:
        return []
    laptop, each = estimate["laptop"], estimate["per_token"]
    has = "" if laptop["ram_bytes"] is None else f" of {format_bytes(laptop['ram_bytes'])}"
    lines = [f"RAM        {format_bytes(estimate['ram_needed_bytes'])}{has} with 2 GiB for everything else"]
    if each is None:
        return [*lines, f"estimate   none: {estimate['unavailable_reason']}"]
    link = format_rate(laptop["link_bytes_per_s"])
    lines += [
        f"ESTIMATE   not measured: {each['method']}, {link}, a block computes for half of an expert's transfer time",
        f"per token  {format_bytes(each['bytes_fetched'])} fetched of {format_bytes(each['bytes_demanded'])} demanded",
        f"time       {each['total_ms']:.2f} ms: {each['computing_ms']:.2f} computing, {each['waiting_ms']:.2f} waiting",
        f"instead    {each['hybrid_ms']:.2f} ms with hybrid, {each['cpu_moe_ms']:.2f} ms with cpu-moe, "
        f"{laptop['n_threads']} threads",
    ]
    if each["bound_tok_per_s"]:
        lines.append(f"bound      {1e3 / each['bound_tok_per_s']:.2f} ms, with a clairvoyant cache")
    return lines


def _parts(summary: dict[str, Any]) -> list[str]:
    """Return one line for each kind of memory except experts, with target and draft."""
    memory, lines = summary["memory"], []
    names = {"dense": "model_bytes", "KV": "context_bytes", "compute": "compute_bytes"}
    for name, key in names.items():
        parts = [f"{format_bytes(memory['target'][key])} target"]
        if memory["draft"] is not None:
            parts.append(f"{format_bytes(memory['draft'][key])} draft")
        if name == "dense" and not summary["device"]["is_gpu"]:
            files = [summary["model"]["dense_bytes"]]
            if (
                memory["draft"] is not None and summary["draft"]["dense_bytes"]
            ):  # copied weights are counted, mapped ones not
                files.append(summary["draft"]["dense_bytes"] + summary["draft"]["expert_bytes"])
            parts.append(f"{' and '.join(format_bytes(n) for n in files)} not counted")
        lines.append(f"{name:10} {', '.join(parts)}")
    if memory["overhead_bytes"]:
        lines.append(f"routing    {format_bytes(memory['overhead_bytes'])} with padding")
    return lines


def _experts(summary: dict[str, Any]) -> list[str]:
    placement, groups = summary["plan"]["placement"], summary["groups"]
    if placement != "slots":
        total = format_bytes(sum(group["n_experts"] * group["expert_bytes"] for group in groups))
        where = {"all": "all resident", "cpu-moe": "computed on the CPU"}[placement]
        return [f"experts    {total}, {where}"] if groups else []
    return [
        f"{'experts' if group is groups[0] else '':10} {group['slots']} of {group['n_experts']} in slots, "
        f"{format_bytes(group['slot_bytes'])}: {group['n_blocks']} blocks with "
        f"{format_bytes(group['expert_bytes'])} per expert"
        for group in groups
    ]


def _speculation(summary: dict[str, Any]) -> str:
    if summary["draft"] is None:
        return "none"
    k = summary["plan"]["max_draft_tokens"]
    return f"up to {k} tokens per step" if k else "not loaded: the slots would be too few"
