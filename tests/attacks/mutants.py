"""Structured mutants of a GGUF file, deterministic by seed: `mutant(parts, seed)` changes one to three things of a
header that is taken apart, and mostly mends what the change would break elsewhere (offsets, sizes of data), so that the
mutant gets past the container's checks and reaches llama.cpp.

What is mutated: hyper-parameters (extreme numbers, other types, arrays for scalars, missing and additional keys), the
vocabulary (token types, merges, scores, special ids, tokenizer names), the architecture, and tensors (types, shapes,
names, missing, twice, additional ones that the architecture may look for, numbers like NaN in them).
"""

from __future__ import annotations

import copy
import functools
import math
import random
import struct
from collections.abc import Iterator

import gguf
from attacks.bad_gguf import ARRAY, F16, F32, I32, STRING, Entry, Parts, string

from edge_speq.gguf.container import TYPES

F32_VALUE, BOOL, F64_VALUE = 6, 7, 12
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# fmt: off
INTEGERS = (
    0, 0, 0, 1, 1, 1, -1, -1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 255, 256, 257, 511,
    512, 513, 1023, 1024, 1025, 4096, 32767, 32768, 65535, 65536, 65537, 1 << 20, 1 << 24, 1 << 30, (1 << 30) + 1,
    (1 << 31) - 1, 1 << 31, (1 << 31) + 1, (1 << 32) - 1, (1 << 32) - 32, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1,
)
FLOATS = (
    0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e-45, 1e30, -1e30, 3e38, 1e9, 10000.0, math.inf, -math.inf, math.nan,
)
STRINGS = (
    "", "none", "linear", "yarn", "longrope", "gpt2", "llama", "bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna",
    "test", "whitespace", "no_vocab", "default", "gpt-2", "llama-bpe", "deepseek-v3", "qwen2", "tekken", "kimi-k2",
    "gpt-4o", "smaug-bpe", "chatglm-bpe", "superbpe", "gemma", "mean", "\x00", "\U0010ffff", "x" * 5000, "{% for %}",
    "{{ 1/0 }}", "{{ ''.__class__ }}",
)
TOKENIZERS = "llama bert t5 rwkv plamo2 gemma4 hybriddna whitespace test gpt2 none".split()  # noqa: SIM905
# fmt: on
# keys of the pinned llama-arch.cpp that the gguf package does not know
MORE_KEYS = """
    attention.compress_ratios attention.indexer.block_size attention.indexer.types attention.key_length_mla_swa
    attention.kv_lora_rank_swa attention.output_group_count attention.recurrent_layers attention.rope_pattern
    attention.value_length_mla_swa attention.value_scale attn_res.block_size block_size deepstack_mapping
    dense_2_feat_in dense_2_feat_out expert_latent_length hash_layer_count hidden_activation num_loops
    ple.head_offsets ple.layers rope.scale_linear target_hidden_size target_layers
"""
SUFFIXES = (".weight", ".weight", ".bias", ".scale")


@functools.cache
def known_keys() -> tuple[str, ...]:
    def walk(group: type) -> Iterator[str]:
        for name, value in vars(group).items():
            if isinstance(value, type):
                yield from walk(value)
            elif isinstance(value, str) and not name.startswith("_"):
                yield value

    return tuple(dict.fromkeys([*walk(gguf.Keys), *(f"{{arch}}.{key}" for key in MORE_KEYS.split())]))


@functools.cache
def known_tensors() -> tuple[str, ...]:
    return tuple(gguf.TENSOR_NAMES.values())


@functools.cache
def known_architectures() -> tuple[str, ...]:
    return tuple(gguf.MODEL_ARCH_NAMES.values())


