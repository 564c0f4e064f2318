"""Make the draft of MoE-SpeQ: a twin of the target with low-bit routed experts and unchanged other tensors.

In MoE-SpeQ (arXiv 2511.14102, section 4) the twin proposes tokens, and its routing predicts the target's experts. Only
the experts differ, so a file of the experts is enough if the target is loaded too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_speq.convert.evaluation import reader
from edge_speq.convert.quantization import imatrix, quantize, types
from edge_speq.errors import EdgeError
from edge_speq.gguf import atomic, container, draft_experts, layout, writer
from edge_speq.gguf import model as gguf_model
from edge_speq.gguf.container import GGUFFile
from edge_speq.progress import Progress, silent

TARGET_HASH = "edge_speq.target.content_sha256"  # layout.content_hash of the target
CALIBRATION = 16384  # tokens of text for an importance matrix


def recipe(
    target: str | Path,
    kind: str,
    importance: imatrix.Importance | None = None,
    importance_name: str = "",
    block: int | None = None,
) -> quantize.Recipe:
    """Return a recipe with experts of type `kind`, in all blocks or one, and unchanged types of the other tensors.

    Raises EdgeError for a model without routed experts, and if the type needs an importance matrix and none is given.
    """
    file = gguf_model.check_model(target)
    types.tensor_type(kind)
    if not expert_names(file):
        message = f"{target} has no routed experts, so no twin can be made"
        raise EdgeError(message, "quantize a dense model as a whole: edge-speq convert quantize", usage=True)
    if kind.lower() in types.NEEDS_IMPORTANCE and importance is None:
        raise EdgeError(f"{kind} needs an importance matrix", "give --imatrix FILE or --text FILE", usage=True)
    lowered = quantize.experts_of(block)
    kept = tuple(
        (f"^{re.escape(name)}$", tensor.type.lower())
        for name, tensor in file.tensors.items()
        if not re.search(lowered, name) and len(tensor.ne) > 1
    )
    return quantize.Recipe(types.label(kind), ((lowered, kind), *kept), importance, importance_name)


def expert_names(file: GGUFFile) -> list[str]:
    return [name for name in file.tensors if re.search(quantize.experts_of(), name)]


def importance_for(
    target: str | Path, kind: str, text: str, *, dataset: str, most: int = CALIBRATION, progress: Progress = silent
) -> imatrix.Importance | None:
    """Return an importance matrix of the text if the type needs one, or None. `progress` counts tokens."""
    if kind.lower() not in types.NEEDS_IMPORTANCE:
        return None
    return imatrix.collect(target, text, dataset=dataset, most=most, progress=progress)


def make(
    target: str | Path,
    out: str | Path,
    recipe: quantize.Recipe,
    *,
    experts_only: bool = False,
    force: bool = False,
    progress: Progress = silent,
    examine: Callable[[Path], None] | None = None,
) -> int:
    """Write the twin or only its experts, and return the bytes of the file.

    `examine` is called with the complete twin, which is temporary with experts_only. Raises EdgeError.
    """
    file = gguf_model.check_model(target)
    place = atomic.check(out, force, sources=file.paths)
    expected = quantize.plan(target, recipe)
    options: dict[str, Any] = {"force": force, "sources": file.paths}
    if not experts_only:
        with atomic.output(out, expected_bytes=expected.n_bytes, **options) as temporary:
            quantize.run(target, temporary, recipe, expected, progress, out)
        if examine is not None:
            examine(Path(out))
        return expected.n_bytes
    n_bytes = experts_size(target, recipe)
    with atomic.scratch(place, expected.n_bytes + n_bytes) as whole:
        quantize.run(target, whole, recipe, expected, progress, out)
        if examine is not None:
            examine(whole)
        made_for = keys(file, content=layout.content_hash(file, layout.hashes(file)))
        with atomic.output(out, expected_bytes=n_bytes, **options) as temporary:
            writer.write(temporary, made_for, entries(container.read(whole)))
            container.read(temporary, "twin's experts")
    return n_bytes


def experts_size(target: str | Path, recipe: quantize.Recipe) -> int:
    """Return the bytes of the file with the experts only."""
    file, outcome = gguf_model.check_model(target), quantize.plan(target, recipe)
    planned = []
    for name in expert_names(file):
        tensor, number = file.tensors[name], types.number(outcome.types[name])
        rows = tensor.ne[1] * tensor.ne[2]
        n_bytes = rows * types.row_bytes(number, tensor.ne[0])
        planned.append(writer.Entry(name, tensor.ne, number, n_bytes, ()))
    return writer.size(keys(file, content="0" * 64), planned)


def keys(file: GGUFFile, content: str) -> dict[str, writer.Value]:
    """Return the metadata of a file with a twin's experts, which identify its target."""
    return {
        "general.type": "model",
        "general.architecture": gguf_model.architecture(file),
        draft_experts.KIND: draft_experts.EXPERTS_ONLY,
        TARGET_HASH: content,
        draft_experts.ROUTERS_HASH: draft_experts.routers_hash(file),
    }


def entries(twin: GGUFFile) -> list[writer.Entry]:
    """Return the experts of a complete twin."""
    spans = layout.spans(twin)
    return [
        writer.Entry(name, span.tensor.ne, types.number(span.tensor.type), span.tensor.n_bytes, span.pieces())
        for name, span in spans.items()
        if re.search(quantize.experts_of(), name)
    ]


def twin(target: str | Path, out: str | Path, kind: str = "q2_k") -> Path:
    """Write a complete twin, with an importance matrix of the bundled text if the type needs one. Return its path."""
    importance = importance_for(target, kind, reader.read_text(None), dataset="edge_speq prompts")
    make(target, out, recipe(target, kind, importance, "edge_speq prompts"))
    return Path(out)
