"""Write a model in a layout for fetches of single experts, which stock llama.cpp can run.

A GGUF tensor is one array [columns, rows, n_expert]. One expert's gate, up and down can therefore not be contiguous,
and there can be no padding between two experts of a tensor. The format allows:

- Every tensor starts on a page (general.alignment), and so does every expert whose size is a multiple of a page.
- Dense tensors come first, then the expert tensors of each block.
- gate and up are fused into one tensor, if the architecture's loader supports it: two reads per expert, not three.
- Experts are reordered within their block, with their router rows, so that experts chosen together are adjacent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_speq.convert import ordering
from edge_speq.convert.evaluation.graph import Ids
from edge_speq.convert.ordering import Permutation
from edge_speq.convert.sub_experts import expert_tensors
from edge_speq.convert.sub_experts.expert_tensors import Block
from edge_speq.errors import EdgeError
from edge_speq.gguf import atomic
from edge_speq.gguf.container import MAX_ALIGNMENT, GGUFFile
from edge_speq.gguf.model import MOE_ARCHITECTURES, TABLES, architecture, check_model, hyperparameter
from edge_speq.gguf.rewrite import NewTensor, Rewrite, Source
from edge_speq.progress import Progress, silent

# architectures whose loaders try ffn_gate_up_exps first: llama_model_base::create_tensor_gate_up_exps and gemma4.cpp
_FUSABLE = "cohere2moe deepseek2 deepseek2-ocr gemma4 granite_swa hy_v3 qwen35moe qwen3next qwen4exp"
FUSABLE = frozenset(_FUSABLE.split())
# architectures in which positions of experts matter: chunk experts shared by neighbours, experts chosen by token id
ORDERED = frozenset(("grovemoe", "deepseek4", "hy_v4", "glm5-next"))
PAGE = 4096
WEIGHTS = ("gate.weight", "up.weight", "gate_up.weight", "down.weight")
ALIGNMENTS = tuple(1 << i for i in range(5, MAX_ALIGNMENT.bit_length()))


@dataclass(frozen=True, slots=True)
class PackOptions:
    alignment: int = PAGE
    fuse: bool | None = None  # None: if the architecture and the tensors allow it
    order: str | None = None  # a trace, a text, or "bundled"


@dataclass(frozen=True, slots=True)
class PackSummary:
    out: str
    n_bytes: int
    source_bytes: int
    alignment: int
    fused_blocks: int
    unfused: str | None  # why some blocks are not fused
    n_blocks: int
    reads_per_expert: int  # tensors with weights of one expert, the maximum over blocks
    aligned_experts: float  # share of all experts' parts that start on a page
    runs_before: float | None  # separate places read in a tensor for one token, mean over blocks, on the trace
    runs: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def pack(
    model: str | Path,
    out: str | Path,
    options: PackOptions,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> PackSummary:
    """Write the packed file and return a summary. Raises EdgeError if the model does not allow the options."""
    file = check_model(model)
    if options.alignment not in ALIGNMENTS:
        most = ALIGNMENTS[-1]
        raise EdgeError(f"an alignment of {options.alignment}", f"give a power of two from 32 to {most}", usage=True)
    blocks = expert_tensors.blocks(file)
    whys = {index: why for index, block in blocks.items() if (why := _unfusable(file, block))}
    if options.fuse and whys:
        expert_tensors.refuse(file, f"gate and up cannot be fused: {next(iter(whys.values()))}", "leave --fuse out")
    fused = set() if options.fuse is False else set(blocks) - set(whys)
    with Source(file) as source:
        size = _rewrite(source, blocks, fused, {}, options.alignment).size
        atomic.check(out, force, sources=file.paths, expected_bytes=size)
        trace = _trace(file, blocks, options.order)
        orders = {index: ordering.chain(ids, _n_expert(blocks[index])) for index, ids in trace.items()}
        rewrite = _rewrite(source, blocks, fused, orders, options.alignment)
        if not dry_run:
            with atomic.output(out, force, sources=file.paths, expected_bytes=size) as path:
                rewrite.write(path, progress)
    same = {index: np.arange(_n_expert(block)) for index, block in blocks.items()}
    reads = [sum(_is_weight(part) for part in block.tensors) - (index in fused) for index, block in blocks.items()]
    return PackSummary(
        out=str(out),
        n_bytes=size,
        source_bytes=file.size,
        alignment=options.alignment,
        fused_blocks=len(fused),
        unfused="not requested" if options.fuse is False else next(iter(whys.values()), None),
        n_blocks=len(blocks),
        reads_per_expert=max(reads),
        aligned_experts=_aligned_share(rewrite, options.alignment),
        runs_before=_mean_runs(trace, same) if trace else None,
        runs=_mean_runs(trace, orders) if trace else None,
    )


def _n_expert(block: Block) -> int:
    return block.get("down.weight").ne[2]


def _is_weight(part: str) -> bool:
    return part in WEIGHTS


def _unfusable(file: GGUFFile, block: Block) -> str | None:
    """Return why a block's gate and up cannot be fused, or None."""
    if architecture(file) not in FUSABLE:
        return f"llama.cpp's loader of {architecture(file)} does not support a fused tensor"
    gate, up = block.tensors.get("gate.weight"), block.tensors.get("up.weight")
    if gate is None or up is None:
        return "it does not have both tensors"
    if (gate.type, gate.ne) != (up.type, up.ne):
        return f"gate is {gate.type}, up {up.type}"
    extra = [part for part in block.tensors if part.split(".")[0] in ("gate", "up") and not _is_weight(part)]
    if extra:  # the fused path has one scale for both and, in most graphs, no bias
        return f"it has {extra[0]}"
    if f"{architecture(file)}.swiglu_clamp_exp" in file.fields:
        return "its activations are clamped, which the fused path leaves out"
    return None


