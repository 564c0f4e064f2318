"""Number of sub-experts that a token runs under policy moe-prism. `edge-speq convert split` writes such models.

llama.cpp reads the number from the file's `expert_used_count` or from an override of that key. Slots and routing
buffers are allocated for the number that the loaded model runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import llama_cpp

from edge_speq.errors import EdgeError
from edge_speq.gguf.container import GGUFFile
from edge_speq.gguf.model import architecture, hyperparameter
from edge_speq.policies.published.systems import MoePrism

SUB_EXPERTS = "edge_speq.sub_experts"  # number of parts that each expert was cut into
ALL_USED = "edge_speq.expert_used_all"  # number of parts that make the model equal to its source

Override = llama_cpp.llama_model_kv_override


@dataclass(frozen=True, slots=True)
class SubExperts:
    """Numbers of sub-experts (parts of experts) per token and block."""

    key: str  # metadata key that llama.cpp reads
    used: int  # its value in the file
    all_used: int  # value that makes the model equal to its source

    def use(self, params: Any) -> None:
        """Set model parameters to run MoE-Prism's share of the parts, or the file's number if it is reduced already.

        An override by the caller is kept. Raises EdgeError if that override is not 1 to all_used.
        """
        given = _overrides(params)
        found = self._find(given)
        if found is None:
            kept = self.used if self.used < self.all_used else _kept(self.all_used)
            params.kv_overrides = _with(given, self.key, kept)  # ctypes keeps the array for as long as params lives
        elif found.tag != llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT or not 1 <= found.value.val_i64 <= self.all_used:
            raise EdgeError(f"{self.key} is not a number of parts", f"give 1 to {self.all_used}", usage=True)

    def _find(self, overrides: list[Any]) -> Any:
        return next((override for override in overrides if override.key == self.key.encode()), None)


def read(file: GGUFFile) -> SubExperts:
    """Return the sub-experts of a model file. Raises EdgeError if its experts are not split."""
    path = file.paths[0]
    used = hyperparameter(file, "expert_used_count")
    if SUB_EXPERTS not in file.fields:
        how = f"edge-speq convert split {path.name} -o OUT.gguf --sub-experts {MoePrism.split}"
        raise EdgeError(
            f"policy moe-prism needs a model with split experts, and {path.name} has no experts in parts",
            f"cut them: {how} --k {_kept(MoePrism.split * used)}" if used else "it is a dense model",
            usage=True,
        )
    return SubExperts(f"{architecture(file)}.expert_used_count", used, _whole(file, ALL_USED) or used)


def _whole(file: GGUFFile, key: str) -> int:
    value = file.fields[key].value if key in file.fields else 0
    return value if isinstance(value, int) else 0


def _kept(all_used: int) -> int:
    return math.ceil(MoePrism.KEPT * all_used)


def _overrides(params: Any) -> list[Any]:
    """Return the overrides of model parameters, without the empty key that ends the array."""
    found: list[Any] = []
    while params.kv_overrides and params.kv_overrides[len(found)].key:
        found.append(params.kv_overrides[len(found)])
    return found


def _with(given: list[Any], key: str, number: int) -> Any:
    made = (Override * (len(given) + 2))(*given)  # the last entry stays empty: it ends the array
    made[len(given)].key = key.encode()
    made[len(given)].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
    made[len(given)].value.val_i64 = number
    return made
