"""MoE-Prism's sub-experts (arXiv 2510.19366) in a GGUF file that stock llama.cpp runs: E experts become N * E.

The neurons of an expert (rows of gate and up, columns of down) are distributed to N sub-experts with their parent's
router row. Siblings have equal scores, so the N * k best are the siblings of the k best parents. Their sum is the
parents' output, exact up to the order of additions. A sibling's gate weight is 1/N of its parent's, so down is
multiplied by N: in the scales of its blocks if N is a power of two, otherwise by a scale per expert if the graph has
one. With a tilt (router_tilt) siblings have different scores.

Rows can move one by one. Columns of a quantized down move in whole blocks, whose values share a scale.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.convert.sub_experts import activation_profile, elastic_k, expert_tensors, partition
from edge_speq.convert.sub_experts.activation_profile import Stage, unwatched
from edge_speq.convert.sub_experts.expert_tensors import Block
from edge_speq.convert.sub_experts.options import SplitOptions
from edge_speq.errors import EdgeError
from edge_speq.gguf import atomic, quant_blocks
from edge_speq.gguf.container import U32, GGUFFile, Tensor
from edge_speq.gguf.model import MAX_EXPERTS, architecture, check_model, hyperparameter
from edge_speq.gguf.rewrite import NewTensor, Rewrite, Source, Value, n_bytes
from edge_speq.planning.sub_experts import ALL_USED, SUB_EXPERTS

# supported architectures; tests/convert/test_split.py compares their split files with the sources
ARCHITECTURES = ("qwen3moe", "llama", "olmoe", "qwen2moe", "phimoe", "granitemoe", "gpt-oss", "deepseek2")


N_FF_OF_EXPERTS = ("llama", "olmoe", "phimoe", "granitemoe")  # feed_forward_length is the width of an expert


SCALED = ("qwen3moe", "llama")  # graphs that multiply by ffn_down_exps.scale


Order = npt.NDArray[np.int64]  # [n_expert, n_sub, neurons]: the neurons of each sub-expert


@dataclass(frozen=True, slots=True)
class Cut:
    """Partition and tilt of the experts of a block."""

    order: Order
    tilt: npt.NDArray[np.float64] | None = None  # [n_expert, n_sub], added to scores
    constant: npt.NDArray[np.float32] | None = None  # [n_embd], router row with output 1

    def scales(self) -> npt.NDArray[np.float32]:
        """Return the factor of each sub-expert that cancels the tilt in its weight."""
        n = self.order.shape[0] * self.order.shape[1]
        return np.ones(n, np.float32) if self.tilt is None else np.exp(-self.tilt.ravel()).astype(np.float32)


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """Result of a split, or of its dry run."""

    out: str
    n_bytes: int
    source_bytes: int
    n_expert: int
    n_expert_used: int
    n_expert_used_full: int  # value with which the model equals its source, unless tilted
    sub_experts: int
    tilt: float  # more than 0: lossy with any number of parts
    n_ff: int  # neurons of a sub-expert
    unit: int  # neurons that move together
    sub_expert_bytes: int  # largest over blocks
    router_bytes: int
    exact_scale: bool  # down is multiplied by N without rounding
    profiled_tokens: int | None
    unseen_experts: int | None  # experts without a profile, whose neurons keep their order
    objective_contiguous: float | None  # spare parts' share of the activation, mean over experts
    objective: float | None
    points: list[elastic_k.Point] | None = None  # with --measure

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def split(
    model: str | Path,
    out: str | Path,
    options: SplitOptions,
    *,
    force: bool = False,
    dry_run: bool = False,
    stage: Stage = unwatched,
) -> SplitSummary:
    """Write the split model and return a summary. Raises EdgeError if model, N or k is not possible."""
    file = check_model(model)
    blocks = expert_tensors.blocks(file)
    _require_known(file, blocks)
    n_used = _require_possible(file, blocks, options)
    cuts = {index: Cut(_in_order(block, options.n_sub)) for index, block in blocks.items()}
    with Source(file) as source:
        size = _rewrite(source, blocks, cuts, options, n_used).size
        target = atomic.check(out, force, sources=file.paths, expected_bytes=size)
        found, points = None, None
        if options.profiled and not dry_run:
            units = {index: _unit(block, options) for index, block in blocks.items()}
            found = activation_profile.partitions(file, blocks, units, options, target, stage)
            cuts = {
                index: Cut(
                    _neurons(found.orders[index], units[index]), found.tilts.get(index), found.constants.get(index)
                )
                for index in blocks
            }
        if not dry_run:
            with atomic.output(out, force, sources=file.paths, expected_bytes=size) as path:
                with stage("writing", "") as progress:
                    _rewrite(source, blocks, cuts, options, n_used).write(path, progress)
                if options.measure:
                    ks = elastic_k.choices(hyperparameter(file, "expert_used_count") * options.n_sub, options.n_sub)
                    token_bytes = sum(_part_bytes(block, options) for block in blocks.values())
                    with stage("measuring", "points") as progress:
                        points = elastic_k.points(path, ks, token_bytes, progress)
    return _summary(file, blocks, options, n_used, out, size, found, points)


def _require_known(file: GGUFFile, blocks: Mapping[int, Block]) -> None:
    arch = architecture(file)
    if arch not in ARCHITECTURES:
        expert_tensors.refuse(
            file, f"architecture {arch} is not supported", f"supported are {', '.join(ARCHITECTURES)}"
        )
    if hyperparameter(file, "expert_group_count") > 1:
        # groups are chosen by the sum of their two best experts, which would be siblings
        expert_tensors.refuse(file, "it chooses groups of experts by their two best ones, which siblings would change")
    for name in ("expert_feed_forward_length", "expert_used_count", *_n_ff_keys(file)):
        found = file.fields.get(f"{arch}.{name}")
        if found is not None and found.count is not None:
            expert_tensors.refuse(file, f"{name} differs from layer to layer")
    if len({block.n_ff for block in blocks.values()}) > 1:
        expert_tensors.refuse(file, "its blocks have experts of different widths")


def _n_ff_keys(file: GGUFFile) -> tuple[str, ...]:
    return ("feed_forward_length",) if architecture(file) in N_FF_OF_EXPERTS else ()


def _require_possible(file: GGUFFile, blocks: Mapping[int, Block], options: SplitOptions) -> int:
    """Check N, k and types. Return the number of sub-experts used per token and block."""
    n_expert, k, n = hyperparameter(file, "expert_count"), hyperparameter(file, "expert_used_count"), options.n_sub
    units = max(_unit(block, options) for block in blocks.values())
    n_ff = next(iter(blocks.values())).n_ff
    allowed = [m for m in range(2, MAX_EXPERTS // n_expert + 1) if n_ff % (m * units) == 0]
    if n not in allowed:
        kinds = sorted({_down_type(block, options) for block in blocks.values()})
        why = (
            f"{n} sub-experts are not possible: an expert's {n_ff} neurons, in blocks of {units} ({', '.join(kinds)}), "
        )
        why += f"and at most {MAX_EXPERTS} experts allow {', '.join(map(str, allowed)) or 'none'}"
        free = "" if options.requantize else ", or give --requantize q8_0 (blocks of 32) or f16 (no blocks)"
        raise EdgeError(why, f"choose one of these{free}" if allowed else free.removeprefix(", or "), usage=True)
    for block in blocks.values():
        if options.requantize is None and block.get("down.weight").type not in quant_blocks.SCALABLE:
            kind = block.get("down.weight").type
            raise EdgeError(f"the scales of {kind} cannot be multiplied in place", "give --requantize q8_0", usage=True)
    used = k * n if options.used is None else options.used
    if options.tilt and architecture(file) not in SCALED:
        expert_tensors.refuse(
            file, f"llama.cpp's graph of {architecture(file)} has no scales of experts", "leave --tilt out"
        )
    if options.tilt and not (0 < options.tilt <= 1 and options.profiled):
        raise EdgeError(f"a tilt of {options.tilt}", "give more than 0 and at most 1, and a profile", usage=True)
    if not 1 <= used <= k * n:
        raise EdgeError(f"k={used} is not a number of sub-experts", f"give 1 to {k * n}", usage=True)
    return used


def _down_type(block: Block, options: SplitOptions) -> str:
    return options.requantize.upper() if options.requantize else block.get("down.weight").type


def _unit(block: Block, options: SplitOptions) -> int:
    """Return how many neurons move together: a block of down, or one if down is requantized."""
    return 1 if options.requantize else quant_blocks.block(block.get("down.weight").type)[0]


def _in_order(block: Block, n_sub: int) -> Order:
    return partition.contiguous(block.get("down.weight").ne[2], block.n_ff, n_sub)


def _neurons(units: Order, size: int) -> Order:
    """Return the neurons of units of `size` neurons."""
    n_expert, n_sub, _ = units.shape
    return (units[..., None] * size + np.arange(size)).reshape(n_expert, n_sub, -1)


def _rewrite(
    source: Source, blocks: Mapping[int, Block], cuts: Mapping[int, Cut], options: SplitOptions, n_used: int
) -> Rewrite:
    file, n = source.file, options.n_sub
    arch, n_ff = architecture(file), next(iter(blocks.values())).n_ff
    changes: dict[str, Value | None] = {
        f"{arch}.expert_count": (U32, hyperparameter(file, "expert_count") * n),
        f"{arch}.expert_used_count": (U32, n_used),
        SUB_EXPERTS: (U32, n),
        ALL_USED: (U32, hyperparameter(file, "expert_used_count") * n),
    }
    own = "feed_forward_length" if arch in N_FF_OF_EXPERTS else "expert_feed_forward_length"
    changes[f"{arch}.{own}"] = (U32, n_ff // n)
    if arch == "deepseek2":  # the width of its shared experts is given in widths of a routed one
        changes[f"{arch}.expert_shared_count"] = (U32, hyperparameter(file, "expert_shared_count") * n)
    roles = {t.name: (part, block) for block in blocks.values() for part, t in block.tensors.items()}
    tensors = []
    for tensor in file.tensors.values():
        if tensor.name in roles:
            part, block = roles[tensor.name]
            cut = cuts[block.index]
            tensors.append(_new(source, tensor, part, cut, options))
            scaled = _factors(file, n)[1] != 1 or options.tilt
            if part == "down.weight" and "down.scale" not in block.tensors and scaled:
                tensors.append(_scales(tensor, n, cut.scales() * np.float32(_factors(file, n)[1])))
        else:
            tensors.append(source.copy(tensor))
    return Rewrite(source, changes, tensors)


def _new(source: Source, tensor: Tensor, part: str, cut: Cut, options: SplitOptions) -> NewTensor:
    n, (role, kind), order = options.n_sub, part.split("."), cut.order
    if part == "down.weight":
        return _new_down(source, tensor, order, options)
    if role in ("gate", "up", "gate_up") and kind in ("weight", "bias"):
        *inner, rows, n_expert = tensor.ne
        data = functools.partial(_rows, source, tensor, order, 2 if role == "gate_up" else 1)
        return NewTensor(tensor.name, tensor.type, (*inner, rows // n, n_expert * n), data)
    # router rows, biases of down and per-expert scales are copied from the parent
    factors = np.ones(order.shape[0] * n, np.float32)
    if part == "down.scale":
        factors = cut.scales() * np.float32(_factors(source.file, n)[1])
    if part == "down.bias" and not expert_tensors.weights_add_up(source.file):
        factors /= n  # each sibling would add the whole bias
    if part == "selection.bias" and expert_tensors.gating(source.file) == expert_tensors.SOFTMAX:
        factors /= n  # softmax scores become 1/n too
    ne = (*tensor.ne[:-1], tensor.ne[-1] * n)
    if part == "router.weight" and cut.tilt is not None and cut.constant is not None:
        data = functools.partial(_tilted, source, tensor, cut.tilt, cut.constant)
        return NewTensor(tensor.name, tensor.type, ne, data)
    return NewTensor(tensor.name, tensor.type, ne, functools.partial(_repeated, source, tensor, n, factors))


def _factors(file: GGUFFile, n: int) -> tuple[int, int]:
    """Return the factors of down's values and of each expert's scale."""
    if not expert_tensors.weights_add_up(file):
        return 1, 1
    exact = n & (n - 1) == 0
    return (1, n) if not exact and architecture(file) in SCALED else (n, 1)


def _scales(down: Tensor, n: int, scales: npt.NDArray[np.float32]) -> NewTensor:
    return NewTensor(down.name.replace(".weight", ".scale"), "F32", (down.ne[2] * n,), lambda: [scales.tobytes()])


def _tilted(
    source: Source, tensor: Tensor, tilt: npt.NDArray[np.float64], constant: npt.NDArray[np.float32]
) -> Iterator[bytes]:
    """Yield the siblings' router rows: the parent's row plus the tilt."""
    for expert, shifts in enumerate(tilt):
        row = quant_blocks.dequantize(source.expert(tensor, expert), tensor.type, tensor.ne[0])
        yield quant_blocks.quantize(row + shifts[:, None].astype(np.float32) * constant, tensor.type)


def _rows(source: Source, tensor: Tensor, order: Order, halves: int) -> Iterator[bytes]:
    """Yield the rows of gate or up, or entries of their biases; with fused tensors gate's rows come first."""
    for expert, parts in enumerate(order):
        rows = np.frombuffer(source.expert(tensor, expert), np.uint8).reshape(halves, parts.size, -1)
        for neurons in parts:
            yield rows[:, neurons].tobytes()


