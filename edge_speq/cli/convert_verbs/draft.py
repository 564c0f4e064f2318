"""edge-speq convert draft: make a twin, a copy of the target with low-bit experts, as its draft."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edge_speq.cli.convert_verbs import common


def add_parser(verbs: Any) -> None:
    p: argparse.ArgumentParser = verbs.add_parser(
        "draft",
        help="make a low-bit copy of a MoE as its draft",
        description="Writes a copy of a MoE with low-bit routed experts and unchanged other tensors. As a draft it "
        "proposes tokens, and its routing predicts the target's experts.",
    )
    p.add_argument("target", metavar="TARGET", help="a GGUF file of a MoE")
    p.add_argument("--type", metavar="TYPE", required=True, help="type of the experts: iq2_xs, q2_k, q3_k, ...")
    p.add_argument(
        "--experts-only", action="store_true", help="write only the experts; the draft shares TARGET's other tensors"
    )
    p.add_argument(
        "--imatrix", metavar="FILE", help="importance matrix (default: made from the text if the type needs one)"
    )
    p.add_argument("--no-measure", action="store_true", help="do not compare the copy with the target")
    common.add_text(p)
    common.add_writing(p)
    p.set_defaults(verb=draft)


def draft(options: argparse.Namespace) -> int:
    from edge_speq.convert.evaluation import reader
    from edge_speq.convert.quantization import draft as drafts
    from edge_speq.convert.quantization import imatrix
    from edge_speq.gguf import atomic

    atomic.check(options.out, options.force, sources=[options.target])
    # the importance matrix uses the second half of the text, so that the comparison on the first half is unbiased
    text = reader.read_text(options.text)
    half = len(text) // 2
    name = Path(options.imatrix or options.text or "edge_speq prompts").name
    importance = imatrix.read(options.imatrix) if options.imatrix else None
    if importance is None:
        with common.progress(options, "calibrating", unit="tokens") as progress:
            most = reader.LEAST if options.dry_run else drafts.CALIBRATION
            importance = drafts.importance_for(
                options.target, options.type, text[half:], dataset=name, most=most, progress=progress
            )
    recipe = drafts.recipe(options.target, options.type, importance, name)
    made = _dry_run(options, recipe) if options.dry_run else _make(options, recipe, text[:half])
    print(json.dumps(made) if options.json else report(made))
    return 0


def _dry_run(options: argparse.Namespace, recipe: Any) -> dict[str, Any]:
    from edge_speq.convert.quantization import draft as drafts
    from edge_speq.convert.quantization import quantize
    from edge_speq.gguf import atomic

    n_bytes = quantize.plan(options.target, recipe).n_bytes
    if options.experts_only:
        n_bytes = drafts.experts_size(options.target, recipe)
    atomic.check(options.out, options.force, sources=[options.target], expected_bytes=n_bytes)
    return _summary(options, n_bytes, None)


def _make(options: argparse.Namespace, recipe: Any, text: str) -> dict[str, Any]:
    from edge_speq.convert.evaluation import agreement
    from edge_speq.convert.quantization import draft as drafts

    found: list[dict[str, Any]] = []

    def compare(twin: Path) -> None:
        with common.progress(options, "comparing", unit="tokens") as progress:
            agreed = agreement.measure(options.target, twin, text, most=options.tokens, progress=progress)
        found.append(agreed.to_dict())

    with common.progress(options, "quantizing") as progress:
        n_bytes = drafts.make(
            options.target,
            options.out,
            recipe,
            experts_only=options.experts_only,
            force=options.force,
            progress=progress,
            examine=None if options.no_measure else compare,
        )
    return _summary(options, n_bytes, found[0] if found else None)


def _summary(options: argparse.Namespace, n_bytes: int, agreement: dict[str, Any] | None) -> dict[str, Any]:
    from edge_speq.gguf import container

    return {
        "target": options.target,
        "out": options.out,
        "dry_run": options.dry_run,
        "type": options.type.lower(),
        "experts_only": options.experts_only,
        "n_bytes": n_bytes,
        "target_bytes": container.read(options.target).size,
        "agreement": agreement,
    }


def report(summary: dict[str, Any]) -> str:
    share = summary["n_bytes"] / summary["target_bytes"]
    what = "the experts alone" if summary["experts_only"] else "experts"
    line = f"{common.written(summary)}: {what} at {summary['type']}, {share:.0%} of the target's bytes"
    found = summary["agreement"]
    return line if found is None else f"{line}\n{common.agreement(found)}"
