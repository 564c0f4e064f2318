"""Make a model of realistic size from a small trained MoE GGUF without changing what it computes.

    python models/recipes/inflate.py models/tales-moe.gguf OUT.gguf --width-times 8 --ff-times 8 --layers-times 8

It works on the quantized blocks; only scales of blocks are changed, and only to zero. Text, routing and a draft's
acceptance stay those of the source; bytes and work become those of a large model.

--ff-times R: every hidden unit of a routed expert exists R times. The copies must add the output of one, so the output
    projection weighs them 1, 0, ..., 0: the scales of the copies' blocks are zero.
--width-times W: every channel of the residual stream exists W times, with equal values. Norm weights of the copies are
    zero, so each matrix behind a norm reads the first of each. Number and width of heads stay.
--layers-times L: each block is followed by L - 1 silent ones. They compute attention and experts like any block, but
    both output projections have scales of zero. A silent block is a copy of one of the source's blocks, each in turn,
    with its own order of experts (--seed). Its router is trained and reads the text's real residual stream, though not
    at the depth it was trained for, and the L - 1 blocks behind one block read the same stream. Measured on the bundled
    model (`inflate_check.py --prompts 4`): a token shares 28 % of its experts with the token before in the source, 25 %
    in silent blocks. LRU slots for a quarter of the experts hit 43 %, with L = 8 40 %. Counts predict 44 % of the next
    block's experts from a block's own, with L = 8 49 % (80 % if silent blocks copied the block right before them).

Weights of 1/R and 1/W would add up to the same, but they round: R = 2 would round half of the bundled model's down
blocks and R = 8 nine in ten, since their f16 scales are subnormal. Even without any rounding of weights (everything
else that enters the residual stream times R) rounding of the sums changes 8-bit activations: with R = 8, 10 of 4,242
routings of a token and 2 of 256 greedy tokens differed. Weights of 1 and 0 keep the logits bit-exact on the CPU. GPU
kernels may add in an order that depends on the shape.

Needs numpy and gguf; --verify needs edge_speq. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Data = npt.NDArray[Any]

# bytes of a block, and where its f16 scales lie, of which all its values are multiples (ggml-common.h)
SCALES: dict[str, tuple[int, tuple[int, ...]]] = {
    "Q4_0": (18, (0,)), "Q4_1": (20, (0, 2)), "Q5_0": (22, (0,)), "Q5_1": (24, (0, 2)), "Q8_0": (34, (0,)),
    "Q2_K": (84, (80, 82)), "Q3_K": (110, (108,)), "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,)),
    "IQ2_XXS": (66, (0,)), "IQ2_XS": (74, (0,)), "IQ2_S": (82, (0,)), "IQ3_XXS": (98, (0,)), "IQ3_S": (110, (0,)),
    "IQ1_S": (50, (0,)), "IQ4_NL": (18, (0,)), "IQ4_XS": (136, (0,)),
}  # fmt: skip
UNBLOCKED = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Role:
    """The way in which a tensor grows. Dimensions are "width", "ff" or neither; a vector has columns only."""

    columns: str = ""
    rows: str = ""
    first: bool = False  # of the copies of its columns all but the first are zero
    silent: bool = False  # zero in a silent block
    experts: bool = False  # numpy's first dimension is the experts


NORM, READS = Role("width", first=True), Role("width")
ROLES = {
    "token_embd.weight": READS,
    "output.weight": READS,
    "output_norm.weight": NORM,
    "rope_freqs.weight": Role(),
    "attn_norm.weight": NORM,
    "attn_q.weight": READS,
    "attn_k.weight": READS,
    "attn_v.weight": READS,
    "attn_q_norm.weight": Role(),
    "attn_k_norm.weight": Role(),
    "attn_output.weight": Role("", "width", silent=True),
    "ffn_norm.weight": NORM,
    "ffn_gate_inp.weight": Role("width", experts=True),
    "ffn_gate_exps.weight": Role("width", "ff", experts=True),
    "ffn_up_exps.weight": Role("width", "ff", experts=True),
    "ffn_down_exps.weight": Role("ff", "width", first=True, silent=True, experts=True),
}
ARCHITECTURES = ("qwen3moe", "llama")  # whose graphs use these tensors in these roles, with heads of their own width
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


class InflateError(Exception):
    """The model cannot be inflated, or not this way."""


@dataclass(frozen=True, slots=True)
class Times:
    """By how much a model grows. Raises InflateError for less than once."""

    ff: int = 1
    width: int = 1
    layers: int = 1

    def __post_init__(self) -> None:
        for name, n in (("ff", self.ff), ("width", self.width), ("layers", self.layers)):
            if n < 1:
                raise InflateError(f"--{name}-times {n}: it must be at least 1")

    def of(self, dimension: str) -> int:
        return {"width": self.width, "ff": self.ff}.get(dimension, 1)


def silenced(data: Data, kind: str, name: str) -> Data:
    """The tensor's data with all values zero: of blocks only the scales change. Raises InflateError for a type whose
    scales are not known."""
    if kind in UNBLOCKED:
        return np.zeros_like(data)
    if kind not in SCALES:
        raise InflateError(f"{name}: the scales of {kind} are not known, quantize the model to another type")
    size, offsets = SCALES[kind]
    blocks: Data = data.reshape(-1, size).copy()
    for at in offsets:
        blocks[:, at : at + 2] = 0
    return blocks.reshape(data.shape)


@dataclass(frozen=True, slots=True)
class Grown:
    """One tensor of the result."""

    name: str
    source: gguf.ReaderTensor
    role: Role
    times: Times
    is_silent: bool
    permutation: Data | None  # of its experts

    @property
    def shape(self) -> tuple[int, ...]:
        """In numpy's order, the columns in bytes where the type has blocks."""
        shape = list(self.source.data.shape)
        shape[-1] *= self.times.of(self.role.columns)
        if len(shape) > 1:
            shape[-2] *= self.times.of(self.role.rows)
        return tuple(shape)

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * int(self.source.data.dtype.itemsize)

    def data(self) -> Data:
        found: Data = self.source.data
        kind = self.source.tensor_type.name
        if self.permutation is not None:
            found = found[self.permutation]
        n, n_rows = self.times.of(self.role.columns), self.times.of(self.role.rows)
        copies = silenced(found, kind, self.name) if self.is_silent or (self.role.first and n > 1) else found
        first = copies if self.is_silent else found
        if n == n_rows == 1:
            return first
        grown: Data = np.empty(self.shape, dtype=found.dtype)
        first, copies = np.atleast_2d(first), np.atleast_2d(copies)
        *experts, rows, columns = first.shape
        view = grown.reshape(*experts, n_rows, rows, n, columns)
        view[..., 0, :] = first[..., None, :, :]
        view[..., 1:, :] = copies[..., None, :, None, :]
        return grown


