"""Tiny random GGUF models, deterministic by seed: every test has real llama.cpp files of a few MB without a download.

    target = write_tiny(tmp / "moe.gguf", "qwen3moe")
    small = quantize(target, tmp / "moe.q4_k_m.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M)
    draft = write_tiny_dense(tmp / "draft.gguf")  # same vocabulary
    alien = write_tiny_dense(tmp / "alien.gguf", vocab="shuffled")  # same size, other tokens: no draft

Q4_K_M gives half of the layers Q6_K down experts and so two expert type tuples, from n_layer=2 on. Eight experts of
256 x 256 make 3.1 MB a layer in F16, 1.0 MB in Q4_K_M. A random dense draft agrees with a random target on next to no
token; a quantized twin of the target (argmax equal at 65 % of positions for Q4_K_M, 95 % for Q8_0) is accepted in part.

Tensor names and shapes follow src/models/<architecture>.cpp of the pinned llama.cpp (mixtral: llama.cpp, gpt-oss:
openai-moe.cpp, phimoe's graph: phi3.cpp). Shapes below are ggml's (columns first); numpy's are the reverse.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import llama_cpp
import numpy as np

Arch = Literal[
    "qwen3moe", "mixtral", "olmoe", "qwen2moe", "phimoe", "deepseek2", "gpt-oss", "granitemoe", "grovemoe",
    "smallthinker",  # routes by what enters the attention: experts and router read different rows
]  # fmt: skip
ARCHITECTURES: tuple[Arch, ...] = get_args(Arch)
Gate = Literal["split", "fused", "none"]  # of the routed experts: its own tensor, one with up, or absent
Vocab = Literal["bytes", "shuffled"]
Dtype = Literal["f16", "f32"]

HEAD = 64  # head width
LATENT, ROPE = 64, 32  # deepseek2: rank of the compressed q and kv, rotated part of a head
SHARED = 128  # width of shared experts and of grovemoe's chunk experts
WINDOW = 16  # gpt-oss: tokens that its sliding-window layers see
CONTEXT = 512
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
MERGES = ("t h", "Ġ t", "th e", "i n", "e r", "Ġ a")  # a few, so that tokens of several bytes occur
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes (openai/gpt-2 encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _tokens(vocab: Vocab) -> list[str]:
    words = byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]
    if vocab == "shuffled":
        words.reverse()
    return [*SPECIALS, *words]


def _add_vocab(writer: gguf.GGUFWriter, vocab: Vocab) -> int:
    tokens = _tokens(vocab)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIALS else normal for token in tokens])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    return len(tokens)


class _Weights:
    """Adds random tensors. A tensor's numbers depend on the seed and its own name only, not on the order of calls."""

    def __init__(self, writer: gguf.GGUFWriter, seed: int, dtype: Dtype) -> None:
        self.writer, self.seed = writer, seed
        self.dtype = np.float16 if dtype == "f16" else np.float32

    def _normal(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        key = [self.seed, *name.encode()]
        return np.random.default_rng(key).standard_normal(shape, dtype=np.float32)

    def matrix(self, name: str, *ne: int, gain: float = 1.0) -> None:
        """A weight of ggml shape `ne`, scaled so that inputs of unit variance give outputs of variance gain²."""
        data = self._normal(name, ne[::-1]) * (gain / np.sqrt(ne[0]))
        self.writer.add_tensor(name, data.astype(self.dtype))

    def embedding(self, name: str, n_embd: int, n_vocab: int) -> None:
        self.writer.add_tensor(name, self._normal(name, (n_vocab, n_embd)).astype(self.dtype))

    def norm(self, name: str, width: int) -> None:
        self.writer.add_tensor(name, 1 + 0.1 * self._normal(name, (width,)))  # norms are F32 in every GGUF

    def bias(self, name: str, *ne: int) -> None:
        self.writer.add_tensor(name, 0.1 * self._normal(name, ne[::-1]))

    def router(self, name: str, n_embd: int, n_expert: int) -> None:
        """F32 as converters write it. A wide spread of logits makes routing decisive and unlike from token to token."""
        self.writer.add_tensor(name, self._normal(name, (n_expert, n_embd)) * np.float32(2 / np.sqrt(n_embd)))


def _attention(
    w: _Weights, block: str, n_embd: int, n_head: int, n_head_kv: int, second_norm: str = "ffn_norm"
) -> None:
    w.norm(f"{block}.attn_norm.weight", n_embd)
    w.matrix(f"{block}.attn_q.weight", n_embd, n_head * HEAD)
    w.matrix(f"{block}.attn_k.weight", n_embd, n_head_kv * HEAD)
    w.matrix(f"{block}.attn_v.weight", n_embd, n_head_kv * HEAD)
    w.matrix(f"{block}.attn_output.weight", n_head * HEAD, n_embd, gain=0.7)
    w.norm(f"{block}.{second_norm}.weight", n_embd)


def _latent_attention(w: _Weights, block: str, n_embd: int, n_head: int) -> None:
    """deepseek2's: q and kv pass through a low rank, and the cache holds the compressed kv (MLA)."""
    w.norm(f"{block}.attn_norm.weight", n_embd)
    w.matrix(f"{block}.attn_q_a.weight", n_embd, LATENT)
    w.norm(f"{block}.attn_q_a_norm.weight", LATENT)
    w.matrix(f"{block}.attn_q_b.weight", LATENT, n_head * HEAD)
    w.matrix(f"{block}.attn_kv_a_mqa.weight", n_embd, LATENT + ROPE)
    w.norm(f"{block}.attn_kv_a_norm.weight", LATENT)
    w.matrix(f"{block}.attn_k_b.weight", HEAD - ROPE, LATENT, n_head)
    w.matrix(f"{block}.attn_v_b.weight", LATENT, HEAD, n_head)
    w.matrix(f"{block}.attn_output.weight", n_head * HEAD, n_embd, gain=0.7)
    w.norm(f"{block}.ffn_norm.weight", n_embd)


def _ffn(w: _Weights, block: str, n_embd: int, n_ff: int, suffix: str = "") -> None:
    """A dense feed-forward network, or with suffix="_shexp" a shared expert."""
    w.matrix(f"{block}.ffn_gate{suffix}.weight", n_embd, n_ff)
    w.matrix(f"{block}.ffn_up{suffix}.weight", n_embd, n_ff)
    w.matrix(f"{block}.ffn_down{suffix}.weight", n_ff, n_embd)


def _experts(
    w: _Weights, block: str, n_embd: int, n_ff: int, n_expert: int, gate: Gate = "split", suffix: str = "exps"
) -> None:
    if gate == "fused":
        w.matrix(f"{block}.ffn_gate_up_{suffix}.weight", n_embd, 2 * n_ff, n_expert, gain=1.5)
    else:
        w.matrix(f"{block}.ffn_up_{suffix}.weight", n_embd, n_ff, n_expert, gain=1.5)
    if gate == "split":
        w.matrix(f"{block}.ffn_gate_{suffix}.weight", n_embd, n_ff, n_expert, gain=1.5)
    w.matrix(f"{block}.ffn_down_{suffix}.weight", n_ff, n_embd, n_expert)


def _hyperparameters(
    writer: gguf.GGUFWriter,
    *,
    n_layer: int,
    n_embd: int,
    n_ff: int,
    n_head: int,
    n_head_kv: int,
    key_length: int = HEAD,
    rope: int = HEAD,
) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(key_length)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)


