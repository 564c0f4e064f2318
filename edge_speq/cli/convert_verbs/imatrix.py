"""edge-speq convert imatrix: make an importance matrix from a text that the model reads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edge_speq.cli.convert_verbs import common


def add_parser(verbs: Any) -> None:
    p: argparse.ArgumentParser = verbs.add_parser(
        "imatrix",
        help="make an importance matrix",
        description="Runs a model on a text, on the CPU, and writes the mean squared activation of every input of "
        "every weight and expert, in llama.cpp's GGUF format.",
    )
    p.add_argument("model", metavar="MODEL", help="a GGUF file")
    p.add_argument("text", metavar="TEXT", nargs="?", help="a text file (the bundled prompts)")
    p.add_argument("--tokens", metavar="N", type=common.positive, help="tokens to read, at most (all)")
    p.add_argument("-t", "--threads", metavar="N", type=common.positive, help="CPU threads")
    common.add_writing(p)
    p.set_defaults(verb=imatrix)


def imatrix(options: argparse.Namespace) -> int:
    from edge_speq.convert.evaluation import reader
    from edge_speq.convert.quantization import imatrix as matrix
    from edge_speq.gguf import atomic

    sources = [options.model, *([options.text] if options.text else [])]
    atomic.check(options.out, options.force, sources=sources)
    text = reader.read_text(options.text)
    if options.dry_run:
        # shapes are known only after some tokens were read
        found = matrix.collect(options.model, text, dataset=_dataset(options), most=reader.LEAST)
        n_bytes = matrix.size(found)
        atomic.check(options.out, options.force, sources=sources, expected_bytes=n_bytes)
    else:
        with common.progress(options, "reading", unit="tokens") as progress:
            found = matrix.collect(
                options.model,
                text,
                dataset=_dataset(options),
                most=options.tokens,
                n_threads=options.threads,
                progress=progress,
            )
        n_bytes = matrix.write(found, options.out, force=options.force, sources=tuple(sources))
    summary = {
        "model": options.model,
        "out": options.out,
        "dry_run": options.dry_run,
        "n_bytes": n_bytes,
        "entries": len(found.sums),
        "chunks": None if options.dry_run else found.chunks,
        "experts_unseen": None if options.dry_run else found.unseen,
    }
    print(json.dumps(summary) if options.json else report(summary))
    return 0


def _dataset(options: argparse.Namespace) -> str:
    return Path(options.text).name if options.text else "edge_speq prompts"


def report(summary: dict[str, Any]) -> str:
    line = f"{common.written(summary)}: {summary['entries']} weights"
    if summary["dry_run"]:
        return line
    unseen = summary["experts_unseen"]
    seen = f"; {unseen} experts were never chosen: a longer text is better" if unseen else ""
    return f"{line}, {summary['chunks']} windows of text{seen}"