class Inflation:
    """The inflated form of a source file. Raise InflateError for a file that is not known to stay the same."""

    def __init__(self, source: Path, times: Times, seed: int = 0) -> None:
        try:
            self._reader = gguf.GGUFReader(source)
        except (OSError, ValueError, IndexError) as error:
            raise InflateError(f"cannot read {source}: {error}") from error
        self.times, self._seed = times, seed
        self._arch = str(self._field("general.architecture"))
        self._by_name = {tensor.name: tensor for tensor in self._reader.tensors}
        if self._arch not in ARCHITECTURES:
            raise InflateError(f"architecture {self._arch}: known are {', '.join(ARCHITECTURES)}")
        if "split.count" in self._reader.fields:
            raise InflateError("a split model: merge its parts first (llama-gguf-split --merge)")
        self._n_layer, self._n_expert = self._number("block_count"), self._number("expert_count", 0)
        self._require_known()
        self.tensors = list(self._grow())
        self.n_bytes = sum(tensor.n_bytes for tensor in self.tensors)

    def _field(self, key: str) -> Any:
        found = self._reader.fields.get(key)
        return None if found is None else found.contents()

    def _number(self, name: str, otherwise: int | None = None) -> int:
        value = self._field(f"{self._arch}.{name}")
        value = otherwise if value is None else value
        if not isinstance(value, int):
            raise InflateError(f"{self._arch}.{name} is {'missing' if value is None else 'not a whole number'}")
        return value

    def _require_known(self) -> None:
        if not any(name.endswith("ffn_down_exps.weight") for name in self._by_name):
            raise InflateError("no routed experts: only MoE models are inflated")
        for name in self._by_name:
            match = BLOCK.fullmatch(name)
            what = match[2] if match and int(match[1]) < self._n_layer else name
            if what not in ROLES:
                raise InflateError(f"tensor {name}: what it does is not known")
        for key, field in self._reader.fields.items():
            if key.startswith(f"{self._arch}.") and len(field.types) > 1:
                raise InflateError(f"{key}: hyper-parameters that differ from layer to layer are not known")

    def blocks(self) -> list[tuple[int, bool]]:
        """Of each block of the result: which of the source's it copies, and whether it is silent."""
        n, times = self._n_layer, self.times.layers
        return [((block + behind) % n, behind > 0) for block in range(n) for behind in range(times)]

    def _grow(self) -> Iterator[Grown]:
        of_block: dict[int, list[tuple[str, gguf.ReaderTensor]]] = {}
        for name, tensor in self._by_name.items():
            match = BLOCK.fullmatch(name)
            if match:
                of_block.setdefault(int(match[1]), []).append((match[2], tensor))
            else:
                yield Grown(name, tensor, ROLES[name], self.times, False, None)
        for index, (block, silent) in enumerate(self.blocks()):
            order = np.random.default_rng([self._seed, index]).permutation(self._n_expert) if silent else None
            for what, tensor in of_block.get(block, []):
                role = ROLES[what]
                is_silent, permutation = silent and role.silent, order if role.experts else None
                yield Grown(f"blk.{index}.{what}", tensor, role, self.times, is_silent, permutation)

    # --- metadata --------------------------------------------------------------------------------------

    def _changed(self) -> dict[str, Any]:
        """Whole numbers and the name, in place of the source's or besides them."""
        times, arch, width = self.times, self._arch, self._number("embedding_length")
        ff = "expert_feed_forward_length"
        ff = ff if f"{arch}.{ff}" in self._reader.fields else "feed_forward_length"  # llama's is that of its experts
        key = self._number("attention.key_length", width // self._number("attention.head_count"))
        name = self._field("general.name") or "model"
        return {
            f"{arch}.block_count": self._n_layer * times.layers,
            f"{arch}.embedding_length": width * times.width,
            f"{arch}.{ff}": self._number(ff) * times.ff,
            f"{arch}.attention.key_length": key,
            f"{arch}.attention.value_length": self._number("attention.value_length", key),
            f"{arch}.rope.dimension_count": self._number("rope.dimension_count", key),
            "general.name": f"{name}-ff{times.ff}-width{times.width}-layers{times.layers}",
            "edge_speq.inflated.ff_times": times.ff,
            "edge_speq.inflated.width_times": times.width,
            "edge_speq.inflated.layers_times": times.layers,
        }

    def _add_fields(self, writer: gguf.GGUFWriter) -> None:
        changed = self._changed()
        for key, field in self._reader.fields.items():
            if key.startswith("GGUF.") or key in ("general.architecture", "general.size_label", *changed):
                continue
            elements = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=elements)
        for key, value in changed.items():
            kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
            writer.add_key_value(key, value, kind)

    def summary(self) -> dict[str, Any]:
        routed = sum(tensor.n_bytes for tensor in self.tensors if tensor.name.endswith("_exps.weight"))
        n_experts = self._n_expert * sum(tensor.name.endswith("ffn_down_exps.weight") for tensor in self.tensors)
        return {
            "ff_times": self.times.ff,
            "width_times": self.times.width,
            "layers_times": self.times.layers,
            "layers": self._n_layer * self.times.layers,
            "embedding_length": self._number("embedding_length") * self.times.width,
            "experts": n_experts,
            "mean_expert_bytes": routed // n_experts,
            "routed_bytes": routed,
            "total_bytes": self.n_bytes,
        }

    # --- the file --------------------------------------------------------------------------------------

    def write(self, out: Path) -> None:
        """Writes a temporary file beside `out` and renames it: nothing half-written bears its name."""
        part = out.with_name(f".{out.name}.{os.getpid()}.part")
        try:
            free = shutil.disk_usage(out.parent).free
            if self.n_bytes > free:
                raise InflateError(f"{out.parent}: {free / 1e9:.1f} GB are free, {self.n_bytes / 1e9:.1f} GB needed")
            self._write(part)
            part.replace(out)
        except OSError as error:
            raise InflateError(f"cannot write {out}: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)

    def _write(self, path: Path) -> None:
        writer = gguf.GGUFWriter(path, self._arch)
        self._add_fields(writer)
        for tensor in self.tensors:
            found = tensor.source
            writer.add_tensor_info(
                tensor.name, tensor.shape, found.data.dtype, tensor.n_bytes, raw_dtype=found.tensor_type
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in self.tensors:
                writer.write_tensor_data(tensor.data())
        finally:
            writer.close()


def verify(source: Path, out: Path) -> dict[str, Any]:
    try:
        import inflate_check

        from edge_speq.errors import EdgeError
    except ImportError as error:
        raise InflateError(f"--verify needs edge_speq: {error}") from error
    try:
        return inflate_check.compare(source, out)
    except EdgeError as error:
        raise InflateError(str(error)) from error


def run(arguments: argparse.Namespace, times: Times) -> dict[str, Any]:
    inflation = Inflation(arguments.source, times, arguments.seed)
    if arguments.out.exists() and arguments.out.samefile(arguments.source):
        raise InflateError("OUT is SOURCE: give another name")
    report = inflation.summary()
    sizes = f"{report['experts']} experts of {report['mean_expert_bytes'] / 1e6:.2f} MB"
    print(f"{report['layers']} layers, {sizes}, {inflation.n_bytes / 1e9:.2f} GB in all", file=sys.stderr)
    if not arguments.dry_run:
        started = time.perf_counter()
        inflation.write(arguments.out)
        report["seconds"] = round(time.perf_counter() - started, 2)
    if arguments.verify and not arguments.dry_run:
        report |= verify(arguments.source, arguments.out)
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a trained MoE GGUF")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--ff-times", type=int, default=1, metavar="R", help="hidden units of each routed expert")
    parser.add_argument("--width-times", type=int, default=1, metavar="W", help="channels of the residual stream")
    parser.add_argument(
        "--layers-times", type=int, default=1, metavar="L", help="blocks, of which L - 1 in L are silent"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of experts in silent blocks")
    parser.add_argument("--dry-run", action="store_true", help="the sizes only")
    parser.add_argument("--verify", action="store_true", help="compare routing and greedy text with the source's")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    arguments = parser.parse_args(argv)
    try:
        times = Times(arguments.ff_times, arguments.width_times, arguments.layers_times)
    except InflateError as error:
        parser.error(str(error))
    try:
        report = run(arguments, times)
    except InflateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report) if arguments.json else "\n".join(f"{key:<24}{value}" for key, value in report.items()))
    return 0 if report.get("same_text", True) else 1


if __name__ == "__main__":
    raise SystemExit(main())
