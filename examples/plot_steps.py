"""Record every verify step with on_step; plot the steps, or print a table if matplotlib is not installed.

python examples/plot_steps.py [MODEL.gguf DRAFT.gguf]
"""

import sys
from typing import Any

from edge_speq import EdgeLlama
from edge_speq.gguf.bundled import DRAFT, MODEL, path

model, draft = sys.argv[1:] or [str(path(MODEL)), str(path(DRAFT))]
records: list[Any] = []
llm = EdgeLlama(model, draft=draft, draft_tokens=4, resident="1/2", n_ctx=512, on_step=records.append)
llm("The old house stood at the end of the lane", max_tokens=64)
llm.close()

steps = [(step.drafted, step.accepted, step.misses, 1000 * step.seconds) for step in records if not step.is_prompt]
names = ("drafted", "accepted", "misses", "ms")
try:
    import matplotlib.pyplot as plt
except ModuleNotFoundError:
    print(" ".join(names), *(f"{d:7} {a:8} {m:6} {ms:.1f}" for d, a, m, ms in steps), sep="\n")
else:
    figure, axes = plt.subplots(len(names), sharex=True)
    for axis, name, values in zip(axes, names, zip(*steps, strict=True), strict=True):
        axis.plot(values)
        axis.set_ylabel(name)
    figure.savefig("steps.png")
    print(f"{len(steps)} steps plotted to steps.png")
