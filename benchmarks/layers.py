"""Which share of the demanded experts is in slots when a step begins, by layer.

Texts are those of `edge-speq bench`: read once to fill the slots, then once to count. The hit rate, of all layers
together, also counts prefetches that arrive in time and what a layer evicts before another's turn.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import loading, store
from benchmarks.tables import markdown
from edge_speq import system
from edge_speq import texts as prompts
from edge_speq.bench.instrumented import InstrumentedLlama
from edge_speq.bench.rows import machine as hardware

RESIDENT = 2  # of Hook.states(), and above it


class Counted(InstrumentedLlama):
    """Counts demands and residents of each block while it is watched."""

    def begin(self) -> None:
        self.demanded = np.zeros(self._experts.n_blocks, dtype=np.int64)
        self.found, self.hits, self.misses = self.demanded.copy(), 0, 0

    def _decode(self, chunk: list[int], past: int, n_rows: int) -> None:
        hook = self._hook
        if self.steps is None or hook is None:
            super()._decode(chunk, past, n_rows)
            return
        states, before = hook.states(), hook.counters()
        super()._decode(chunk, past, n_rows)
        after, routing = hook.counters(), self.steps[-1].routing
        self.hits += (after.hits or 0) - (before.hits or 0)
        self.misses += (after.misses or 0) - (before.misses or 0)
        for block, ids in enumerate(routing if routing is not None else ()):
            wanted = np.unique(ids)
            self.demanded[block] += len(wanted)
            self.found[block] += int(np.count_nonzero(states[block, wanted] >= RESIDENT))


def record(model: Counted, n_tokens: int) -> dict[str, Any]:
    for recording in (False, True):
        model.begin()
        for prompt in prompts.bundled().chosen:
            model.reset()
            stream = model.generate(model.words(prompt.text, add_bos=True), temp=0.0)
            with contextlib.closing(stream):
                next(stream)
                with model.watch() if recording else contextlib.nullcontext():
                    for _ in range(n_tokens):
                        next(stream)
    hit_rate = model.hits / (model.hits + model.misses)
    return {"hit_rate": hit_rate, "demanded": model.demanded.tolist(), "found": model.found.tolist()}


def table(record: dict[str, Any]) -> str:
    runs = record["runs"]
    n_layers = len(runs[0]["found"])
    rows = [
        [run["policy"], f"{run['hit_rate']:.2f}"]
        + [f"{found / demanded:.2f}" for found, demanded in zip(run["found"], run["demanded"], strict=True)]
        for run in runs
    ]
    return markdown(("policy", "hit rate", *(f"layer {i}" for i in range(n_layers))), rows)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    runs = []
    for name, options in loading.options_of(arguments).items():
        with contextlib.closing(Counted(arguments.model, **options)) as model:
            runs.append({"policy": name} | record(model, arguments.n))
    made = {"model": Path(arguments.model).name, "emulation": arguments.emulate, "resident": arguments.resident}
    arguments.out.write_text(store.whole(made | hardware(system.cpu_model(), None) | {"runs": runs}), "utf-8")
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    loading.add_options(made)
    made.add_argument("-n", type=int, default=64, help="tokens of each of four texts")
    return made


if __name__ == "__main__":
    sys.exit(main())
