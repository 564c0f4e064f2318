"""Runs the commands of entries, making the models that they need, and stores results share by share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import BESIDE, BY_HAND, MODELS
from benchmarks.registry import ROOT, Command, Entry, command_lines
from benchmarks.store import Store, whole

PROGRAMS = {"edge-speq": [sys.executable, "-m", "edge_speq"], "python": [sys.executable]}
GRACE = 20.0  # seconds that an interrupted command has to write what it has


class Failed(Exception):
    """A command that did not end well, or for which there was no time."""


@dataclass(frozen=True, slots=True)
class Runner:
    out: Path  # folder of the results
    work: Path  # folder of the models
    deadline: float | None = None  # by time.monotonic()
    again: bool = False  # measure what is stored already

    def run(self, entry: Entry) -> None:
        """Measure what is not stored yet. Raise Failed for the first command that fails."""
        for name in (name for name in entry.files if self.again or not (self.out / name).exists()):
            mine = [Command.of(line) for line in command_lines(name)]
            for command in mine:
                self._models(command)
            if any(command.out for command in mine):
                self._redirected(name, mine)
            else:
                for command in mine:
                    self._call(command.arguments)

    def _redirected(self, name: str, commands: Sequence[Command]) -> None:
        """`edge-speq bench ... -o jsonl`, one share at a time."""
        store = Store(self.out / name)
        for command in commands:
            for share in command.shares or [""]:
                arguments = command.at(share) if share else command.arguments
                key = " ".join(arguments)
                if key not in store:
                    print(f"{name}: {key}", file=sys.stderr, flush=True)
                    text = self._call(arguments, capture=True)
                    store.put(key, [json.loads(line) for line in text.splitlines()])
        store.finish(whole([row for rows in store.values() for row in rows]))

    def _models(self, command: Command) -> None:
        for word in command.arguments:
            name = BESIDE.get(word, word)
            if name in BY_HAND and not (self.work / name).exists():
                raise Failed(f"{self.work / name} is missing: {BY_HAND[name]}")
            if name in MODELS and not (self.work / name).exists():
                make = Command.of(MODELS[name])
                self._models(Command(tuple(w for w in make.arguments if w != name), None))
                print(f"making {name}", file=sys.stderr, flush=True)
                self._call(make.arguments)

    def _path(self, word: str) -> str:
        if word in MODELS or word in BESIDE or word in BY_HAND:
            return str(self.work / word)
        return str(self.out / word) if word.endswith(".json") and "/" not in word else word

    def _call(self, arguments: Sequence[str], *, capture: bool = False) -> str:
        """Run from the repository's root; at the deadline interrupt it once, as Ctrl-C does."""
        command = [*PROGRAMS[arguments[0]], *map(self._path, arguments[1:])]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        left = None if self.deadline is None else self.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise Failed("no time left")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE if capture else None,
            text=True,
        )
        try:
            text, _ = process.communicate(timeout=left)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise Failed("interrupted: what was measured is stored, the same command continues") from error
        if process.returncode:
            raise Failed(f"exit code {process.returncode}: {' '.join(command)}")
        return text or ""
