"""edge-speq convert hf: make a GGUF file from a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from edge_speq.cli.convert_verbs import common


def add_parser(verbs: Any) -> None:
    p: argparse.ArgumentParser = verbs.add_parser(
        "hf",
        help="make a GGUF file from a Hugging Face checkpoint",
        description="Converts a checkpoint with llama.cpp's converter, then quantizes it if the type requires it. "
        "Needs the extra edge-speq[convert].",
    )
    p.add_argument("folder", metavar="DIR", help="folder of a Hugging Face checkpoint")
    p.add_argument(
        "--outtype",
        metavar="TYPE",
        default="q8_0",
        help="f32, f16, bf16, auto (the checkpoint's own), q8_0, or a type of convert quantize (%(default)s)",
    )
    p.add_argument("--experts", metavar="TYPE", help="type of all routed experts")
    p.add_argument("--tensor-type", metavar="PATTERN=TYPE", action="append", default=[], help="as in convert quantize")
    p.add_argument("--imatrix", metavar="FILE", help="importance matrix")
    p.add_argument("--pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, if it is not recognized")
    p.add_argument("--name", metavar="NAME", help="name of the model in the file")
    common.add_writing(p)
    p.set_defaults(verb=hf)


def hf(options: argparse.Namespace) -> int:
    from edge_speq.convert.huggingface import hf as converting
    from edge_speq.convert.quantization import imatrix, quantize

    outtype, recipe = options.outtype.lower(), None
    importance = imatrix.read(options.imatrix) if options.imatrix else None
    if outtype not in converting.OWN_TYPES or options.experts or options.tensor_type or importance:
        named: dict[str, Any] = {"importance": importance, "importance_name": Path(options.imatrix or "").name}
        recipe = quantize.recipe(outtype, options.tensor_type, options.experts, **named)
        outtype = converting.intermediate(options.folder)
    with (
        common.progress(options, "converting") as progress,
        common.progress(options, "quantizing") as quantizing,
    ):
        result = converting.convert(
            options.folder,
            options.out,
            recipe,
            outtype,
            pre=options.pre,
            name=options.name,
            force=options.force,
            dry_run=options.dry_run,
            progress=progress,
            quantizing=quantizing,
        )
    if result.probe_agrees is False:
        print(f"warning: llama.cpp's {result.pre} tokens differ from the tokenizer's in places", file=sys.stderr)
    summary = {
        "source": options.folder,
        "out": options.out,
        "dry_run": options.dry_run,
        "outtype": options.outtype.lower(),
        "n_bytes": result.n_bytes,
        "pre": result.pre,
        "pre_by": result.pre_by,
        "probe_agrees": result.probe_agrees,
        "bytes_by_type": result.outcome.bytes_by_type if result.outcome else None,
    }
    print(json.dumps(summary) if options.json else report(summary))
    return 0


def report(summary: dict[str, Any]) -> str:
    lines = [f"{common.written(summary)}, {summary['outtype']}"]
    if summary["pre_by"] == "definition":
        lines.append(
            f"llama.cpp's converter does not know the tokenizer; its definition equals that of {summary['pre']}"
        )
    return "\n".join(lines)
