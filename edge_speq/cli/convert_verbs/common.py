"""Options, progress line and report lines that the verbs of `edge-speq convert` share."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from edge_speq.cli import arguments
from edge_speq.cli.progress import Line
from edge_speq.progress import Progress, silent
from edge_speq.units import format_bytes

TOKENS = 2048  # tokens of a comparison of two models


def add_writing(p: argparse.ArgumentParser) -> None:
    """Add -o and the options of a verb that writes a file."""
    p.add_argument("-o", "--out", metavar="FILE", required=True, help="file to write")
    add_flags(p)


def add_flags(p: argparse.ArgumentParser) -> None:
    """Add --force, --dry-run, --json and --verbose."""
    p.add_argument("--force", action="store_true", help="replace an existing output")
    p.add_argument("--dry-run", action="store_true", help="only check, and show the size of the output")
    arguments.add_output(p, json="print one JSON object")


def add_text(p: argparse.ArgumentParser) -> None:
    """Add --text and --tokens of a verb that runs models on a text."""
    p.add_argument("--text", metavar="FILE", help="text that the models read (the bundled prompts)")
    p.add_argument(
        "--tokens", metavar="N", type=positive, default=TOKENS, help="tokens of it to compare, at most (%(default)s)"
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


@contextlib.contextmanager
def progress(options: argparse.Namespace, doing: str, unit: str = "") -> Iterator[Progress]:
    """Yield a Progress that shows percent, rate and time left on a terminal; nothing with --json or without a terminal.

    Amounts are in bytes unless there is a unit.
    """
    if options.json or not sys.stderr.isatty():
        yield silent
        return
    with Line(doing=doing, unit=unit) as line:
        yield line.amount


def written(summary: dict[str, Any]) -> str:
    """Return `OUT: 812.5 MiB (851968000 bytes)` for a summary with `out`, `n_bytes` and `dry_run`."""
    would = "would be " if summary["dry_run"] else ""
    return f"{summary['out']}: {would}{format_bytes(summary['n_bytes'])} ({summary['n_bytes']} bytes)"


def agreement(found: dict[str, Any]) -> str:
    """Return the report lines of Agreement.to_dict()."""
    lines = [
        f"on {found['n_tokens']} tokens: {found['token_agreement']:.1%} of the next tokens agree, logits differ by "
        f"NMSE {found['nmse']:.2e}, KL {found['kl']:.2e} nats, perplexity {found['perplexity']:.3f} and "
        f"{found['perplexity_other']:.3f}"
    ]
    if found["expert_agreement"] is not None:
        lines.append(
            f"experts: {found['expert_agreement']:.1%} are the same, {found['expert_set_agreement']:.1%} of the sets "
            "of a token and block as a whole"
        )
    return "\n".join(lines)
