"""The edge-speq command. stdout is data, stderr is progress; exit 0 ok, 1 failure, 2 usage, 130 on Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from edge_speq import __version__
from edge_speq.cli import bench, chat, convert, doctor, inspect, interrupt, plan, run, serve, simulate, trace, tune
from edge_speq.errors import EdgeError


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from edge_speq import _native

        _native.load_backends()
        names = ", ".join(str(device) for device in _native.devices())
        print(f"edge-speq {__version__} (llama.cpp {_native.llama_cpp_commit()[:10]}; {names})")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Takes PROMPTS behind options, too. argparse gives all positional arguments that may be left out their values at
    the first one it meets, and does not know what follows an option (before Python 3.12.7)."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if getattr(found, "own_prompts", "") is None and rest and not rest[0].startswith("-"):
            found.own_prompts = rest.pop(0)
        return found, rest


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="edge-speq", description="Run MoE GGUF models larger than the GPU.")
    top.add_argument("--version", action=_Version, nargs=0, help="package, llama.cpp commit and devices")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (run, chat, serve, plan, bench, convert, inspect, doctor, trace, simulate, tune):
        command.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parser().parse_args(argv)
        level = logging.DEBUG if arguments.verbose else logging.WARNING
        logging.basicConfig(level=level, format="%(name)s: %(message)s")
        return int(arguments.command(arguments))
    except EdgeError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2 if error.usage else 1
    except KeyboardInterrupt:
        return interrupt.EXIT_CODE
    except BrokenPipeError:
        sys.stderr.close()  # whoever read stdout has gone; nobody wants a traceback
        return 1
