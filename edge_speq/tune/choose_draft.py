"""Choice between several drafts: tune each one within the same bounds, then measure their best options alternately.

A draft takes memory from the slots, so its accepted tokens and predictions must outweigh the additional misses.
Running without a draft is always a candidate; a draft is chosen only if it is faster by more than PREFERENCE.
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
from edge_speq.tune.measure import DraftValue, Trial
from edge_speq.tune.predict import PREFERENCE
from edge_speq.tune.tuner import TuneOptions, Tuner

NONE = "none"
IN_TURN = 0.3  # share of the time that is reserved for alternating measurements
ROUNDS = 3  # alternating measurements of each draft, at most
DRAFT_VALUES = tuple(field.name for field in dataclasses.fields(DraftValue))


def names(given: Sequence[str]) -> list[str]:
    """Return the drafts of --draft, which may be comma-separated or given several times.

    An existing file is one draft even if its name has a comma. Raises EdgeError for an empty name.
    """
    found = [name.strip() for text in given for name in ([text] if _is_there(text) else text.split(","))]
    if not all(found):
        raise EdgeError("--draft has an empty name", "write it like none,self,draft.gguf", usage=True)
    return list(dict.fromkeys(found))


def _is_there(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # the name is too long for a file, so it is a list
        return False


@dataclass(slots=True)
class _Entry:
    """A draft that fits in memory, its best options and their speed. `best` is None if there was no time to measure."""

    name: str
    tuner: Tuner
    found: TuneProfile
    chosen: dict[str, Any]
    best: Trial | None
    in_turn: dict[int, list[Trial]] = dataclasses.field(default_factory=dict)  # by number of threads

    def decide(self) -> None:
        """Choose the number of threads by the median speed: the maximum of a few runs would often be luck."""
        medians = {
            n: sorted(runs, key=lambda run: run.tok_per_s)[(len(runs) - 1) // 2] for n, runs in self.in_turn.items()
        }
        n_threads = max(medians, key=lambda n: medians[n].tok_per_s)
        self.chosen, self.best = self.chosen | {"n_threads": n_threads}, medians[n_threads]


class Choice:
    """Tuning of several drafts, and of no draft. options.draft is ignored.

    Raises EdgeError if a draft file is not a GGUF file.
    """

    def __init__(
        self, request: TuneOptions, drafts: Sequence[str], say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._request, self._say = request, say
        self._until = time.monotonic() + request.seconds
        self._keys = {
            name: profiles.key(request.model, None if name == NONE else name) for name in dict.fromkeys([NONE, *drafts])
        }
        self._entries: list[_Entry] = []
        self._left_out: dict[str, str] = {}
        self._skipped: list[str] = []

    def run(self) -> TuneProfile:
        """Return a profile for the model without a draft argument; its chosen options include the draft.

        Raises EdgeError if the model does not fit even without a draft.
        """
        for n_done, name in enumerate(self._keys):
            self._tune(name, (self._left() - IN_TURN * self._request.seconds) / (len(self._keys) - n_done))
        self._measure_in_turn()
        return self._profile(self._fastest())

    def _tune(self, name: str, seconds: float) -> None:
        is_none = name == NONE
        request = dataclasses.replace(
            self._request, draft=None if is_none else name, seconds=max(1.0, seconds), must_draft=not is_none
        )
        tuner = Tuner(request, lambda text: self._say(f"{name}: {text}"))
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
        """Measure all drafts alternately with the same text, in whole rounds while there is time.

        Each draft runs with every thread count that any draft chose, so that thread counts do not decide.
        """
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
                seconds = max(1.0, 0.1 * self._request.seconds / len(self._keys))
                try:
                    run = entry.tuner.trial(entry.chosen | {"n_threads": n_threads}, n, seconds)
                except EdgeError as error:  # another process may have taken the device's memory
                    self._skip(f"{entry.name}: measuring it in turn: {error.message}")
                    continue
                entry.in_turn.setdefault(n_threads, []).append(run)
            takes = time.monotonic() - started
        for entry in self._entries:
            if entry.in_turn:
                entry.decide()

    def _fastest(self) -> _Entry:
        """Return the entry that measured fastest. Drafts that add almost no tokens per step are not considered."""
        none, *others = self._entries
        if none.best is None:
            return none
        least = (1 + PREFERENCE) * none.best.tok_per_s
        speeds = {e.name: e.best.tok_per_s for e in others if e.best and e.best.tokens_per_step > 1 + PREFERENCE}
        return max((e for e in others if speeds.get(e.name, 0.0) > least), key=lambda e: speeds[e.name], default=none)

    # --- results -------------------------------------------------------------------------------

    def _profile(self, chosen: _Entry) -> TuneProfile:
        rows = [self._row(name, chosen) for name in self._keys]
        seconds = round(self._request.seconds - self._left(), 1)
        found = chosen.found.found | {"drafts": rows, "skipped": self._skipped, "seconds": seconds}
        made_for, bounds = self._keys[NONE], chosen.found.bounds
        if chosen.name == NONE:
            return TuneProfile(made_for, bounds, chosen.chosen, found)
        draft = str(Path(chosen.name).absolute()) if is_file(chosen.name) else chosen.name
        return TuneProfile(made_for, bounds, {"draft": draft, **chosen.chosen}, found, self._keys[chosen.name].draft)

    def _row(self, name: str, chosen: _Entry) -> dict[str, Any]:
        """Return the report's row of one draft. Values that do not apply or were not measured are None."""
        entry = next((entry for entry in self._entries if entry.name == name), None)
        draft_value, best = (None, None) if entry is None else (entry.tuner.draft_value, entry.best)
        predicted = [] if entry is None else entry.found.found["candidates"]
        return {
            "draft": name,
            "chosen": entry is chosen,
            "left_out": self._left_out.get(name),
            **{name: getattr(draft_value, name, None) for name in DRAFT_VALUES},
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