def _repeated(source: Source, tensor: Tensor, n: int, factors: npt.NDArray[np.float32]) -> Iterator[bytes]:
    for expert in range(tensor.ne[-1]):
        data = source.expert(tensor, expert)
        for factor in factors[expert * n : (expert + 1) * n]:
            yield data if factor == 1 else (np.frombuffer(data, np.float32) * factor).tobytes()


def _new_down(source: Source, tensor: Tensor, order: Order, options: SplitOptions) -> NewTensor:
    factor, _ = _factors(source.file, options.n_sub)
    n_ff, n_embd, n_expert = tensor.ne
    ne = (n_ff // options.n_sub, n_embd, n_expert * options.n_sub)
    if options.requantize:
        data = functools.partial(_requantized, source, tensor, order, factor, options.requantize.upper())
        return NewTensor(tensor.name, options.requantize.upper(), ne, data)
    return NewTensor(tensor.name, tensor.type, ne, functools.partial(_columns, source, tensor, order, factor))


def _columns(source: Source, tensor: Tensor, order: Order, factor: int) -> Iterator[bytes]:
    elements, size = quant_blocks.block(tensor.type)
    for expert, parts in enumerate(order):
        blocks = np.frombuffer(source.expert(tensor, expert), np.uint8).reshape(tensor.ne[1], -1, size)
        blocks = quant_blocks.scale(blocks, tensor.type, factor)
        for neurons in parts:
            yield blocks[:, neurons[::elements] // elements].tobytes()


def _requantized(source: Source, tensor: Tensor, order: Order, factor: int, type_name: str) -> Iterator[bytes]:
    for expert, parts in enumerate(order):
        weights = quant_blocks.dequantize(source.expert(tensor, expert), tensor.type, tensor.ne[0]) * np.float32(factor)
        for neurons in parts:
            yield quant_blocks.quantize(weights[:, neurons], type_name)


def _summary(
    file: GGUFFile,
    blocks: Mapping[int, Block],
    options: SplitOptions,
    n_used: int,
    out: str | Path,
    size: int,
    found: activation_profile.ActivationProfile | None,
    points: list[elastic_k.Point] | None,
) -> SplitSummary:
    n, first = options.n_sub, next(iter(blocks.values()))
    return SplitSummary(
        out=str(out),
        n_bytes=size,
        source_bytes=file.size,
        n_expert=hyperparameter(file, "expert_count") * n,
        n_expert_used=n_used,
        n_expert_used_full=hyperparameter(file, "expert_used_count") * n,
        sub_experts=n,
        tilt=options.tilt,
        n_ff=first.n_ff // n,
        unit=max(_unit(block, options) for block in blocks.values()),
        sub_expert_bytes=max(_part_bytes(block, options) for block in blocks.values()),
        router_bytes=sum(block.get("router.weight").n_bytes * n for block in blocks.values()),
        exact_scale=(factor := _factors(file, n)[0]) & (factor - 1) == 0,
        profiled_tokens=found.n_tokens if found else None,
        unseen_experts=found.unseen if found else None,
        objective_contiguous=found.contiguous if found else None,
        objective=found.objective if found else None,
        points=points,
    )


def _part_bytes(block: Block, options: SplitOptions) -> int:
    """Return the bytes of one sub-expert."""
    inputs = [t for part, t in block.tensors.items() if part in ("gate.weight", "up.weight", "gate_up.weight")]
    n_ff, n_embd, _ = block.get("down.weight").ne
    down = n_bytes(_down_type(block, options), (n_ff // options.n_sub, n_embd))
    return down + sum(t.n_bytes // (t.ne[2] * options.n_sub) for t in inputs)
