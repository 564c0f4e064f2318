"""Which of several drafts: each is tuned inside the same bounds, then the best of each are measured in turn.

A draft's bytes come off the slots, so what it accepts and foresees has to pay for the experts that are missing then.
Running without a draft is always among them, and stays unless a draft is faster by what any change has to gain.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_speq.drafting.spec import is_file
from edge_speq.errors import EdgeError
from edge_speq.planning import profile as profiles
from edge_speq.planning.profile import TuneProfile
from edge_speq.tune.measure import Trial, Worth
from edge_speq.tune.predict import PREFERENCE
from edge_speq.tune.tuner import TuneOptions, Tuner

NONE = "none"
IN_TURN = 0.3  # of the time, kept for measuring in turn
ROUNDS = 3  # of that, at most
WORTH = tuple(field.name for field in dataclasses.fields(Worth))


def names(given: Sequence[str]) -> list[str]:
    """Of --draft, comma separated or given several times; what is a file is one draft whatever its name. Raises
    EdgeError for an empty name."""
    found = [name.strip() for text in given for name in ([text] if _is_there(text) else text.split(","))]
    if not all(found):
        raise EdgeError("--draft has an empty name", "write it like none,self,draft.gguf", usage=True)
    return list(dict.fromkeys(found))


def _is_there(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name: a list
        return False


@dataclass(slots=True)
class _Entry:
    """A draft that fits: what is best for it, and how fast that was. None: there was no time to measure it."""

    name: str
    tuner: Tuner
    found: TuneProfile
    chosen: dict[str, Any]
    best: Trial | None
    in_turn: dict[int, list[Trial]] = dataclasses.field(default_factory=dict)  # by number of threads

    def decide(self) -> None:
        """By the median of what was measured in turn: the fastest of few would often be luck."""
        medians = {
            n: sorted(runs, key=lambda run: run.tok_per_s)[(len(runs) - 1) // 2] for n, runs in self.in_turn.items()
        }
        n_threads = max(medians, key=lambda n: medians[n].tok_per_s)
        self.chosen, self.best = self.chosen | {"n_threads": n_threads}, medians[n_threads]


class Choice:
    """wanted.draft is ignored: drafts, of `names`, and none are tried. Raises EdgeError for a file that is no GGUF."""

    def __init__(self, wanted: TuneOptions, drafts: Sequence[str], say: Callable[[str], None] = lambda _: None) -> None:
        self._wanted, self._say = wanted, say
        self._until = time.monotonic() + wanted.seconds
        self._keys = {
            name: profiles.key(wanted.model, None if name == NONE else name) for name in dict.fromkeys([NONE, *drafts])
        }
        self._entries: list[_Entry] = []
        self._left_out: dict[str, str] = {}
        self._skipped: list[str] = []

    def run(self) -> TuneProfile:
        """For the model without a draft named, with the draft in what was chosen. Raises EdgeError where the model does
        not even fit without one."""
        for n_done, name in enumerate(self._keys):
            self._tune(name, (self._left() - IN_TURN * self._wanted.seconds) / (len(self._keys) - n_done))
        self._measure_in_turn()
        return self._profile(self._fastest())

    def _tune(self, name: str, seconds: float) -> None:
        is_none = name == NONE
        wanted = dataclasses.replace(
            self._wanted, draft=None if is_none else name, seconds=max(1.0, seconds), must_draft=not is_none
        )
        tuner = Tuner(wanted, lambda text: self._say(f"{name}: {text}"))
        try:
            found = tuner.run()
        except EdgeError as error:
            if is_none:
                raise
            self._left_out[name] = error.message
            self._skip(f"{name}: {error.message}")
            return
        self._skipped += [f"{name}: {text}" for text in found.found["skipped"]]
        self._entries.append(_Entry(name, tuner, found, found.chosen, tuner.best))

    def _measure_in_turn(self) -> None:
        """The same text with each, in whole rounds while there is time. Each also with the numbers of threads that the
        others chose, or a draft would win by threads that its rivals were not given."""
        if len(self._entries) < 2:
            return
        n = min(entry.tuner.n for entry in self._entries)
        threads = sorted({entry.chosen["n_threads"] for entry in self._entries})
        takes = len(threads) * sum(e.best.seconds if e.best else e.tuner.trial_seconds for e in self._entries)
        for number in range(1, ROUNDS + 1):
            if self._left() < takes:
                self._skip(f"round {number} of measuring the drafts in turn: no time")
                break
            started = time.monotonic()
            for n_threads, entry in itertools.product(threads, self._entries):
                self._say(f"{entry.name}: measuring in turn, round {number}, n_threads={n_threads}")
                seconds = max(1.0, 0.1 * self._wanted.seconds / len(self._keys))
                try:
                    run = entry.tuner.trial(entry.chosen | {"n_threads": n_threads}, n, seconds)
                except EdgeError as error:  # something else has taken the device's memory meanwhile
                    self._skip(f"{entry.name}: measuring it in turn: {error.message}")
                    continue
                entry.in_turn.setdefault(n_threads, []).append(run)
            takes = time.monotonic() - started
        for entry in self._entries:
            if entry.in_turn:
                entry.decide()

    def _fastest(self) -> _Entry:
        """As measured. A draft that hardly added tokens to the steps is not why they were faster."""
        none, *others = self._entries
        if none.best is None:
            return none
        least = (1 + PREFERENCE) * none.best.tok_per_s
        speeds = {e.name: e.best.tok_per_s for e in others if e.best and e.best.tokens_per_step > 1 + PREFERENCE}
        return max((e for e in others if speeds.get(e.name, 0.0) > least), key=lambda e: speeds[e.name], default=none)

    # --- what came of it -------------------------------------------------------------------------------

    def _profile(self, chosen: _Entry) -> TuneProfile:
        rows = [self._row(name, chosen) for name in self._keys]
        seconds = round(self._wanted.seconds - self._left(), 1)
        found = chosen.found.found | {"drafts": rows, "skipped": self._skipped, "seconds": seconds}
        made_for, bounds = self._keys[NONE], chosen.found.bounds
        if chosen.name == NONE:
            return TuneProfile(made_for, bounds, chosen.chosen, found)
        draft = str(Path(chosen.name).absolute()) if is_file(chosen.name) else chosen.name
        return TuneProfile(made_for, bounds, {"draft": draft, **chosen.chosen}, found, self._keys[chosen.name].draft)

    def _row(self, name: str, chosen: _Entry) -> dict[str, Any]:
        """Of the report; null is what a draft has not, or what there was no time for."""
        entry = next((entry for entry in self._entries if entry.name == name), None)
        worth, best = (None, None) if entry is None else (entry.tuner.worth, entry.best)
        predicted = [] if entry is None else entry.found.found["candidates"]
        return {
            "draft": name,
            "chosen": entry is chosen,
            "left_out": self._left_out.get(name),
            **{name: getattr(worth, name, None) for name in WORTH},
            "predicted_tok_per_s": predicted[0]["predicted_tok_per_s"] if predicted else None,
            "tok_per_s": None if best is None else best.tok_per_s,
            "hit_rate": None if best is None else best.hit_rate,
            "rounds": 0 if entry is None else max(map(len, entry.in_turn.values()), default=0),
            "parameters": None if entry is None else entry.chosen,
        }

    def _left(self) -> float:
        return self._until - time.monotonic()

    def _skip(self, what: str) -> None:
        self._skipped.append(what)
        self._say(f"left out: {what}")
