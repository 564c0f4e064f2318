"""The edge-speq command. Data on stdout, progress on stderr; exit codes 0 ok, 1 failure, 2 usage, 130 Ctrl-C."""

from __future__ import annotations

import argparse
import itertools
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from edge_speq import __version__
from edge_speq.cli import (
    bench,
    chat,
    convert,
    demo,
    doctor,
    inspect,
    interrupt,
    plan,
    run,
    serve,
    simulate,
    trace,
    tune,
)
from edge_speq.errors import EdgeError, did_you_mean


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from edge_speq import _native

        _native.load_backends()
        names = ", ".join(str(device) for device in _native.devices())
        print(f"edge-speq {__version__} (llama.cpp {_native.llama_cpp_commit()[:10]}; {names})")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse with one `error:` line and one `hint:` line, without prefix matching.

    It also accepts PROMPTS after options: before Python 3.12.7, argparse assigns all optional positional arguments at
    the first positional word.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | keywords)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown(words)
        found, rest = super().parse_known_args(words, namespace)
        if getattr(found, "own_prompts", "") is None and rest and not rest[0].startswith("-"):
            found.own_prompts = rest.pop(0)
        for word in rest:
            if word.startswith("-"):
                raise self._unknown(word)
        return found, rest

    def _refuse_unknown(self, words: list[str]) -> None:
        """Raise EdgeError for options such as -ngl, which argparse would parse as -n with the value gl."""
        if self._subparsers is not None:  # the command's own parser knows its options
            return
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.split("=")[0]
            if re.match(r"-[A-Za-z]{2}", name) and name not in self._option_string_actions:
                raise self._unknown(name)

    def _unknown(self, word: str) -> EdgeError:
        name = word.split("=", maxsplit=1)[0]
        if name in FROM_LLAMA_CPP:
            return EdgeError(f"{name} is not an option of {self.prog}", FROM_LLAMA_CPP[name], usage=True)
        hint = did_you_mean(name, self._option_string_actions, f"{self.prog} --help lists them", 0.7)
        return EdgeError(f"{name} is not an option of {self.prog}", hint, usage=True)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Name the option in the error of a value that it does not take."""
        try:
            return super()._get_value(action, arg_string)
        except EdgeError as error:
            if not action.option_strings or error.message.startswith(tuple(action.option_strings)):
                raise
            raise EdgeError(f"{action.option_strings[0]} {error.message}", error.hint, usage=True) from None

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        hint = f"{self.prog} --help shows how to call it"
        if unknown:
            hint = did_you_mean(unknown[1], re.findall(r"[\w-]+", unknown[2]), hint)
        raise EdgeError(message, hint, usage=True)


# options of llama.cpp's tools, with the equivalent here
FROM_LLAMA_CPP = {
    "-ngl": "all layers go to the GPU; --vram-budget limits its memory, --policy cpu-moe keeps experts on the CPU",
    "--n-gpu-layers": "all layers go to the GPU; --vram-budget limits its memory",
    "-cmoe": "--policy cpu-moe",
    "--cpu-moe": "--policy cpu-moe",
    "-ncmoe": "--vram-budget, which places experts one by one, or --policy cpu-moe",
    "--n-cpu-moe": "--vram-budget, which places experts one by one, or --policy cpu-moe",
    "--moe-cache-mib": "--vram-budget, which limits everything on the device",
    "-md": "--draft",
    "--model-draft": "--draft",
    "--draft-max": "--draft-tokens",
    "--draft-n": "--draft-tokens",
    "--no-mmap": "run, chat, serve, plan, tune and trace have --no-mmap",
    "-fa": "flash attention is an argument of EdgeLlama (flash_attn=True), not of the command",
    "--flash-attn": "flash attention is an argument of EdgeLlama (flash_attn=True), not of the command",
    "-ctk": "the types of the KV cache are arguments of EdgeLlama (type_k, type_v), not of the command",
    "-ctv": "the types of the KV cache are arguments of EdgeLlama (type_k, type_v), not of the command",
    **dict.fromkeys(
        ("--top-k", "--top-p", "--min-p", "--repeat-penalty"),
        "EdgeLlama and requests to the server take it; the command has --temp and --seed",
    ),
    "-hf": "download the GGUF file, then name it: hf download REPOSITORY FILE",
    "-b": "n_batch is an argument of EdgeLlama, not of the command",
    "--batch-size": "n_batch is an argument of EdgeLlama, not of the command",
    "-i": "edge-speq chat MODEL",
    "-cnv": "edge-speq chat MODEL",
    "-np": "the server runs one sequence at a time: requests wait in a queue",
}


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="edge-speq", description="Run MoE GGUF models larger than the GPU.")
    top.add_argument("--version", action=_Version, nargs=0, help="package, llama.cpp commit and devices")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, run, chat, serve, plan, bench, convert, inspect, doctor, trace, simulate, tune):
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
        sys.stderr.close()  # the reader of stdout has exited: no traceback
        return 1