def _arch_metadata(writer: gguf.GGUFWriter, arch: Arch, n_ff: int) -> None:
    if arch in ("qwen3moe", "qwen2moe", "deepseek2", "gpt-oss", "grovemoe", "smallthinker"):
        writer.add_expert_feed_forward_length(n_ff)
    if arch in ("qwen2moe", "granitemoe"):
        writer.add_expert_shared_feed_forward_length(SHARED)
    if arch == "granitemoe":
        writer.add_logit_scale(2.0)
        writer.add_residual_scale(0.5)
        writer.add_embedding_scale(2.0)
        writer.add_attention_scale(0.1)
    if arch == "grovemoe":
        writer.add_expert_chunk_feed_forward_length(SHARED)
        writer.add_expert_group_scale(0.5)
        writer.add_experts_per_group(2)
    if arch == "gpt-oss":
        writer.add_sliding_window(WINDOW)
    if arch == "smallthinker":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if arch == "deepseek2":  # as DeepSeek-V3 routes: sigmoid, biased, within the two best of four groups of experts
        writer.add_leading_dense_block_count(1)
        writer.add_q_lora_rank(LATENT)
        writer.add_kv_lora_rank(LATENT)
        writer.add_key_length_mla(HEAD)
        writer.add_value_length_mla(HEAD)
        writer.add_expert_shared_count(1)
        writer.add_expert_group_count(4)
        writer.add_expert_group_used_count(2)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(True)
        writer.add_expert_weights_scale(2.5)


def _begin(path: Path | str, arch: str, name: str, dtype: Dtype) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(Path(path), arch)
    writer.add_name(name)
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "f16" else gguf.LlamaFileType.ALL_F32)
    return writer


