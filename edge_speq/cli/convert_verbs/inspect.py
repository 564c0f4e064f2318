"""edge-speq convert inspect: edge-speq inspect under the name that belongs to the other verbs."""

from __future__ import annotations

import argparse
from typing import Any

from edge_speq.cli import inspect as command


def add_parser(verbs: Any) -> None:
    command.add_parser(verbs)
    p: argparse.ArgumentParser = verbs.choices["inspect"]
    p.set_defaults(verb=command.inspect)
