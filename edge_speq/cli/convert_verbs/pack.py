"""edge-speq convert pack: write the same weights in a layout for fetches of single experts."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edge_speq.cli.convert_verbs import common


def add_parser(verbs: Any) -> None:
    p: argparse.ArgumentParser = verbs.add_parser(
        "pack",
        help="write a layout for fetches from disk",
        description="Writes the same weights with page-aligned tensors, block after block, and gate and up in one "
        "tensor if llama.cpp supports it. With --order, experts that are often used together are stored together.",
    )
    p.add_argument("source", metavar="IN", help="a GGUF file of a Mixture-of-Experts model, the first part of a split")
    common.add_writing(p)
    p.add_argument(
        "--align", metavar="BYTES", type=common.positive, default=4096, help="alignment of tensors (%(default)s)"
    )
    fuse = p.add_mutually_exclusive_group()
    fuse.add_argument("--fuse", action="store_true", default=None, help="fail if gate and up cannot be fused")
    fuse.add_argument("--no-fuse", dest="fuse", action="store_false", help="do not fuse gate and up")
    p.add_argument(
        "--order", metavar="TRACE", help="order experts by a .json trace, by a text to read, or by 'bundled' prompts"
    )
    p.set_defaults(verb=pack)


def pack(options: argparse.Namespace) -> int:
    from edge_speq.convert import pack as packing

    request = packing.PackOptions(options.align, options.fuse, options.order)
    with common.progress(options, "writing") as progress:
        made = packing.pack(
            options.source,
            options.out,
            request,
            force=options.force,
            dry_run=options.dry_run,
            progress=progress,
        )
    summary = {"source": options.source, "dry_run": options.dry_run, **made.to_dict()}
    print(json.dumps(summary) if options.json else report(summary))
    return 0


def report(s: dict[str, Any]) -> str:
    lines = [
        f"{common.written(s)}: tensors on multiples of {s['alignment']} bytes, {s['aligned_experts']:.0%} of the "
        f"experts' parts too; {s['reads_per_expert']} reads per expert"
    ]
    if s["unfused"]:
        lines.append(
            f"gate and up not fused in {s['n_blocks'] - s['fused_blocks']} of {s['n_blocks']} blocks: {s['unfused']}"
        )
    if s["runs"] is not None:
        lines.append(f"places read in a tensor for one token, on the trace: {s['runs_before']:.2f} -> {s['runs']:.2f}")
    return "\n".join(lines)
