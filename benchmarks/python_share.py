"""Which share of the time of generating text is spent outside of decodes, of the target's and a draft's.

Texts are those of `edge-speq bench`, for each policy in turn. Outside of decodes run the policy, the draft length
control, sampling, and what hands tokens to the caller. Each decode is waited for, so no device works meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import loading, store
from benchmarks.tables import Spread, markdown
from edge_speq import _native, texts
from edge_speq.bench.instrumented import InstrumentedLlama


def outside(model: InstrumentedLlama, text: str, n: int) -> tuple[float, float]:
    """Return the seconds per token outside of decodes, and their share of all seconds."""
    model.reset()
    with contextlib.closing(model.generate(model.words(text, add_bos=True), temp=0.0)) as stream:
        next(stream)
        with model.watch() as steps:
            started = time.perf_counter()
            for _ in range(n):
                next(stream)
            seconds = time.perf_counter() - started
    found = seconds - sum(step.seconds for step in steps) - model.draft_seconds
    return found / n, found / seconds


def measure(loads: dict[str, dict[str, Any]], path: str, n: int, repetitions: int) -> list[dict[str, Any]]:
    models = {name: InstrumentedLlama(path, **options) for name, options in loads.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repetition in range(1 + repetitions):
        for prompt in texts.bundled().chosen:
            for name, model in models.items():
                seen = outside(model, prompt.text, n)
                if repetition:  # the first warms up
                    found[name].append(seen)
    return [
        {"policy": name, "us": Spread.of(1e6 * us for us, _ in both).to_dict()}
        | {"share": Spread.of(share for _, share in both).to_dict()}
        for name, both in found.items()
    ]


def table(found: dict[str, Any]) -> str:
    rows = [
        [row["policy"], Spread.stored(row["us"]).text(0), Spread.stored(row["share"]).text(1, 100)]
        for row in found["rows"]
    ]
    return markdown(("policy", "µs a token", "% of the time"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    _native.load_backends()
    rows = measure(loading.options_of(arguments), arguments.model, arguments.n, arguments.r)
    made = {"model": Path(arguments.model).name, "emulation": arguments.emulate, "rows": rows}
    arguments.out.write_text(store.whole(made), encoding="utf-8")
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    loading.add_options(made)
    made.add_argument("-n", type=int, default=32, help="tokens of each text (%(default)s)")
    made.add_argument("-r", type=int, default=3, help="repetitions (%(default)s)")
    return made


if __name__ == "__main__":
    sys.exit(main())
