"""python -m benchmarks list | run NAME... | render [--check]"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import render
from benchmarks.registry import ROOT, entries
from benchmarks.runner import Failed, Runner


def list_entries(_: argparse.Namespace) -> int:
    width = max(map(len, entries()))
    for name, entry in entries().items():
        print(f"{name:{width}}  {entry.question}")
    return 0


def run(options: argparse.Namespace) -> int:
    known = entries()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"error: there is no entry {unknown[0]!r}\nhint: python -m benchmarks list", file=sys.stderr)
        return 2
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    runner = Runner(options.out.resolve(), options.work.resolve(), deadline, options.again)
    code = 0
    for name in options.names:
        try:
            runner.run(known[name])
        except Failed as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            code = 1
            continue
        print(f"{known[name].title}\n\n{known[name].table(runner.out)}\n")
    return code


def write_or_check(options: argparse.Namespace) -> int:
    try:
        problems = render.problems() if options.check else render.write()
    except render.MarkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and options.check:
        print("hint: python -m benchmarks render", file=sys.stderr)
    return int(bool(problems))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="The published measurements of edge_speq.")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    p = commands.add_parser("list", help="names and questions of all entries")
    p.set_defaults(command=list_entries)
    p = commands.add_parser("run", help="measure entries, store their JSON and print their tables")
    p.add_argument("names", metavar="NAME", nargs="+")
    p.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks", help="folder of the JSON (%(default)s)")
    p.add_argument("--work", type=Path, default=ROOT / "build" / "models", help="folder of the models (%(default)s)")
    p.add_argument("--minutes", type=float, help="stop after that time; the same command continues")
    p.add_argument("--again", action="store_true", help="measure what is stored already")
    p.set_defaults(command=run)
    p = commands.add_parser("render", help="write the tables of README.md and docs/ from benchmarks/results")
    p.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something would change")
    p.set_defaults(command=write_or_check)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    return int(options.command(options))


if __name__ == "__main__":
    sys.exit(main())
