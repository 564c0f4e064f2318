"""edge-speq convert quantize: quantize a GGUF file with llama.cpp."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edge_speq.cli.convert_verbs import common
from edge_speq.convert.quantization.types import FTYPES
from edge_speq.errors import EdgeError
from edge_speq.units import format_bytes


def add_parser(verbs: Any) -> None:
    p: argparse.ArgumentParser = verbs.add_parser(
        "quantize",
        help="quantize a GGUF file",
        description="Quantizes a GGUF file with llama.cpp. Types: " + ", ".join(FTYPES) + ".",
    )
    p.add_argument("source", metavar="IN", help="a GGUF file, best F16 or BF16")
    p.add_argument("out", metavar="OUT", help="file to write")
    p.add_argument("--type", metavar="TYPE", required=True, help="type of the file, such as q4_k_m")
    p.add_argument(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        action="append",
        default=[],
        help="type of tensors whose names match a regular expression; the first match counts",
    )
    p.add_argument("--experts", metavar="TYPE", help="type of all routed experts")
    p.add_argument(
        "--raise",
        dest="raised",
        metavar="N=TYPE",
        help="better type for the experts of the N most sensitive blocks, as measured on the text",
    )
    p.add_argument("--imatrix", metavar="FILE", help="importance matrix of convert imatrix or llama-imatrix")
    common.add_text(p)
    common.add_flags(p)
    p.set_defaults(verb=quantize)


def quantize(options: argparse.Namespace) -> int:
    from edge_speq.convert.quantization import imatrix
    from edge_speq.convert.quantization import quantize as quantizing
    from edge_speq.gguf import atomic

    importance = imatrix.read(options.imatrix) if options.imatrix else None
    named = {"importance": importance, "importance_name": Path(options.imatrix or "").name}
    atomic.check(options.out, options.force, sources=[options.source])
    sensitivity, layers = _raised(options, importance)
    recipe = quantizing.recipe(options.type, options.tensor_type, options.experts, layers, **named)
    if options.dry_run:
        outcome = quantizing.plan(options.source, recipe)
        atomic.check(options.out, options.force, sources=[options.source], expected_bytes=outcome.n_bytes)
    else:
        with common.progress(options, "quantizing") as progress:
            outcome = quantizing.quantize(options.source, options.out, recipe, force=options.force, progress=progress)
    summary = {
        "source": options.source,
        "out": options.out,
        "dry_run": options.dry_run,
        "n_bytes": outcome.n_bytes,
        "bytes_by_type": outcome.bytes_by_type,
        "fell_back": outcome.fell_back,
        "sensitivity": sensitivity,
        "raised": sorted(layers),
    }
    print(json.dumps(summary) if options.json else report(summary))
    return 0


def _raised(options: argparse.Namespace, importance: Any) -> tuple[dict[int, float] | None, dict[int, str]]:
    """Measure the sensitivity of each block, and choose the blocks that get more bits."""
    from edge_speq.convert.evaluation import reader
    from edge_speq.convert.quantization import sensitivity, types

    if options.raised is None:
        return None, {}
    n, kind = sensitivity.parse_raise(options.raised)
    types.tensor_type(kind)
    if options.experts is None:
        raise EdgeError("--raise needs --experts", "give --experts TYPE too", usage=True)
    if options.dry_run:  # the size does not depend on the chosen blocks, as all have the same shapes
        return None, dict.fromkeys(sensitivity.expert_blocks(options.source)[:n], kind)
    with common.progress(options, "measuring blocks", unit="blocks") as progress:
        found = sensitivity.measure(
            options.source,
            options.out,
            options.experts,
            reader.read_text(options.text),
            importance=importance,
            most=options.tokens,
            progress=progress,
        )
    return found, dict.fromkeys(sensitivity.most_sensitive(found, n), kind)


def report(summary: dict[str, Any]) -> str:
    types = ", ".join(f"{format_bytes(n)} {kind}" for kind, n in summary["bytes_by_type"].items())
    lines = [f"{common.written(summary)}: {types}"]
    if summary["fell_back"]:
        lines.append(f"{summary['fell_back']} tensors have rows that do not fit the type and got another one")
    if summary["sensitivity"]:
        lines.append("block   KL with its experts lowered, nats per token")
        for block, kl in summary["sensitivity"].items():
            lines.append(f"{block:5}   {kl:.5f}{'  raised' if block in summary['raised'] else ''}")
    return "\n".join(lines)
