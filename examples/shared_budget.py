"""Load two models under one VRAM ceiling: the first gives up slots when the second joins.

python examples/shared_budget.py [MODEL.gguf OTHER.gguf CEILING]
"""

import sys

from edge_speq import Budget, EdgeLlama
from edge_speq.gguf.bundled import MODEL, path

first, second, ceiling = sys.argv[1:] or [str(path(MODEL)), str(path(MODEL)), "48MiB"]
budget = Budget(ceiling)


def report(event: str, *models: EdgeLlama) -> None:
    held = [f"{model.stats().experts.slots} slots, {model.memory_used() / 2**20:.1f} MiB" for model in models]
    print(f"{event}: {'; '.join(held)}; ceiling {budget.bytes / 2**20:.0f} MiB")


one = EdgeLlama(first, vram_budget=budget, n_ctx=512)
report("one model", one)
two = EdgeLlama(second, vram_budget=budget, n_ctx=512)
report("two models", one, two)
print(two("The old house", max_tokens=24)["choices"][0]["text"])
two.close()
report("one model again", one)
one.close()
