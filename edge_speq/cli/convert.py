"""edge-speq convert: make GGUF files. Each verb is a module of convert_verbs/."""

from __future__ import annotations

import argparse
from typing import Any

from edge_speq.cli import interrupt
from edge_speq.cli.convert_verbs import draft, hf, imatrix, pack, quantize, split, verify

VERBS: tuple[Any, ...] = (hf, quantize, imatrix, draft, split, pack, verify)


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="make GGUF files",
        description="Makes GGUF files. Outputs are written atomically; existing files are replaced only with --force.",
    )
    verbs = p.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_parser(verbs)
    for chosen in verbs.choices.values():
        chosen.set_defaults(command=convert)


def convert(options: argparse.Namespace) -> int:
    # leaves immediately, but removes temporary files first
    with interrupt.handler(_leave, _leave):
        return int(options.verb(options))


def _leave(*_: object) -> None:
    from edge_speq.gguf import atomic

    atomic.discard_all()
    interrupt._leave()
