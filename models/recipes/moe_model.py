"""A Mixtral in torch for train_moe.py: weights, files, and the graph of llama.cpp's src/models/llama.cpp."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

END = 0  # the token <|endoftext|>
ROUND = 64  # rows: every expert's share of a batch is padded to the largest one, rounded up


@dataclass(frozen=True, slots=True)
class Shape:
    """What config.json says. Width and ff are multiples of 256, the columns of a K-quant's block, in real runs."""

    d_model: int = 256
    layers: int = 6
    experts: int = 20
    top: int = 2
    ff: int = 256
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 8192
    context: int = 1024
    theta: float = 10_000.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.d_model % self.heads or self.heads % self.kv_heads or not 0 < self.top <= self.experts:
            raise SystemExit("error: heads must divide d_model, kv-heads heads, and top be at most experts")

    @property
    def head(self) -> int:
        return self.d_model // self.heads

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "torch_dtype": "float16",
            "vocab_size": self.vocab,
            "hidden_size": self.d_model,
            "intermediate_size": self.ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.top,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "bos_token_id": END,
            "eos_token_id": END,
        }

    @classmethod
    def read(cls, folder: Path) -> Shape:
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(
            d_model=c["hidden_size"],
            layers=c["num_hidden_layers"],
            experts=c["num_local_experts"],
            top=c["num_experts_per_tok"],
            ff=c["intermediate_size"],
            heads=c["num_attention_heads"],
            kv_heads=c["num_key_value_heads"],
            vocab=c["vocab_size"],
            context=c["max_position_embeddings"],
            theta=c["rope_theta"],
            eps=c["rms_norm_eps"],
        )


def initial(shape: Shape, device: str, seed: int) -> dict[str, Any]:
    """F32. A layer's experts are two tensors: `w13` [experts, 2 ff, d], gate then up, and `w2` [experts, d, ff]."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    narrow = 0.02 / math.sqrt(2 * shape.layers)  # what is added to the residual stream

    def normal(*size: int, deviation: float = 0.02) -> Any:
        return torch.empty(size, device=device).normal_(0, deviation, generator=generator)

    d, kv = shape.d_model, shape.kv_heads * shape.head
    weights = {"embed": normal(shape.vocab, d), "norm": torch.ones(d, device=device)}
    for i in range(shape.layers):
        weights |= {
            f"{i}.attn_norm": torch.ones(d, device=device),
            f"{i}.qkv": normal(d + 2 * kv, d),
            f"{i}.o": normal(d, d, deviation=narrow),
            f"{i}.ffn_norm": torch.ones(d, device=device),
            f"{i}.gate": normal(shape.experts, d),
            f"{i}.w13": normal(shape.experts, 2 * shape.ff, d),
            f"{i}.w2": normal(shape.experts, d, shape.ff, deviation=narrow),
        }
    return weights


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotation(shape: Shape, length: int, device: Any) -> tuple[Any, Any]:
    import torch

    speeds = shape.theta ** (-torch.arange(0, shape.head, 2, device=device).float() / shape.head)
    angles = torch.arange(length, device=device).float()[:, None] * speeds
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def rotate(x: Any, turn: tuple[Any, Any]) -> Any:
    """Halves, as Hugging Face has them; llama.cpp's converter permutes the rows of q and k to neighbours."""
    import torch

    first, second = x.float().chunk(2, -1)
    return (x.float() * turn[0] + torch.cat((-second, first), -1) * turn[1]).to(x.dtype)