def _finish(writer: gguf.GGUFWriter, path: Path | str) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def write_tiny(
    path: Path | str,
    arch: Arch,
    *,
    n_layer: int = 2,
    n_expert: int = 8,
    n_expert_used: int = 2,
    n_embd: int = 256,
    n_ff: int = 256,
    gate: Gate = "split",
    scales: bool = False,
    used_per_layer: Sequence[int] = (),
    seed: int = 0,
    dtype: Dtype = "f16",
    vocab: Vocab = "bytes",
) -> Path:
    """Write a random MoE model.

    n_embd, and n_ff by default, are multiples of 256, so that every K-quant can hold the rows; where n_ff is only one
    of 32, K-quantizing gives down another type. `gate` is up to the architecture: fused for deepseek2, none for
    granitemoe. `scales` adds a scale for each expert (not gpt-oss), `used_per_layer` is the routing width of each,
    stored as an array.
    """
    if n_embd % 256 or n_ff % 32:
        raise ValueError(f"n_embd={n_embd}, n_ff={n_ff}: not multiples of 256 and 32")
    n_head = n_embd // HEAD
    n_head_kv = {"olmoe": n_head, "deepseek2": 1}.get(arch, n_head // 2)
    name = "llama" if arch == "mixtral" else arch
    writer = _begin(path, name, f"tiny-{arch}", dtype)
    size = {"n_layer": n_layer, "n_embd": n_embd, "n_ff": n_ff, "n_head": n_head, "n_head_kv": n_head_kv}
    latent = {"key_length": LATENT + ROPE, "rope": ROPE} if arch == "deepseek2" else {}
    _hyperparameters(writer, **size, **latent)
    writer.add_expert_count(n_expert)
    if used_per_layer:
        writer.add_array(f"{name}.expert_used_count", list(used_per_layer))
    else:
        writer.add_expert_used_count(n_expert_used)
    _arch_metadata(writer, arch, n_ff)
    n_vocab = _add_vocab(writer, vocab)
    w = _Weights(writer, seed, dtype)
    w.embedding("token_embd.weight", n_embd, n_vocab)
    w.norm("output_norm.weight", n_embd)
    w.matrix("output.weight", n_embd, n_vocab, gain=3)
    if arch == "phimoe":
        w.bias("output_norm.bias", n_embd)
        w.bias("output.bias", n_vocab)
        w.norm("rope_factors_long.weight", HEAD // 2)
        w.norm("rope_factors_short.weight", HEAD // 2)
    for layer in range(n_layer):
        block = f"blk.{layer}"
        if arch == "deepseek2":
            _latent_attention(w, block, n_embd, n_head)
        else:
            second_norm = "post_attention_norm" if arch == "gpt-oss" else "ffn_norm"
            _attention(w, block, n_embd, n_head, n_head_kv, second_norm)
        _attention_extras(w, block, arch, n_embd, n_head, n_head_kv)
        if arch == "deepseek2" and layer == 0:
            _ffn(w, block, n_embd, n_ff)
            continue
        w.router(f"{block}.ffn_gate_inp.weight", n_embd, n_expert)
        _experts(w, block, n_embd, n_ff, n_expert, gate)
        _expert_extras(w, block, arch, n_embd, n_ff, n_expert)
        if scales:
            for role in ("gate", "up", "down"):
                w.norm(f"{block}.ffn_{role}_exps.scale", n_expert)
    return _finish(writer, path)


def _attention_extras(w: _Weights, block: str, arch: Arch, n_embd: int, n_head: int, n_head_kv: int) -> None:
    if arch in ("qwen3moe", "grovemoe", "olmoe"):  # qk-norm per head or over all heads
        w.norm(f"{block}.attn_q_norm.weight", n_embd if arch == "olmoe" else HEAD)
        w.norm(f"{block}.attn_k_norm.weight", n_embd if arch == "olmoe" else HEAD)
    if arch in ("qwen2moe", "phimoe", "gpt-oss"):
        w.bias(f"{block}.attn_q.bias", n_head * HEAD)
        w.bias(f"{block}.attn_k.bias", n_head_kv * HEAD)
        w.bias(f"{block}.attn_v.bias", n_head_kv * HEAD)
    if arch in ("phimoe", "gpt-oss"):
        w.bias(f"{block}.attn_output.bias", n_embd)
    if arch == "phimoe":
        w.bias(f"{block}.attn_norm.bias", n_embd)
        w.bias(f"{block}.ffn_norm.bias", n_embd)
    if arch == "gpt-oss":
        w.bias(f"{block}.attn_sinks.weight", n_head)


def _expert_extras(w: _Weights, block: str, arch: Arch, n_embd: int, n_ff: int, n_expert: int) -> None:
    if arch in ("qwen2moe", "granitemoe"):
        _ffn(w, block, n_embd, SHARED, "_shexp")
    if arch == "qwen2moe":
        w.bias(f"{block}.ffn_gate_inp_shexp.weight", n_embd)
    if arch == "deepseek2":
        _ffn(w, block, n_embd, n_ff, "_shexp")
        w.bias(f"{block}.exp_probs_b.bias", n_expert)
    if arch == "grovemoe":
        _experts(w, block, n_embd, SHARED, n_expert // 2, suffix="chexps")
    if arch == "gpt-oss":
        w.bias(f"{block}.ffn_gate_inp.bias", n_expert)
        w.bias(f"{block}.ffn_gate_exps.bias", n_ff, n_expert)
        w.bias(f"{block}.ffn_up_exps.bias", n_ff, n_expert)
        w.bias(f"{block}.ffn_down_exps.bias", n_embd, n_expert)


def write_tiny_dense(
    path: Path | str,
    *,
    n_layer: int = 1,
    n_embd: int = 256,
    n_ff: int = 256,
    seed: int = 1,
    dtype: Dtype = "f16",
    vocab: Vocab = "bytes",
) -> Path:
    """Write a random dense Llama: a draft for write_tiny's models, or with vocab="shuffled" one that cannot be."""
    n_head = n_embd // HEAD
    writer = _begin(path, "llama", "tiny-dense", dtype)
    _hyperparameters(writer, n_layer=n_layer, n_embd=n_embd, n_ff=n_ff, n_head=n_head, n_head_kv=n_head // 2)
    n_vocab = _add_vocab(writer, vocab)
    w = _Weights(writer, seed, dtype)
    w.embedding("token_embd.weight", n_embd, n_vocab)
    w.norm("output_norm.weight", n_embd)
    w.matrix("output.weight", n_embd, n_vocab, gain=3)
    for layer in range(n_layer):
        block = f"blk.{layer}"
        _attention(w, block, n_embd, n_head, n_head // 2)
        _ffn(w, block, n_embd, n_ff)
    return _finish(writer, path)


def quantize(src: Path | str, dst: Path | str, ftype: int, *, importance: bool = False) -> Path:
    """Quantize `src` with the installed llama.cpp to a whole-file type such as LLAMA_FTYPE_MOSTLY_Q4_K_M.

    `importance` gives it an importance matrix, all ones: some types (IQ2_XS) want one. Rows that the type's blocks do
    not divide get another type: Q4_K becomes Q5_0, Q5_K Q5_1, Q6_K Q8_0, and the 256-blocks of IQ types become IQ4_NL.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, ftype
    matrix = _ones(src) if importance else None
    if matrix is not None:
        params.imatrix = matrix
    if llama_cpp.llama_model_quantize(str(src).encode(), str(dst).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantize {src} to file type {ftype}")
    return Path(dst)


def _ones(path: Path | str) -> Any:
    """llama_model_imatrix_data for each tensor, an importance for each column of each expert; an empty one ends it."""
    sizes = {tensor.name: tensor.shape[0] * (*tensor.shape, 1, 1)[2] for tensor in gguf.GGUFReader(path).tensors}
    ones = np.ones(max(sizes.values()), dtype=np.float32)
    entries = (llama_cpp.llama_model_imatrix_data * (len(sizes) + 1))()
    for entry, (name, size) in zip(entries, sizes.items(), strict=False):
        entry.name, entry.size = name.encode(), int(size)
        entry.data = ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    entries.ones = ones  # kept as long as the entries
    return entries


class TinyModels:
    """Writes each tiny model once, at first use, and quantizes it."""

    types = {  # noqa: RUF012
        "F16": None,
        "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
        "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
        "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
        "MXFP4": llama_cpp.LLAMA_FTYPE_MOSTLY_MXFP4_MOE,
        "IQ4_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
        "IQ3_S": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_S,
        "IQ2_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XS,
    }
    with_importance = ("IQ2_XS",)

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def moe(self, arch: Arch, kind: str = "F16", **options: Any) -> Path:
        name = "-".join([arch, *(f"{key}_{value}" for key, value in options.items())])
        return self._make(name, kind, partial(write_tiny, arch=arch, **{"n_layer": 4} | options))

    def dense(self, vocab: Vocab = "bytes") -> Path:
        return self._make(f"dense-{vocab}", "F16", partial(write_tiny_dense, vocab=vocab))

    def _make(self, name: str, kind: str, write: partial[Path]) -> Path:
        path = self._folder / f"{name}.{kind}.gguf"
        if not path.exists():
            if kind == "F16":
                write(path)
            else:
                whole = self._make(name, "F16", write)
                quantize(whole, path, self.types[kind], importance=kind in self.with_importance)
        return path
