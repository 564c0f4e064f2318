"""File with the routed experts of a twin (`edge-speq convert draft --experts-only`), checked against its target.

A twin is a low-bit copy of the target model that serves as its draft.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq import _native
from edge_speq.errors import EdgeError
from edge_speq.gguf.container import TYPES, GGUFFile
from edge_speq.gguf.model import EXPERTS, ROUTER, hyperparameter

KIND, EXPERTS_ONLY = "edge_speq.kind", "twin-experts"
ROUTERS_HASH = "edge_speq.target.routers_sha256"
ROLES = {"up": 0, "gate": 1, "down": 2, "gate_up": 3}  # EDGE_ROLE_...


@dataclass(frozen=True, slots=True)
class DraftExpertsFile:
    path: Path
    tensors: npt.NDArray[Any]  # [n_tensors] of _native.DRAFT_TENSOR
    n_bytes: int  # on the compute device


def is_experts_only(file: GGUFFile) -> bool:
    found = file.fields.get(KIND)
    return found is not None and found.value == EXPERTS_ONLY


def read(file: GGUFFile, target: GGUFFile) -> DraftExpertsFile:
    """Return the experts of a twin of the target. Raises EdgeError if they belong to another model."""
    from edge_speq.gguf import layout  # slow import, and most drafts are whole models

    path, n_layers = file.paths[0], _n_layers(target)
    made_for = file.fields.get(ROUTERS_HASH)
    expected = _experts(target)
    blocks = {layer: number for number, layer in enumerate(sorted({layer for layer, _ in expected}))}
    numbers = {name: number for number, (name, _, _) in TYPES.items()}
    rows = []
    for name, span in layout.spans(file).items():
        match = EXPERTS.fullmatch(name)
        if match and int(match[1]) >= n_layers:
            continue
        like = expected.get((int(match[1]), match[2])) if match else None
        if match is None or like is None or span.tensor.ne != target.tensors[name].ne:
            raise _of_another(path, f"{name} is not one of its experts")
        rows.append((blocks[int(match[1])], ROLES[match[2]], numbers[span.tensor.type], span.offset))
    if len(rows) != len(expected):
        raise _of_another(path, f"it has {len(rows)} expert tensors, the model {len(expected)}")
    if made_for is None or made_for.value != routers_hash(target):
        raise _of_another(path, "it was made for other routers")
    if len(file.paths) > 1:
        raise EdgeError(f"{path} is split", "give the twin's experts as one file")
    n_bytes = sum(tensor.n_bytes for tensor in file.tensors.values())
    return DraftExpertsFile(path, np.array(rows, dtype=_native.DRAFT_TENSOR), n_bytes)


def routers_hash(target: GGUFFile) -> str:
    """Return the SHA-256 of a model's routers, sorted by name. A twin and its target have the same routers."""
    from edge_speq.gguf import layout

    digest = hashlib.sha256()
    spans = layout.spans(target)
    for name in sorted(filter(ROUTER.fullmatch, spans)):
        digest.update(f"{name}\0".encode())
        for piece in spans[name].pieces():
            digest.update(piece)
    return digest.hexdigest()


def _experts(target: GGUFFile) -> dict[tuple[int, str], str]:
    matches = (EXPERTS.fullmatch(name) for name in target.tensors)
    n = _n_layers(target)
    return {(int(match[1]), match[2]): match[0] for match in matches if match and int(match[1]) < n}


def _n_layers(target: GGUFFile) -> int:
    """Return the number of layers, without multi-token-prediction layers, which the decoding graph does not have."""
    return hyperparameter(target, "block_count") - hyperparameter(target, "nextn_predict_layers")


def _of_another(path: Path, why: str) -> EdgeError:
    return EdgeError(
        f"the draft {path} holds experts of another model: {why}",
        "make it from this one: edge-speq convert draft MODEL -o DRAFT --experts-only",
    )
