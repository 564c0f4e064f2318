"""Write a random-weight Q4_0 MoE GGUF with the shape of a real model, for timings where no trained file fits.

    python models/recipes/inflate_model.py OUT.gguf --layers 12                  # Qwen3-30B-A3B
    python models/recipes/inflate_model.py OUT.gguf --layers 8 --shape mixtral   # Mixtral-8x7B
    python models/recipes/inflate_model.py OUT.gguf --prompts OUT.jsonl          # and prompts that its text continues

Qwen3-30B-A3B has width 2048 and 8 of 128 experts of 768; Mixtral-8x7B has width 4096 and 2 of 8 experts of 14336.
Bytes, shapes and kernels are those of the real model, except for a vocabulary of 8192: bytes, and made-up words.
Weights are pieces of one random stretch, and most rows of ffn_down and attn_output have scales of zero.

Routing is as local as that of models/tales-moe.gguf; locality.py says how. The table has hits of LRU slots for 1/8, 1/4
and 1/2 of the experts, the share of experts that a token has in common with the one before, and the precision of a
block's experts predicted by its router from the rows of the block before. It covers 16 greedy texts of at most 32
tokens, for the shapes after short prompts with different last bytes:

                      1/8   1/4   1/2   shared (by chance)  predicted
    tales-moe         0.22  0.44  0.70  0.30 (0.13)         0.73 to 0.80, block 1 0.28
    qwen3, 12 layers  0.22  0.40  0.69  0.13 (0.06)         0.76
    mixtral, 3 layers -     0.42  0.74  0.49 (0.25)         0.77

Hits and shared experts cannot both match tales-moe: 1/8 of the experts are one token's there, two tokens' of qwen3,
half a token's of mixtral. Shares of variance were fitted to the hits.

What it does not model:
- Text follows from the last token alone, whatever experts compute. A draft with the same weights is accepted nearly
  always, one of n-grams never. Equal texts show only that nothing is grossly wrong.
- All blocks are alike; in tales-moe a token shares 20 to 43 % with the one before, depending on the block.
- All routers read the same half of the residual stream, which no block changes, so a prediction two blocks ahead is as
  good as one block ahead.
- No token occurs twice in a text, so a token's past experts predict nothing until a text is read again.
- Bytes lie far from each other on the cycle: in a prompt of ordinary text every byte is a new topic, and none continues
  in the text that follows. Prompts of `--prompts` are stretches of the cycle, so the text continues them, as people's
  does. In 16 such texts LRU slots for 1/4 and 1/2 hit 0.42 and 0.70 (qwen3, 3 layers) and 0.47 and 0.73 (mixtral, 2
  layers). `auto`, which learns from prompts, has 0.90 and 0.93 of LRU's misses for qwen3, 1.00 and 0.96 for mixtral. In
  16 texts of tales-moe hits are 0.45 and 0.71, misses 0.92 and 0.90 of LRU's (32 tokens each, replayed).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from locality import N_BYTES, Blocks, Cycle, Floats, Mixture

Bytes = npt.NDArray[np.uint8]

HEAD = 128
N_VOCAB = 8192
N_NOISE = 1 << 20  # blocks
N_PROMPTS, PROMPT_TOKENS = 4, 96
ATTENTION = 0.1  # of the usual scale: its mean over a text changes slowly, and would add locality of its own
Q4_0 = gguf.GGMLQuantizationType.Q4_0
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
    mixture: Mixture


SHAPES = {
    "qwen3": Shape("qwen3-30b-a3b", "qwen3moe", 2048, 768, 128, 8, 32, 4, True, Mixture(0.07, 0.13, 0.03, 0.09)),
    "mixtral": Shape("mixtral-8x7b", "llama", 4096, 14336, 8, 2, 32, 8, False, Mixture(0.06, 0.35, 0.25, 0.17)),
}


class Noise:
    """Random Q4_0 data. Drawing all of it would take longer than a disk: tensors are pieces of one stretch of random
    blocks, each expert's matrix from another place."""

    def __init__(self, random: np.random.Generator) -> None:
        # nibbles 1 to 15 stand for -7 to 7: with 0 as well their mean would not be zero, one direction would drown all
        # others, and every token would be routed alike
        low, high = random.integers(1, 16, (2, N_NOISE, Q4_0_BYTES), dtype=np.uint8)
        self._random, self._blocks = random, low | (high << 4)

    def q4_0(self, *ne: int, scale: float = 1.0, rows: slice | None = None) -> Bytes:
        """Data of ggml shape ne with a deviation of about scale / sqrt(columns), zero except for these rows."""
        n_columns, n_rows, n_matrices = (*ne, 1)[:3]
        n_blocks = n_columns // Q4_0_BLOCK
        data = np.empty((n_matrices, n_rows * n_blocks, Q4_0_BYTES), dtype=np.uint8)
        for matrix in data:
            self._fill(matrix)
        scales = data.view(np.float16).reshape(n_matrices, n_rows, n_blocks, Q4_0_BYTES // 2)[..., 0]
        scales[:] = scale / (4.3 * np.sqrt(n_columns)) if rows is None else 0  # -7 to 7 have a deviation of 4.3
        if rows is not None:
            scales[:, rows] = scale / (4.3 * np.sqrt(n_columns))
        return data.reshape(*ne[:0:-1], n_blocks * Q4_0_BYTES)

    def _fill(self, blocks: Bytes) -> None:
        filled = 0
        while filled < len(blocks):
            start = int(self._random.integers(N_NOISE))
            n = min(N_NOISE - start, len(blocks) - filled)
            blocks[filled : filled + n] = self._blocks[start : start + n]
            filled += n


def write(path: Path, n_layer: int, shape: Shape = SHAPES["qwen3"], seed: int = 0) -> Cycle:
    """Returns the order of the tokens in its text."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, shape.architecture)
    _hyperparameters(writer, shape, n_layer)
    _vocabulary(writer)
    tensors = _Tensors(writer)
    noise = Noise(random)
    cycle = Cycle(random, N_VOCAB, shape.n_embd, shape.mixture)
    tensors.add("token_embd.weight", lambda: _quantized(cycle.embeddings()), shape.n_embd, N_VOCAB)
    tensors.add("output.weight", lambda: _quantized(cycle.outputs()), shape.n_embd, N_VOCAB)
    tensors.ones("output_norm.weight", shape.n_embd)
    blocks = Blocks(shape.n_embd, n_layer, shape.n_expert, shape.n_used, shape.mixture.written)
    for layer in range(n_layer):
        _layer(tensors, noise, random, shape, blocks, layer)
    tensors.write()
    return cycle


def write_prompts(path: Path, cycle: Cycle) -> None:
    """Stretches of the cycle, far from each other, for `edge-speq bench --prompts`. Bytes, of which not all are a text
    by themselves, are left out."""
    words = [int(token) for token in cycle.tokens if token >= N_BYTES]
    starts = range(0, len(words), len(words) // N_PROMPTS)[:N_PROMPTS]
    with path.open("w", encoding="utf-8") as file:
        for start in starts:
            text = "".join(_word(token) for token in words[start : start + PROMPT_TOKENS])
            file.write(json.dumps({"id": f"walk-{start}", "domain": f"walk-{start}", "prompt": text}) + "\n")


def _quantized(weights: Floats) -> Bytes:
    data: Bytes = gguf.quants.quantize(weights, Q4_0)
    return data


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
    bytes_to_unicode), and words, which the tokenizer looks for first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    tokens = [chr(byte) if byte in printable else chr(next(others)) for byte in range(N_BYTES)]
    tokens += [_word(i) for i in range(N_BYTES, N_VOCAB)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    words = [gguf.TokenType.USER_DEFINED] * (N_VOCAB - N_BYTES - 1)
    writer.add_token_types([gguf.TokenType.NORMAL] * N_BYTES + words + [gguf.TokenType.UNUSED])
    writer.add_token_merges([f"{tokens[ord('t')]} {tokens[ord('h')]}"])  # the list must not be empty
    writer.add_eos_token_id(N_VOCAB - 1)
    writer.add_add_bos_token(False)


def _word(token: int) -> str:
    return f"<{token}>"


class _Tensors:
    """Tensors that are made when they are written: one is in memory at a time."""

    def __init__(self, writer: gguf.GGUFWriter) -> None:
        self._writer = writer
        self._makers: list[Callable[[], npt.NDArray[Any]]] = []

    def add(self, name: str, make: Callable[[], Bytes], *ne: int) -> None:
        """Q4_0 of ggml shape ne."""
        shape = (*ne[:0:-1], ne[0] // Q4_0_BLOCK * Q4_0_BYTES)
        self._writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=Q4_0)
        self._makers.append(make)

    def f32(self, name: str, make: Callable[[], Floats], *ne: int) -> None:
        self._writer.add_tensor_info(name, ne[::-1], np.dtype(np.float32), 4 * int(np.prod(ne)))
        self._makers.append(make)

    def ones(self, name: str, width: int) -> None:
        self.f32(name, lambda: np.ones(width, dtype=np.float32), width)

    def write(self) -> None:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        for make in self._makers:
            self._writer.write_tensor_data(make())
        self._writer.close()


def _layer(
    tensors: _Tensors, noise: Noise, random: np.random.Generator, shape: Shape, blocks: Blocks, layer: int
) -> None:
    d, n_ff, n_expert, block = shape.n_embd, shape.n_ff, shape.n_expert, f"blk.{layer}"

    def add(name: str, *ne: int, scale: float = 1.0, rows: slice | None = None) -> None:
        tensors.add(f"{block}.{name}.weight", lambda: noise.q4_0(*ne, scale=scale, rows=rows), *ne)

    norms = [("attn_norm", d), ("ffn_norm", d)] + [("attn_q_norm", HEAD), ("attn_k_norm", HEAD)] * shape.has_head_norms
    for norm, width in norms:
        tensors.ones(f"{block}.{norm}.weight", width)
    written = blocks.channels(layer)
    add("attn_q", d, shape.n_head * HEAD)
    add("attn_k", d, shape.n_head_kv * HEAD)
    add("attn_v", d, shape.n_head_kv * HEAD)
    add("attn_output", shape.n_head * HEAD, d, scale=ATTENTION, rows=written)
    tensors.f32(f"{block}.ffn_gate_inp.weight", lambda: blocks.router(random, layer), d, n_expert)
    add("ffn_gate_exps", d, n_ff, n_expert)
    add("ffn_up_exps", d, n_ff, n_expert)
    add("ffn_down_exps", n_ff, d, n_expert, rows=written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3")
    parser.add_argument("--prompts", type=Path, help="write these, too, as JSON lines")
    arguments = parser.parse_args()
    started = time.perf_counter()
    cycle = write(arguments.out, arguments.layers, SHAPES[arguments.shape])
    if arguments.prompts:
        write_prompts(arguments.prompts, cycle)
    seconds = time.perf_counter() - started
    print(f"{arguments.out}: {arguments.out.stat().st_size / 2**30:.2f} GiB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