def number(rng: random.Random, kind: int) -> bytes:
    code = CODES[kind]
    if kind in (F32_VALUE, F64_VALUE):
        return struct.pack(f"<{code}", rng.choice(FLOATS))
    if kind == BOOL:
        return struct.pack("<?", rng.random() < 0.5)
    size = struct.calcsize(code)
    return (rng.choice(INTEGERS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def value(rng: random.Random) -> tuple[int, bytes]:
    """Any value of any type, mostly the ones that llama.cpp asks for."""
    kind = rng.choice((4, 4, 4, 4, 5, 6, 6, 6, 7, STRING, ARRAY, *CODES))
    if kind == STRING:
        return kind, string(rng.choice(STRINGS))
    if kind == ARRAY:
        inner, count = rng.choice((4, 5, 6, 7, STRING, *CODES)), rng.choice((0, 1, 2, 2, 3, 4, 512, 513))
        items = [string(rng.choice(STRINGS)) if inner == STRING else number(rng, inner) for _ in range(count)]
        return kind, struct.pack("<IQ", inner, count) + b"".join(items)
    return kind, number(rng, kind)


def near(rng: random.Random, kind: int, old: bytes) -> bytes:
    """A number that differs a little from the old one."""
    (n,) = struct.unpack(f"<{CODES[kind]}", old)
    size = len(old)
    new = rng.choice((n + 1, n - 1, n * 2, n // 2, n * 3, n + 32, n ^ (1 << rng.randrange(8 * size))))
    return (new & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def change_field(parts: Parts, rng: random.Random) -> None:
    arch = architecture(parts)
    own = [i for i, (key, *_) in enumerate(parts.fields) if key.startswith(arch)]
    i = rng.choice(own if own and rng.random() < 0.7 else range(len(parts.fields)))
    key, kind, old = parts.fields[i]
    roll = rng.random()
    if roll < 0.1:
        del parts.fields[i]
    elif roll < 0.25:
        parts.fields[i] = (key, *value(rng))
    elif kind == ARRAY:
        parts.fields[i] = (key, kind, changed_array(rng, old))
    elif kind == STRING:
        parts.fields[i] = (key, kind, string(rng.choice(STRINGS)))
    elif kind in (F32_VALUE, F64_VALUE, BOOL) or roll < 0.6:
        parts.fields[i] = (key, kind, number(rng, kind))
    else:
        parts.fields[i] = (key, kind, near(rng, kind, old))


def changed_array(rng: random.Random, old: bytes) -> bytes:
    """Elements changed, swapped, cut off or added."""
    inner, count = struct.unpack_from("<IQ", old)
    items, pos = [], 12
    for _ in range(count):
        size = 8 + struct.unpack_from("<Q", old, pos)[0] if inner == STRING else struct.calcsize(CODES[inner])
        items.append(old[pos : pos + size])
        pos += size
    for _ in range(rng.choice((1, 1, 5, 100))):
        i = rng.randrange(len(items)) if items else 0
        new = string(rng.choice((*STRINGS, " ", " a", "a ", "a b c"))) if inner == STRING else number(rng, inner)
        action = rng.choice(("set", "set", "set", "cut", "add", "swap", "empty"))
        if action == "set" and items:
            items[i] = new
        elif action == "cut":
            del items[i:]
        elif action == "add":
            items.insert(i, new)
        elif action == "swap" and items:
            items[i], items[0] = items[0], items[i]
        elif action == "empty" and rng.random() < 0.1:
            items.clear()
    return struct.pack("<IQ", inner, len(items)) + b"".join(items)


def add_field(parts: Parts, rng: random.Random) -> None:
    """A key that some architecture reads and this file has not, or has."""
    keys = known_keys()
    key = rng.choice(keys).replace("{arch}", architecture(parts))
    kind, new = value(rng)
    parts.fields = [field for field in parts.fields if field[0] != key] + [(key, kind, new)]


def change_architecture(parts: Parts, rng: random.Random) -> None:
    """Another architecture reads these tensors, its keys renamed or not."""
    old, new = architecture(parts), rng.choice(known_architectures())
    if rng.random() < 0.9:
        fields = ((key.replace(f"{old}.", f"{new}.", 1), kind, v) for key, kind, v in parts.fields)
        parts.fields = [(key, kind, v) for key, kind, v in fields if key != "general.architecture"]
    parts.set("general.architecture", STRING, string(new))


def change_type(parts: Parts, rng: random.Random) -> None:
    entry = rng.choice(parts.entries)
    entry.kind = rng.choice((F32, F16, 30, *TYPES))


def change_shape(parts: Parts, rng: random.Random) -> None:
    entry = rng.choice(parts.entries)
    action = rng.choice(("swap", "near", "near", "ones", "drop", "merge", "extreme"))
    i = rng.randrange(len(entry.ne))
    if action == "swap":
        rng.shuffle(entry.ne)
    elif action == "near":
        entry.ne[i] = max(1, rng.choice((entry.ne[i] + 1, entry.ne[i] - 1, entry.ne[i] * 2, entry.ne[i] // 2, 32)))
    elif action == "ones":
        entry.ne = [*entry.ne, 1, 1][: rng.choice((3, 4))]
    elif action == "drop":
        entry.ne = entry.ne[:i] or [1]
    elif action == "merge":
        entry.ne = [*entry.ne[1:-1], entry.ne[0] * entry.ne[-1]] if len(entry.ne) > 1 else [1, entry.ne[0]]
    else:
        entry.ne[i] = rng.choice((0, 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63))


def change_names(parts: Parts, rng: random.Random) -> None:
    """A tensor less, twice under another name, under another's name, or one that some architecture looks for."""
    i = rng.randrange(len(parts.entries))
    entry = parts.entries[i]
    known = rng.choice(known_tensors()).replace("{bid}", str(rng.choice((0, 0, 1, 2, 511, 512, 1 << 31))))
    name = (known + rng.choice(SUFFIXES))[:63]
    action = rng.choice(("remove", "rename", "swap", "add", "add", "add", "layer"))
    if action == "remove":
        del parts.entries[i]
    elif action == "rename":
        entry.name = name
    elif action == "swap":
        other = rng.choice(parts.entries)
        entry.name, other.name = other.name, entry.name
    elif action == "layer":
        entry.name = entry.name.replace("blk.0", f"blk.{rng.choice((1, 2, 511, 512))}").replace(
            "token_embd", "blk.0.token_embd"
        )
    else:
        shape = list(rng.choice(parts.entries).ne) if rng.random() < 0.8 else [rng.choice((1, 32, 64, 256))]
        kind = rng.choice((F32, F32, F32, F16, entry.kind))
        parts.entries.append(Entry(name, shape, kind, 0))


def change_bytes(parts: Parts, rng: random.Random) -> None:
    """A bit or byte of some value, offset or count."""
    i = rng.randrange(len(parts.fields))
    key, kind, old = parts.fields[i]
    raw = bytearray(old)
    if raw:
        raw[rng.randrange(min(len(raw), 64))] ^= 1 << rng.randrange(8)
    parts.fields[i] = (key, kind, bytes(raw))


def change_weights(parts: Parts, rng: random.Random) -> None:
    """Numbers of one tensor that no training gives: NaN, infinities, all zero."""
    entry = rng.choice([entry for entry in parts.entries if entry.kind == F32] or parts.entries)
    size = min(math.prod(entry.ne), 1 << 16) * 4
    if entry.kind == F32 and entry.offset + size <= len(parts.data):
        share, strange = rng.choice((0.01, 0.3, 1.0)), struct.pack("<f", rng.choice(FLOATS))
        old = parts.data[entry.offset : entry.offset + size]
        new = b"".join(strange if rng.random() < share else old[i : i + 4] for i in range(0, size, 4))
        parts.data = parts.data[: entry.offset] + new + parts.data[entry.offset + size :]


def change_vocabulary(parts: Parts, rng: random.Random) -> None:
    """Another tokenizer over the same or over SentencePiece's tokens, other token types, a table of characters."""
    i = next((i for i, (key, *_) in enumerate(parts.fields) if key == "tokenizer.ggml.tokens"), None)
    n = 0 if i is None else struct.unpack_from("<Q", parts.fields[i][2], 4)[0]
    if rng.random() < 0.7:
        parts.set("tokenizer.ggml.model", STRING, string(rng.choice(TOKENIZERS)))
    if rng.random() < 0.4:
        words = [f"<0x{byte:02X}>" for byte in range(256)] + [f"\u2581{i}" for i in range(n)]
        packed = b"".join(string(word) for word in words[:n])
        parts.set("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, n) + packed)
    if rng.random() < 0.3:
        types = struct.pack(f"<{n}i", *rng.choices((-1, 0, 1, 2, 3, 4, 5, 6, 7), k=n))
        parts.set("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ", I32, n) + types)
    if rng.random() < 0.2:
        table = struct.pack("<I", rng.choice((8, 16, 40, 59, 60))) + rng.randbytes(60)
        parts.set("tokenizer.ggml.precompiled_charsmap", ARRAY, struct.pack("<IQ", 0, len(table)) + table)


CHANGES = (
    *[change_field] * 8, *[add_field] * 6, change_architecture, *[change_type] * 2, *[change_shape] * 2,
    *[change_names] * 3, change_bytes, change_weights, change_vocabulary,
)  # fmt: skip


def mutant(original: Parts, seed: int) -> bytes:
    rng = random.Random(seed)
    parts = copy.copy(original)
    parts.fields = list(original.fields)
    parts.entries = [Entry(e.name, list(e.ne), e.kind, e.offset, e.n_dims) for e in original.entries]
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(CHANGES)(parts, rng)
    if rng.random() < 0.9:
        lay_out(parts)
    return parts.to_bytes()


def lay_out(parts: Parts) -> None:
    """Offsets and data that fit the tensors' types and shapes, the weights kept as far as they go."""
    data = bytearray()
    for entry in parts.entries:
        _, block, block_bytes = TYPES.get(entry.kind, ("", 1, 4))
        n_bytes = block_bytes * (entry.ne[0] // block)
        for n in entry.ne[1:]:
            n_bytes *= n
        if n_bytes > 4 << 20:
            return
        old = parts.data[entry.offset : entry.offset + n_bytes]
        entry.offset = len(data)
        data += old + bytes(n_bytes - len(old)) + bytes(-n_bytes % 32)
    parts.data = bytes(data)


def architecture(parts: Parts) -> str:
    return next(
        (v[8:].decode(errors="replace") for key, _, v in parts.fields if key == "general.architecture"), "llama"
    )