def _trace(file: GGUFFile, blocks: Mapping[int, Block], order: str | None) -> dict[int, Ids]:
    if order is None:
        return {}
    arch = architecture(file)
    if arch not in MOE_ARCHITECTURES or arch in ORDERED or any(map(TABLES.search, file.tensors)):
        expert_tensors.refuse(file, f"the experts of {arch} cannot change places", "leave --order out")
    if hyperparameter(file, "expert_group_count") > 1:
        expert_tensors.refuse(file, "its router chooses groups of neighbouring experts", "leave --order out")
    trace = ordering.routing(file.paths[0], order)
    ordering.check(trace, {index: _n_expert(block) for index, block in blocks.items()})
    return trace


def _mean_runs(trace: Mapping[int, Ids], orders: Mapping[int, Permutation]) -> float:
    return float(np.mean([ordering.runs(ids, orders[index]) for index, ids in trace.items()]))


def _rewrite(
    source: Source, blocks: Mapping[int, Block], fused: set[int], orders: Mapping[int, Permutation], alignment: int
) -> Rewrite:
    weights = {t.name for block in blocks.values() for part, t in block.tensors.items() if _is_weight(part)}
    routed_by = {t.name: index for index, block in blocks.items() for t in block.tensors.values()}
    tensors = []
    for tensor in source.file.tensors.values():  # dense tensors first, in the file's order
        if tensor.name not in weights:
            tensors.append(_permuted(source, tensor.name, orders.get(routed_by.get(tensor.name, -1))))
    for index, block in blocks.items():
        order = orders.get(index)
        if index in fused:
            tensors.append(_fused(source, block, order))
        kept = [part for part in WEIGHTS if part in block.tensors]
        kept = [part for part in kept if index not in fused or part not in ("gate.weight", "up.weight")]
        tensors += [_permuted(source, block.get(part).name, order) for part in kept]
    return Rewrite(source, {}, tensors, alignment)


def _permuted(source: Source, name: str, order: Permutation | None) -> NewTensor:
    tensor = source.file.tensors[name]
    if order is None:
        return source.copy(tensor)
    return NewTensor(tensor.name, tensor.type, tensor.ne, lambda: (source.expert(tensor, int(e)) for e in order))


def _fused(source: Source, block: Block, order: Permutation | None) -> NewTensor:
    """Return the fused tensor, with gate's rows first in each expert: build_moe_ffn reads the first half as gate."""
    gate, up = block.get("gate.weight"), block.get("up.weight")
    columns, rows, n_expert = gate.ne
    name = gate.name.replace("ffn_gate_exps", "ffn_gate_up_exps")

    def data(experts: Sequence[int]) -> Iterator[bytes]:
        for expert in experts:
            yield source.expert(gate, expert)
            yield source.expert(up, expert)

    experts = range(n_expert) if order is None else order.tolist()
    return NewTensor(name, gate.type, (columns, 2 * rows, n_expert), functools.partial(data, experts))


def _aligned_share(rewrite: Rewrite, alignment: int) -> float:
    """Return the share of the experts' parts that start at a multiple of the alignment."""
    parts = [tensor for tensor in rewrite.tensors if "_exps.weight" in tensor.name]
    sizes = [(tensor.n_bytes // tensor.ne[2], tensor.ne[2]) for tensor in parts]
    begin = sum(sum(i * size % alignment == 0 for i in range(n)) for size, n in sizes)
    return begin / sum(n for _, n in sizes)
