"""Writes a random-weight Q4_0 MoE GGUF with the shape of a real one, for timings where no trained file fits.

    python tools/inflate_model.py OUT.gguf --layers 12      # Qwen3-30B-A3B: d 2048, 128 experts, 8 of 768

Routing is random but token-dependent, as the router is F32 with a wide spread; the text is noise. Bytes, shapes and
kernels are those of the real model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

N_EMBD, N_FF, N_EXPERT, N_USED = 2048, 768, 128, 8
N_HEAD, N_HEAD_KV, HEAD = 32, 4, 128
N_VOCAB = 8192
Q4_0_BLOCK, Q4_0_BYTES = 32, 18  # a half-precision scale and 32 nibbles


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


def write(path: Path, n_layer: int, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_name(f"qwen3-30b-a3b-shape-{n_layer}-layers")
    writer.add_context_length(4096)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(N_USED)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(N_VOCAB)

    def quantized(name: str, *ne: int) -> None:
        writer.add_tensor(name, q4_0(random, *ne), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def ones(name: str, width: int) -> None:
        writer.add_tensor(name, np.ones(width, dtype=np.float32))

    quantized("token_embd.weight", N_EMBD, N_VOCAB)
    quantized("output.weight", N_EMBD, N_VOCAB)
    ones("output_norm.weight", N_EMBD)
    for layer in range(n_layer):
        block = f"blk.{layer}"
        for norm, width in (("attn_norm", N_EMBD), ("ffn_norm", N_EMBD), ("attn_q_norm", HEAD), ("attn_k_norm", HEAD)):
            ones(f"{block}.{norm}.weight", width)
        quantized(f"{block}.attn_q.weight", N_EMBD, N_HEAD * HEAD)
        quantized(f"{block}.attn_k.weight", N_EMBD, N_HEAD_KV * HEAD)
        quantized(f"{block}.attn_v.weight", N_EMBD, N_HEAD_KV * HEAD)
        quantized(f"{block}.attn_output.weight", N_HEAD * HEAD, N_EMBD)
        router = random.standard_normal((N_EXPERT, N_EMBD), dtype=np.float32) * np.float32(2 / np.sqrt(N_EMBD))
        writer.add_tensor(f"{block}.ffn_gate_inp.weight", router)
        quantized(f"{block}.ffn_gate_exps.weight", N_EMBD, N_FF, N_EXPERT)
        quantized(f"{block}.ffn_up_exps.weight", N_EMBD, N_FF, N_EXPERT)
        quantized(f"{block}.ffn_down_exps.weight", N_FF, N_EMBD, N_EXPERT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    write(arguments.out, arguments.layers)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
