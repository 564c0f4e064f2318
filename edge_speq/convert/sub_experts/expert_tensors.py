"""Routed experts of a model for convert split and pack: blocks, tensors, and gate weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NoReturn

from edge_speq.errors import EdgeError
from edge_speq.gguf.container import TOKENS, GGUFFile, Tensor
from edge_speq.gguf.model import architecture, hyperparameter

SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # llama_expert_gating_func_type
PER_EXPERT = re.compile(
    r"blk\.(\d+)\.(ffn_(?:gate|up|down|gate_up)_exps|ffn_gate_inp(?=\.(?:weight|bias)$)|exp_probs_b)\.(\w+)"
)  # gemma4's ffn_gate_inp.scale has a number for each column instead
GLM_LITE_VOCABULARY = 154880  # deepseek2.cpp recognizes GLM-4.7-Lite, which has sigmoid gates, by its vocabulary


@dataclass(slots=True)
class Block:
    """The tensors of one block with an expert dimension, by part: "down.weight", "router.weight", ..."""

    index: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def get(self, part: str) -> Tensor:
        return self.tensors[part]

    @property
    def n_ff(self) -> int:
        return self.get("down.weight").ne[0]


def blocks(file: GGUFFile) -> dict[int, Block]:
    """Return the blocks with routed experts, in order. Raises EdgeError for a dense model."""
    found: dict[int, Block] = {}
    for tensor in file.tensors.values():
        match = PER_EXPERT.fullmatch(tensor.name)
        if match:
            part = match[2].removeprefix("ffn_").removesuffix("_exps")
            part = {"gate_inp": "router", "exp_probs_b": "selection"}.get(part, part)
            found.setdefault(int(match[1]), Block(int(match[1]))).tensors[f"{part}.{match[3]}"] = tensor
    found = {index: found[index] for index in sorted(found) if "down.weight" in found[index].tensors}
    if not found:
        raise EdgeError(f"{file.paths[0]} has no routed experts", "give a Mixture-of-Experts model", usage=True)
    for block in found.values():
        if "router.weight" not in block.tensors:
            refuse(file, f"block {block.index} has experts but no router")
    return found


def refuse(file: GGUFFile, why: str, hint: str = "") -> NoReturn:
    raise EdgeError(f"{file.paths[0]} cannot be converted: {why}", hint, usage=True)


def flag(file: GGUFFile, name: str) -> bool:
    found = file.fields.get(f"{architecture(file)}.{name}")
    return found is not None and bool(found.value)


def gating(file: GGUFFile) -> int:
    """Return the gating function of an architecture of convert split (src/models of the pinned llama.cpp)."""
    arch = architecture(file)
    if arch == "gpt-oss":
        return SOFTMAX_OF_CHOSEN
    if arch != "deepseek2":
        return SOFTMAX
    chosen = hyperparameter(file, "expert_gating_func")
    tokens = file.fields.get(TOKENS)
    if not chosen and tokens is not None and tokens.count == GLM_LITE_VOCABULARY:
        return SIGMOID
    return chosen or SOFTMAX


def weights_add_up(file: GGUFFile) -> bool:
    """Return true if the weights of N siblings with their parent's score add up to the parent's weight.

    That holds for softmax and for normalised weights, but not for sigmoid alone.
    """
    return gating(file) in (SOFTMAX, SOFTMAX_OF_CHOSEN) or flag(file, "expert_weights_norm")
