"""What part of the time of generating text Python takes: all that is outside of decodes, of the target's and a draft's.

    python tools/python_share.py models/tales-moe.gguf --resident 1/4 -n 64 -r 5

Texts are the benchmark's, each policy's in turn. Outside of decodes: the policy, the governor, sampling, and what hands
tokens to the caller. Each decode is waited for, so that no device works while Python is being timed. (step_record.py's
`host` is that, and what its own record takes.)
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import llama_cpp
import step_record

from edge_speq import _native
from edge_speq import texts as prompts
from edge_speq.bench.instrumented import InstrumentedLlama


class Timed(InstrumentedLlama):
    decoding = 0.0  # seconds

    def _decode(self, chunk: list[int], past: int, n_rows: int) -> None:
        started = time.perf_counter()
        super()._decode(chunk, past, n_rows)
        llama_cpp.llama_synchronize(self._ctx.ctx)
        self.decoding += time.perf_counter() - started

    def share(self, text: str, n: int) -> tuple[float, float]:
        """Python's seconds a token, and its share."""
        self.reset()
        with contextlib.closing(self.generate(self.words(text, add_bos=True), temp=0.0)) as stream:
            next(stream)
            self.decoding = self.draft_seconds = 0.0
            started = time.perf_counter()
            for _ in range(n):
                next(stream)
            seconds = time.perf_counter() - started
        outside = seconds - self.decoding - self.draft_seconds
        return outside / n, outside / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    step_record.add_options(parser)
    parser.add_argument("-n", type=int, default=32, metavar="N", help="tokens of each text (32)")
    parser.add_argument("-r", type=int, default=3, metavar="N", help="repetitions (3)")
    arguments = parser.parse_args()

    _native.load_backends()
    texts = [prompt.text for prompt in prompts.bundled().chosen]
    loads = step_record.load_options(arguments)
    models = {name: Timed(str(arguments.model), **options) for name, options in loads.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repetition in range(1 + arguments.r):
        for text in texts:
            for name, model in models.items():
                seen = model.share(text, arguments.n)
                if repetition:  # the first warms up
                    found[name].append(seen)
    for name, both in found.items():
        micros = 1e6 * statistics.median(seconds for seconds, _ in both)
        shares = sorted(100 * share for _, share in both)
        spread = f"[{shares[0]:.1f}, {shares[-1]:.1f}]"
        print(f"{name:16} {micros:6.0f} us a token, {statistics.median(shares):.1f} % {spread} of the time")


if __name__ == "__main__":
    main()
