"""What the fuzzer found: files whose header is in order and whose graph, operators or tokenizer end the process, one
for each cause. `FINDINGS` maps the name to the architecture, the change and words of the error that must refuse it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from attacks.bad_gguf import ARRAY, F16, F32, I32, STRING, Parts, string

from edge_speq.gguf.container import TYPES

F32_VALUE = 6
Q8_1, Q8_K, BF16 = 9, 15, 30
VALUE_SWA = "attention.value_length_swa"


@dataclass(frozen=True)
class Finding:
    arch: str
    change: Callable[[Parts], None]
    cause: str


def number(end: str, value: int) -> Callable[[Parts], None]:
    return lambda parts: parts.set_u32(end, value)


def real(end: str, value: float) -> Callable[[Parts], None]:
    return lambda parts: parts.set(end, F32_VALUE, struct.pack("<f", value))


def text(end: str, value: str) -> Callable[[Parts], None]:
    return lambda parts: parts.set(end, STRING, string(value))


def missing(end: str) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.fields = [field for field in parts.fields if not field[0].endswith(end)]

    return change


def kind(end: str, new: int) -> Callable[[Parts], None]:
    """Another type for a tensor, all offsets moved, its data zero."""

    def change(parts: Parts) -> None:
        chosen, data = parts.entry(end), b""
        for entry in parts.entries:
            n = math.prod(entry.ne)
            old = parts.data[entry.offset : entry.offset + n * {F32: 4, F16: 2}[entry.kind]]
            _, block, block_bytes = TYPES[new]
            entry.offset = len(data)
            data += bytes(n // block * block_bytes) if entry is chosen else old
            data += bytes(-len(data) % 32)
        chosen.kind, parts.data = new, data

    return change


def no_vocabulary(parts: Parts) -> None:
    parts.set_u32("qwen3moe.vocab_size", 266)
    parts.set("tokenizer.ggml.model", STRING, string("no_vocab"))


def word_pieces_of_bytes(parts: Parts) -> None:
    parts.set("tokenizer.ggml.model", STRING, string("bert"))
    parts.set("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ266i", I32, 266, *[6] * 266))


def rwkv_without_bytes(parts: Parts) -> None:
    parts.set("tokenizer.ggml.model", STRING, string("rwkv"))
    parts.set_u32("tokenizer.ggml.bos_token_id", (1 << 31) - 1)  # the text becomes tokens of -1
    words = b"".join(string(f"<0x{i:02X}>") for i in range(266))
    parts.set("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 266) + words)


def empty_vocabulary(parts: Parts) -> None:
    parts.set("tokenizer.ggml.model", STRING, string("test"))
    parts.set("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 0))


# fmt: off
FINDINGS: dict[str, Finding] = {
    "q8_1_experts": Finding("qwen3moe", kind("ffn_up_exps.weight", Q8_1), "weights of type Q8_1"),
    "q8_k_query": Finding("mixtral", kind("attn_q.weight", Q8_K), "weights of type Q8_K"),
    "bf16_norm": Finding("olmoe", kind("attn_norm.weight", BF16), "norm or bias of type BF16"),
    "f16_bias": Finding("qwen2moe", kind("attn_q.bias", F16), "norm or bias of type F16"),
    "f16_expert_bias": Finding("gpt-oss", kind("ffn_gate_exps.bias", F16), "norm or bias of type F16"),
    "f16_rope_factors": Finding("phimoe", kind("rope_factors_short.weight", F16), "norm or bias of type F16"),
    "f16_sinks": Finding("gpt-oss", kind("attn_sinks.weight", F16), "norm or bias of type F16"),
    "negative_epsilon": Finding("granitemoe", real("layer_norm_rms_epsilon", -math.inf), "from 0 to 1"),
    "epsilon_that_is_no_number": Finding("grovemoe", real("layer_norm_rms_epsilon", math.nan), "from 0 to 1"),
    "context_that_no_memory_holds": Finding("mixtral", number("context_length", 1 << 29), "more than 67108864"),
    "window_that_no_memory_holds": Finding("gpt-oss", number("sliding_window", (1 << 30) + 1), "more than 67108864"),
    "no_vocabulary": Finding("qwen3moe", no_vocabulary, "no vocabulary"),
    "no_token_for_a_byte": Finding("qwen3moe", text("tokenizer.ggml.model", "llama"), "a token for each byte, <0x00>"),
    "word_pieces_of_bytes": Finding("qwen3moe", word_pieces_of_bytes, "has no tokens for bytes"),
    "rwkv_without_bytes": Finding("qwen3moe", rwkv_without_bytes, "only known with RWKV models"),
    "empty_vocabulary": Finding("qwen3moe", empty_vocabulary, "no vocabulary"),
    "values_of_another_width": Finding("phimoe", number("key_length", 96), "64, but keys are 96 wide"),
    "values_of_another_width_in_windows": Finding("gpt-oss", number(f"gpt-oss.{VALUE_SWA}", 4), "it must be 64"),
    "no_heads": Finding("phimoe", missing("attention.head_count"), "no attention heads"),
    "nothing_rotated": Finding("phimoe", number("rope.dimension_count", 0), "must be rotated"),
    "odd_rotation": Finding("phimoe", number("rope.dimension_count", 63), "63, but heads are 64 wide"),
    "rotation_past_the_head": Finding("phimoe", number("rope.dimension_count", 66), "66, but heads are 64 wide"),
    "two_latent_keys": Finding("deepseek2", number("head_count_kv", 2), "latent attention needs 1 key"),
    "latent_head_all_rotated": Finding("deepseek2", missing("rope.dimension_count"), "96, but heads are 64 wide"),
    "latent_head_too_narrow": Finding("deepseek2", number("key_length_mla", 32), "32, but heads are 32 wide"),
    "unknown_gating_function": Finding("deepseek2", number("expert_gating_func", 7), "an unknown function"),
    "temperature_without_length": Finding("deepseek2", real("deepseek2.attention.temperature_scale", 1.0), "it needs"),
    "more_chunks_used_than_there_are": Finding("grovemoe", number("expert_used_count", 6), "6 groups used"),
    "no_experts_in_a_group": Finding("grovemoe", number("experts_per_group", 0), "in groups of 0"),
}
# fmt: on