def attention(weights: dict[str, Any], i: int, x: Any, shape: Shape, turn: tuple[Any, Any]) -> Any:
    import torch.nn.functional as f

    batch, length, _ = x.shape
    kv = shape.kv_heads * shape.head
    found = f.linear(x, weights[f"{i}.qkv"]).split((shape.d_model, kv, kv), -1)
    q, k, v = (one.view(batch, length, -1, shape.head).transpose(1, 2) for one in found)
    k, v = (one.repeat_interleave(shape.heads // shape.kv_heads, 1) for one in (rotate(k, turn), v))
    mixed = f.scaled_dot_product_attention(rotate(q, turn), k, v, is_causal=True)
    return f.linear(mixed.transpose(1, 2).reshape(batch, length, shape.d_model), weights[f"{i}.o"])


def experts(weights: dict[str, Any], i: int, x: Any, shape: Shape) -> tuple[Any, Any, Any]:
    """Of tokens [n, d]: what experts give, Switch's balancing loss (arXiv 2101.03961, eq. 4), tokens an expert.

    No token is dropped, since llama.cpp drops none: rows are laid out by expert and padded to the busiest one's.
    """
    import torch
    import torch.nn.functional as f

    n = len(x)
    with torch.autocast(x.device.type, enabled=False):
        chances = f.linear(x.float(), weights[f"{i}.gate"]).softmax(-1)
        chosen_chances, chosen = chances.topk(shape.top, -1)
        shares = chosen_chances / chosen_chances.sum(-1, keepdim=True)
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=shape.experts)
    rows = -(-int(counts.max()) // ROUND) * ROUND
    order = flat.argsort(stable=True)
    within = torch.arange(len(flat), device=x.device) - (counts.cumsum(0) - counts)[flat[order]]
    places = torch.empty_like(flat).index_copy_(0, order, flat[order] * rows + within)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    source = x.to(dtype)[:, None].expand(n, shape.top, -1).reshape(n * shape.top, -1)
    laid = source.new_zeros(shape.experts * rows, shape.d_model).index_copy(0, places, source)
    gate, up = laid.view(shape.experts, rows, -1).bmm(weights[f"{i}.w13"].transpose(1, 2)).chunk(2, -1)
    given = (f.silu(gate) * up).bmm(weights[f"{i}.w2"].transpose(1, 2)).flatten(0, 1)
    picked = given.index_select(0, places).view(n, shape.top, -1)
    balance = shape.experts * (counts / (n * shape.top) * chances.mean(0)).sum()
    return (picked.float() * shares[..., None]).sum(1), balance, counts


def forward(weights: dict[str, Any], shape: Shape, ids: Any) -> tuple[Any, Any, Any]:
    """Of ids [batch, length]: logits, the mean balancing loss, tokens an expert [layers, experts]."""
    import torch
    import torch.nn.functional as f

    x = f.embedding(ids, weights["embed"])
    turn = rotation(shape, ids.shape[1], ids.device)
    balance, counts = [], []
    for i in range(shape.layers):
        x = x + attention(weights, i, rms_norm(x, weights[f"{i}.attn_norm"], shape.eps), shape, turn)
        normed = rms_norm(x, weights[f"{i}.ffn_norm"], shape.eps).flatten(0, 1)
        given, cost, count = experts(weights, i, normed, shape)
        x = x + given.view_as(x)
        balance.append(cost)
        counts.append(count)
    logits = f.linear(rms_norm(x, weights["norm"], shape.eps), weights["embed"])
    return logits, torch.stack(balance).mean(), torch.stack(counts)


def named(weights: dict[str, Any], shape: Shape) -> Iterator[tuple[str, Any]]:
    """Hugging Face's names and matrices, views where they are one tensor here. `lm_head` is the embedding."""
    kv = shape.kv_heads * shape.head
    yield "model.embed_tokens.weight", weights["embed"]
    yield "model.norm.weight", weights["norm"]
    for i in range(shape.layers):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", weights[f"{i}.attn_norm"]
        yield p + "post_attention_layernorm.weight", weights[f"{i}.ffn_norm"]
        for name, part in zip("qkv", weights[f"{i}.qkv"].split((shape.d_model, kv, kv)), strict=True):
            yield f"{p}self_attn.{name}_proj.weight", part
        yield p + "self_attn.o_proj.weight", weights[f"{i}.o"]
        yield p + "block_sparse_moe.gate.weight", weights[f"{i}.gate"]
        for e in range(shape.experts):
            gate, up = weights[f"{i}.w13"][e].chunk(2)
            for name, part in (("w1", gate), ("w2", weights[f"{i}.w2"][e]), ("w3", up)):
                yield f"{p}block_sparse_moe.experts.{e}.{name}.weight", part


def save(weights: dict[str, Any], shape: Shape, folder: Path, most: int) -> None:
    """F16 safetensors files of at most `most` bytes each with the index that Hugging Face's loaders read."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Any]] = [{}]
    size = 0
    for name, tensor in named(weights, shape):
        array = tensor.detach().to("cpu").half().numpy()
        if files[-1] and size + array.nbytes > most:
            files.append({})
            size = 0
        files[-1][name] = array
        size += array.nbytes
    index: dict[str, str] = {}
    for i, arrays in enumerate(files, start=1):
        path = folder / f"model-{i:05d}-of-{len(files):05d}.safetensors"
        _write_safetensors(path, arrays)
        index |= dict.fromkeys(arrays, path.name)
    total = sum(array.nbytes for arrays in files for array in arrays.values())
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n", encoding="utf-8")


def _write_safetensors(path: Path, arrays: dict[str, Any]) -> None:
    """Length of the header, the header (JSON, padded to 8 bytes), the data: huggingface/safetensors, README, Format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F16", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())


def load(folder: Path) -> tuple[dict[str, Any], Shape]:
    """What `save` wrote, in F32."""
    import torch

    shape = Shape.read(folder)
    weights = initial(shape, "cpu", 0)
    parts = dict(named(weights, shape))
    for path in sorted(folder.glob("model-*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                at, end = (start + offset for offset in entry["data_offsets"])
                array = np.frombuffer(data[at:end], dtype=np.float16).reshape(entry["shape"])
                parts.pop(name).copy_(torch.from_numpy(array.astype(np.float32)))
    if parts:
        raise SystemExit(f"error: {folder} lacks {next(iter(parts))}")
    return weights, shape
