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
import numpy.typing as npt

from benchmarks import loading, store
from benchmarks.tables import markdown
from edge_speq import EdgeLlama, system
from edge_speq import texts as prompts
from edge_speq.bench.instrumented import InstrumentedLlama, StepTimer
from edge_speq.bench.rows import machine as hardware
from edge_speq.engine.observer import Decode

RESIDENT = 2  # of EdgeLlama.residency(), and above it


class Layers(StepTimer):
    """Counts the experts that each block demands, and those of them that are in slots when the step begins."""

    llm: EdgeLlama
    demanded: npt.NDArray[np.int64]  # [n_blocks], as found
    found: npt.NDArray[np.int64]

    def begin(self, llm: EdgeLlama) -> None:
        self.llm, self.before = llm, llm.stats().experts
        self.demanded, self.found = np.zeros((2, llm.experts.n_blocks), dtype=np.int64)
        self.hits = self.misses = 0

    def on_decode_begin(self) -> None:
        self.states, self.before = self.llm.residency(), self.llm.stats().experts

    def on_decode(self, decode: Decode) -> None:
        after = self.llm.stats().experts
        self.hits += (after.hits or 0) - (self.before.hits or 0)
        self.misses += (after.misses or 0) - (self.before.misses or 0)
        if self.states is None or decode.routing is None:
            return
        for block, ids in enumerate(decode.routing):
            wanted = np.unique(ids)
            self.demanded[block] += len(wanted)
            self.found[block] += int(np.count_nonzero(self.states[block, wanted] >= RESIDENT))


def record(model: InstrumentedLlama, layers: Layers, n_tokens: int) -> dict[str, Any]:
    for recording in (False, True):
        layers.begin(model.llm)
        for prompt in prompts.bundled().chosen:
            model.reset()
            stream = model.generate(model.words(prompt.text, add_bos=True), temp=0.0)
            with contextlib.closing(stream):
                next(stream)
                with model.watch() if recording else contextlib.nullcontext():
                    for _ in range(n_tokens):
                        next(stream)
    hit_rate = layers.hits / (layers.hits + layers.misses)
    return {"hit_rate": hit_rate, "demanded": layers.demanded.tolist(), "found": layers.found.tolist()}


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
        layers = Layers()
        with contextlib.closing(InstrumentedLlama(arguments.model, layers, **options)) as model:
            runs.append({"policy": name} | record(model, layers, arguments.n))
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
