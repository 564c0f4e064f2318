"""Stream a completion, then print what happened to the experts.

python examples/stream.py [MODEL.gguf]
"""

import sys

from edge_speq import EdgeLlama
from edge_speq.gguf.bundled import MODEL, path

(model,) = sys.argv[1:] or [str(path(MODEL))]

llm = EdgeLlama(model, resident="1/2", n_ctx=512)
for chunk in llm.create_completion("The old house stood at the end of the lane", max_tokens=64, stream=True):
    print(chunk["choices"][0]["text"], end="", flush=True)

stats = llm.stats()
print(f"\n\n{stats.experts.hits} hits, {stats.experts.misses} misses, {stats.timing.tok_per_s:.0f} tok/s")
llm.close()
