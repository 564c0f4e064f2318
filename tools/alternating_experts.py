"""What alternating between the graphs of a model that drafts for itself costs a step: docs/performance.md.

    python tools/alternating_experts.py models/tales-moe.gguf [MORE.gguf ...]

A token is decoded with the model's own experts, or with routers kept to what is in slots, again and again, and then in
turn, which builds a graph at every step. Least of the repetitions, milliseconds, one CPU thread.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

import llama_cpp
from llama_cpp import _internals as internals

from edge_speq import _native
from edge_speq.runtime import loading

MODES, PAST, REPETITIONS = ("own", "resident"), 40, 12


def measure(path: Path) -> dict[str, tuple[float, float]]:
    """For each mode the milliseconds of a step after its like, and after the other."""
    params, contexts = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    contexts.n_ctx, contexts.n_threads, contexts.n_threads_batch = 256, 1, 1
    keep_alive = loading.experts_on_host(params)
    with contextlib.closing(loading.load_model(path, params, "model")) as model:
        experts = _native.model_experts(model.model)
        hook = _native.Hook(model.model, experts, 1, [group.n_experts * 3 // 4 for group in experts.groups])
        with (
            contextlib.closing(internals.LlamaContext(model=model, params=contexts)) as context,
            contextlib.closing(internals.LlamaBatch(n_tokens=64, embd=0, n_seq_max=1)) as batch,
        ):

            def step(mode: str) -> float:
                started = time.perf_counter()
                if not hook.use_experts(mode):
                    raise SystemExit(f"{path}: too few experts of a block are in slots")
                context.kv_cache_seq_rm(-1, PAST, -1)
                loading.decode(context, batch, [17], PAST, 1, hook=hook)
                return 1e3 * (time.perf_counter() - started)

            loading.decode(context, batch, list(range(5, 5 + PAST)), 0, 1, hook=hook)
            for token in range(8):
                loading.decode(context, batch, [token], PAST, 1, hook=hook)
                context.kv_cache_seq_rm(-1, PAST, -1)
            alike = {mode: min(step(mode) for _ in range(REPETITIONS)) for mode in MODES}
            turns = [{mode: step(mode) for mode in MODES} for _ in range(REPETITIONS)]
        hook.detach()
    del keep_alive
    return {mode: (alike[mode], min(turn[mode] for turn in turns)) for mode in MODES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    _native.load_backends()
    for path in parser.parse_args().models:
        for mode, (alike, in_turn) in measure(path).items():
            print(f"{path.name}: {mode}: {alike:.2f} ms after its like, {in_turn:.2f} in turn")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
