"""edge-speq convert verify: check a GGUF file, or compare the weights and outputs of two files."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edge_speq.cli import arguments
from edge_speq.cli.convert_verbs import common
from edge_speq.units import format_bytes


def add_parser(verbs: Any) -> None:
    p: argparse.ArgumentParser = verbs.add_parser(
        "verify",
        help="check a file, or compare two",
        description="Checks a GGUF file's structure and hashes every tensor. With a second file, shows the tensors "
        "that differ, and the agreement of both models on a text. Exit code 1 if the weights differ, with --same.",
    )
    p.add_argument("first", metavar="A", help="a GGUF file, the first one of a split model")
    p.add_argument("second", metavar="B", nargs="?", help="another GGUF file")
    p.add_argument("--same", action="store_true", help="fail unless both files have the same weights")
    p.add_argument("--no-measure", action="store_true", help="do not run the models on a text")
    common.add_text(p)
    arguments.add_output(p, json="print one JSON object, with the hash of every tensor")
    p.set_defaults(verb=verify)


def verify(options: argparse.Namespace) -> int:
    from edge_speq.convert.evaluation import verify as verifying
    from edge_speq.errors import EdgeError

    summary: dict[str, Any] = {"first": _describe(options, options.first)}
    if options.second is None:
        if options.same:
            raise EdgeError("--same compares two files", "give a second one", usage=True)
        print(json.dumps(summary) if options.json else report(summary))
        return 0
    summary["second"] = _describe(options, options.second)
    summary["same_weights"] = summary["first"]["content_sha256"] == summary["second"]["content_sha256"]
    summary["differences"] = verifying.differences(summary["first"], summary["second"])
    summary["agreement"] = None
    if summary["first"]["is_model"] and summary["second"]["is_model"] and not options.no_measure:
        with common.progress(options, "comparing", unit="tokens") as progress:
            found = verifying.compare(
                options.first, options.second, options.text, most=options.tokens, progress=progress
            )
        summary["agreement"] = found.to_dict()
    print(json.dumps(summary) if options.json else report(summary))
    return 1 if options.same and not summary["same_weights"] else 0


def _describe(options: argparse.Namespace, path: str) -> dict[str, Any]:
    from edge_speq.convert.evaluation import verify as verifying

    with common.progress(options, "hashing") as progress:
        return verifying.describe(path, progress)[1]


def report(summary: dict[str, Any]) -> str:
    lines = [_line(summary["first"])]
    if "second" not in summary:
        return lines[0]
    lines.append(_line(summary["second"]))
    if summary["same_weights"]:
        lines.append("the weights are the same, byte for byte")
    for kind, names in summary["differences"].items():
        if names:
            more = f", and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}{more}")
    if summary["agreement"] is not None:
        lines.append(common.agreement(summary["agreement"]))
    return "\n".join(lines)


def _line(file: dict[str, Any]) -> str:
    return (
        f"{file['files'][0]}: sound, {format_bytes(file['size_bytes'])}, {file['n_tensors']} tensors, "
        f"content {file['content_sha256'][:16]}"
    )
