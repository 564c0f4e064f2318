"""edge-speq convert split: split experts into sub-experts; with all of them active the function is the same."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edge_speq.cli.convert_verbs import common
from edge_speq.convert.sub_experts.options import SplitOptions
from edge_speq.errors import EdgeError
from edge_speq.units import format_bytes

REQUANTIZED = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def add_parser(verbs: Any) -> None:
    p: argparse.ArgumentParser = verbs.add_parser(
        "split",
        help="split experts into sub-experts",
        description="Splits every expert into N sub-experts, by the activations of its neurons on a text, so that each "
        "token needs few of them. With all sub-experts of a token active the model computes the same function.",
    )
    p.add_argument("source", metavar="IN", help="a GGUF file of a Mixture-of-Experts model")
    common.add_writing(p)
    p.add_argument("--sub-experts", metavar="N", type=common.positive, required=True, help="parts per expert")
    p.add_argument(
        "--profile", metavar="TEXT", help="text for the activations (half of the prompts of edge-speq bench)"
    )
    p.add_argument("--no-profile", action="store_true", help="keep the order of neurons; fast, needs no text")
    p.add_argument(
        "--requantize",
        metavar="TYPE",
        choices=REQUANTIZED,
        help="requantize down, so that single neurons can move, not only blocks of them: " + ", ".join(REQUANTIZED),
    )
    p.add_argument(
        "--k", metavar="K", type=common.positive, help="sub-experts per token and block (default: all, lossless)"
    )
    p.add_argument(
        "--tilt",
        metavar="S",
        type=float,
        default=0.0,
        help="lossy, for few sub-experts: let the router drop the least active parts first; 0.25 works well",
    )
    p.add_argument("--spare", metavar="N", type=common.positive, help="parts that should matter little (half of them)")
    p.add_argument(
        "--iterations", metavar="N", type=int, default=10_000, help="iterations of the annealing (%(default)s)"
    )
    p.add_argument(
        "--measure", action="store_true", help="measure perplexity and bytes per token for several K, on other texts"
    )
    p.set_defaults(verb=split)


def split(options: argparse.Namespace) -> int:
    from edge_speq.convert.sub_experts import split as splitting

    request = SplitOptions(
        n_sub=options.sub_experts,
        requantize=options.requantize,
        used=options.k,
        n_spare=_spare(options),
        iterations=max(0, options.iterations),
        text=Path(options.profile) if options.profile else None,
        profiled=not options.no_profile,
        tilt=options.tilt,
        measure=options.measure,
    )
    made = splitting.split(
        options.source,
        options.out,
        request,
        force=options.force,
        dry_run=options.dry_run,
        stage=lambda doing, unit: common.progress(options, doing, unit),
    )
    summary = {"source": options.source, "dry_run": options.dry_run, **made.to_dict()}
    print(json.dumps(summary) if options.json else report(summary))
    return 0


def _spare(options: argparse.Namespace) -> int:
    spare = options.spare or 0
    if spare >= options.sub_experts > 1:
        raise EdgeError(f"--spare {spare} of {options.sub_experts} parts", "leave at least one", usage=True)
    return int(spare)


def report(s: dict[str, Any]) -> str:
    lines = [
        f"{common.written(s)}: {s['n_expert']} experts of {s['n_ff']} neurons, {s['n_expert_used']} per token, "
        f"{format_bytes(s['sub_expert_bytes'])} each; the source has {format_bytes(s['source_bytes'])}"
    ]
    if s["n_expert_used"] < s["n_expert_used_full"]:
        lines.append(
            f"lossy: {s['n_expert_used']} of the {s['n_expert_used_full']} sub-experts per token that equal the source"
        )
    if s["tilt"]:
        lines.append("lossy: the router is tilted towards the busier parts of an expert")
    if s["objective"] is not None:
        share = f"{s['objective_contiguous']:.1%} -> {s['objective']:.1%}"
        lines.append(f"the spare parts' share of the activation, {s['profiled_tokens']} tokens: {share}")
    if s["unseen_experts"]:
        lines.append(f"{s['unseen_experts']} experts were not chosen on the text: their neurons keep their order")
    if not s["exact_scale"]:
        lines.append("N is not a power of two: the scales of down are rounded, with a relative error up to 2^-11")
    if s["points"]:
        lines.append("    k   bytes/token     perplexity  " + "".join(f"{c:>10}" for c in s["points"][0]["by_class"]))
        for point in s["points"]:
            classes = "".join(f"{value:10.2f}" for value in point["by_class"].values())
            size = format_bytes(point["bytes_per_token"])
            lines.append(f"{point['n_expert_used']:5} {size:>15} {point['perplexity']:12.3f}  {classes}")
    return "\n".join(lines)
