"""Check a GGUF file, hash its tensors, and compare two files by bytes and by their outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_speq.convert.evaluation import agreement, reader
from edge_speq.gguf import container, layout
from edge_speq.gguf import model as gguf_model
from edge_speq.gguf.container import GGUFFile
from edge_speq.progress import Progress, silent


def describe(path: str | Path, progress: Progress = silent) -> tuple[GGUFFile, dict[str, Any]]:
    """Check the structure, and the tensors if the file is a model; hash every tensor. Return the file and a summary.

    Raises GGUFError for an invalid file.
    """
    file = container.read(path)
    is_model = f"{gguf_model.architecture(file)}.block_count" in file.fields
    if is_model:
        gguf_model.check_model(path)
    hashes = layout.hashes(file, progress)
    tensors = {
        name: {"type": tensor.type.lower(), "ne": list(tensor.ne), "sha256": hashes[name]}
        for name, tensor in file.tensors.items()
    }
    summary = {
        "files": [str(part) for part in file.paths],
        "is_model": is_model,
        "size_bytes": file.size,
        "n_tensors": len(tensors),
        "content_sha256": layout.content_hash(file, hashes),
        "tensors": tensors,
    }
    return file, summary


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[str]]:
    """Return the names of tensors that differ between two summaries of `describe`, by kind of difference."""
    first, second = a["tensors"], b["tensors"]
    both = [name for name in first if name in second]
    return {
        "only_in_first": [name for name in first if name not in second],
        "only_in_second": [name for name in second if name not in first],
        "other_shape": [name for name in both if first[name]["ne"] != second[name]["ne"]],
        "other_type": [name for name in both if first[name]["type"] != second[name]["type"]],
        "other_bytes": [
            name
            for name in both
            if first[name]["sha256"] != second[name]["sha256"] and first[name]["type"] == second[name]["type"]
        ],
    }


def compare(
    a: str | Path, b: str | Path, text: str | Path | None = None, *, most: int | None, progress: Progress = silent
) -> agreement.Agreement:
    """Return the agreement of two models on a text, by default the bundled prompts. `progress` counts tokens."""
    return agreement.measure(a, b, reader.read_text(text), most=most, progress=progress)
