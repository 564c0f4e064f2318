"""Writes a random-weight Q4_0 MoE GGUF with the shape of a real one, for timings where no trained file fits.

    python tools/inflate_model.py OUT.gguf --layers 12                  # Qwen3-30B-A3B: d 2048, 8 of 128 experts of 768
    python tools/inflate_model.py OUT.gguf --layers 8 --shape mixtral   # Mixtral-8x7B: d 4096, 2 of 8 experts of 14336

Routing is random but token-dependent, as the router is F32 with a wide spread; the text is noise. Bytes, shapes and
kernels are those of the real model, but for a vocabulary of 8192, of which only the 256 bytes have a text.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

HEAD = 128
N_VOCAB = 8192
Q4_0_BLOCK, Q4_0_BYTES = 32, 18  # a half-precision scale and 32 nibbles


@dataclass(frozen=True, slots=True)
class Shape:
    """The hyperparameters of a published model."""

    name: str
    architecture: str
    n_embd: int
    n_ff: int
    n_expert: int
    n_used: int
    n_head: int
    n_head_kv: int
    has_head_norms: bool


SHAPES = {
    "qwen3": Shape("qwen3-30b-a3b", "qwen3moe", 2048, 768, 128, 8, 32, 4, has_head_norms=True),
    "mixtral": Shape("mixtral-8x7b", "llama", 4096, 14336, 8, 2, 32, 8, has_head_norms=False),
}


def q4_0(random: np.random.Generator, *ne: int) -> npt.NDArray[np.uint8]:
    """Random Q4_0 data of ggml shape ne with a deviation of about 1 / sqrt(columns)."""
    rows = int(np.prod(ne[1:]))
    blocks = ne[0] // Q4_0_BLOCK
    # nibbles 1 to 15 stand for -7 to 7: with 0 as well their mean would not be zero, one direction would drown all
    # others, and every token would be routed alike
    low, high = random.integers(1, 16, (2, rows, blocks, Q4_0_BYTES), dtype=np.uint8)
    data: npt.NDArray[np.uint8] = low | (high << 4)
    scale = np.float16(1 / (4.3 * np.sqrt(ne[0])))  # -7 to 7 have a deviation of 4.3
    data[:, :, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return data.reshape(*ne[:0:-1], blocks * Q4_0_BYTES)


def write(path: Path, n_layer: int, shape: Shape = SHAPES["qwen3"], seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, shape.architecture)
    _hyperparameters(writer, shape, n_layer)
    _vocabulary(writer)
    weights = _Weights(writer, random)
    d = shape.n_embd
    weights.quantized("token_embd.weight", d, N_VOCAB)
    weights.quantized("output.weight", d, N_VOCAB)
    weights.ones("output_norm.weight", d)
    for layer in range(n_layer):
        _layer(weights, f"blk.{layer}", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _hyperparameters(writer: gguf.GGUFWriter, shape: Shape, n_layer: int) -> None:
    writer.add_name(f"{shape.name}-shape-{n_layer}-layers")
    writer.add_context_length(4096)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    if shape.architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_used)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_vocab_size(N_VOCAB)


def _vocabulary(writer: gguf.GGUFWriter) -> None:
    """A token for each byte, under its stand-in of GPT-2's byte-level tokenizer (openai/gpt-2 encoder.py,
    bytes_to_unicode), and tokens that no text has."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    tokens = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    tokens += [f"<unused {i}>" for i in range(256, N_VOCAB)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.UNUSED] * (N_VOCAB - 256))
    writer.add_token_merges([f"{tokens[ord('t')]} {tokens[ord('h')]}"])  # the list must not be empty
    writer.add_eos_token_id(N_VOCAB - 1)
    writer.add_add_bos_token(False)


class _Weights:
    """Adds random tensors."""

    def __init__(self, writer: gguf.GGUFWriter, random: np.random.Generator) -> None:
        self._writer, self._random = writer, random

    def quantized(self, name: str, *ne: int) -> None:
        self._writer.add_tensor(name, q4_0(self._random, *ne), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def ones(self, name: str, width: int) -> None:
        self._writer.add_tensor(name, np.ones(width, dtype=np.float32))

    def router(self, name: str, n_embd: int, n_expert: int) -> None:
        data = self._random.standard_normal((n_expert, n_embd), dtype=np.float32) * np.float32(2 / np.sqrt(n_embd))
        self._writer.add_tensor(name, data)


def _layer(weights: _Weights, block: str, shape: Shape) -> None:
    d, n_ff, n_expert = shape.n_embd, shape.n_ff, shape.n_expert
    norms = [("attn_norm", d), ("ffn_norm", d)] + [("attn_q_norm", HEAD), ("attn_k_norm", HEAD)] * shape.has_head_norms
    for norm, width in norms:
        weights.ones(f"{block}.{norm}.weight", width)
    weights.quantized(f"{block}.attn_q.weight", d, shape.n_head * HEAD)
    weights.quantized(f"{block}.attn_k.weight", d, shape.n_head_kv * HEAD)
    weights.quantized(f"{block}.attn_v.weight", d, shape.n_head_kv * HEAD)
    weights.quantized(f"{block}.attn_output.weight", shape.n_head * HEAD, d)
    weights.router(f"{block}.ffn_gate_inp.weight", d, n_expert)
    weights.quantized(f"{block}.ffn_gate_exps.weight", d, n_ff, n_expert)
    weights.quantized(f"{block}.ffn_up_exps.weight", d, n_ff, n_expert)
    weights.quantized(f"{block}.ffn_down_exps.weight", n_ff, d, n_expert)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3")
    arguments = parser.parse_args()
    write(arguments.out, arguments.layers, SHAPES[arguments.shape])
    print(f"{arguments.out}: {arguments.out.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
