"""Bad GGUF files: each is a valid tiny model with one named change. `ATTACKS` maps the name to the change and to
words of the error that must refuse it.

    parts = Parts.of(path)
    ATTACKS["f64_router"].change(parts)
    path.write_bytes(parts.to_bytes())

Defended: whatever the header says about itself and about experts. Not defended: the weights' own numbers (NaN, huge
scales), graph assertions of architectures whose head sizes gguf_model does not know, a file changed while it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

U16, U32, I32, STRING, ARRAY = 2, 4, 5, 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
F32, F16, Q8_0, I32_WEIGHT, F64 = 0, 1, 8, 26, 28
BYTES = {F32: 4, F16: 2}
HUGE = 1 << 62


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


@dataclass
class Entry:
    name: str
    ne: list[int]
    kind: int
    offset: int
    n_dims: int | None = None

    def to_bytes(self) -> bytes:
        n_dims = len(self.ne) if self.n_dims is None else self.n_dims
        shape = struct.pack(f"<I{len(self.ne)}Q", n_dims, *self.ne)
        return string(self.name) + shape + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class Parts:
    """A GGUF file taken apart; values stay raw bytes."""

    magic: bytes = b"GGUF"
    version: int = 3
    fields: list[tuple[str, int, bytes]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    data: bytes = b""
    n_tensors: int | None = None
    n_fields: int | None = None
    tail: int = 0  # bytes cut off at the end

    @classmethod
    def of(cls, path: Path) -> Parts:
        raw = path.read_bytes()
        pos = 24
        n_tensors, n_fields = struct.unpack_from("<QQ", raw, 8)

        def take(code: str) -> tuple[int, ...]:
            nonlocal pos
            pos += struct.calcsize(f"<{code}")
            return struct.unpack_from(f"<{code}", raw, pos - struct.calcsize(f"<{code}"))

        def text() -> str:
            nonlocal pos
            (length,) = take("Q")
            pos += length
            return raw[pos - length : pos].decode()

        def skip(kind: int) -> None:
            nonlocal pos
            if kind == STRING:
                text()
            elif kind == ARRAY:
                inner, count = take("IQ")
                for _ in range(count):
                    skip(inner)
            else:
                pos += SIZES[kind]

        parts = cls()
        for _ in range(n_fields):
            key, (kind,) = text(), take("I")
            start = pos
            skip(kind)
            parts.fields.append((key, kind, raw[start:pos]))
        for _ in range(n_tensors):
            name, (n_dims,) = text(), take("I")
            ne, (tensor_type, offset) = list(take(f"{n_dims}Q")), take("IQ")
            parts.entries.append(Entry(name, ne, tensor_type, offset))
        parts.data = raw[-(-pos // 32) * 32 :]
        return parts

    def header(self) -> bytes:
        n_tensors = len(self.entries) if self.n_tensors is None else self.n_tensors
        n_fields = len(self.fields) if self.n_fields is None else self.n_fields
        fields = (string(key) + struct.pack("<I", kind) + value for key, kind, value in self.fields)
        start = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_fields)
        return start + b"".join(fields) + b"".join(entry.to_bytes() for entry in self.entries)

    def to_bytes(self) -> bytes:
        header = self.header()
        whole = header + bytes(-len(header) % 32) + self.data
        return whole[: len(whole) - self.tail]

    def entry(self, end: str) -> Entry:
        return next(entry for entry in self.entries if entry.name.endswith(end))

    def set(self, end: str, kind: int, value: bytes) -> None:
        """Replaces a key's value, or adds the key."""
        key = next((key for key, *_ in self.fields if key.endswith(end)), end)
        self.fields = [one for one in self.fields if one[0] != key] + [(key, kind, value)]

    def set_u32(self, end: str, value: int) -> None:
        self.set(end, U32, struct.pack("<I", value))

    def retype(self, end: str, kind: int, size: int) -> None:
        """Another type for a tensor, with data that fits: everything else about the file stays legal."""
        chosen, at = self.entry(end), 0
        data = b""
        for entry in self.entries:
            n = BYTES[entry.kind]
            for dim in entry.ne:
                n *= dim
            old = self.data[entry.offset : entry.offset + n]
            new = bytes(n // BYTES[entry.kind] * size) if entry is chosen else old
            entry.offset = at
            data += new + bytes(-len(new) % 32)
            at = len(data)
        chosen.kind, self.data = kind, data


@dataclass(frozen=True)
class Attack:
    change: Callable[[Parts], None]
    cause: str


ATTACKS: dict[str, Attack] = {}


def attack(cause: str) -> Callable[[Callable[[Parts], None]], Callable[[Parts], None]]:
    def register(change: Callable[[Parts], None]) -> Callable[[Parts], None]:
        ATTACKS[change.__name__] = Attack(change, cause)
        return change

    return register


@attack("big-endian")
def big_endian(parts: Parts) -> None:
    parts.version = 3 << 24


@attack("GGUF version 1")
def version_1(parts: Parts) -> None:
    parts.version = 1


@attack("GGUF version 4")
def version_4(parts: Parts) -> None:
    parts.version = 4


@attack("tensor_count")
def too_many_tensors(parts: Parts) -> None:
    parts.n_tensors = HUGE


@attack("kv_count")
def too_many_keys(parts: Parts) -> None:
    parts.n_fields = HUGE


@attack("unknown type|twice|printable|more than|ends here")
def one_key_more_than_there_is(parts: Parts) -> None:
    parts.n_fields = len(parts.fields) + 1


@attack("more than")
def string_as_long_as_memory(parts: Parts) -> None:
    parts.set("general.name", STRING, struct.pack("<Q", HUGE))


@attack("more than")
def array_as_long_as_memory(parts: Parts) -> None:
    parts.set("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ", I32, HUGE))


@attack("more than")
def tokens_as_many_as_memory(parts: Parts) -> None:
    parts.set("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, HUGE))


@attack("ends here|bytes are missing")
def merge_that_ends_after_the_file(parts: Parts) -> None:
    parts.set("tokenizer.ggml.merges", ARRAY, struct.pack("<IQQ", STRING, 1, HUGE))


@attack("arrays of arrays")
def nested_array(parts: Parts) -> None:
    parts.set("general.tags", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U32, 0))


@attack("unknown type 99")
def unknown_value_type(parts: Parts) -> None:
    parts.set("general.name", 99, b"")


@attack("the key occurs twice")
def duplicate_key(parts: Parts) -> None:
    parts.fields.append(parts.fields[0])


@attack("printable")
def key_with_escape_sequence(parts: Parts) -> None:
    parts.fields.append(("general.\x1b[31m", U32, bytes(4)))


@attack("token 1 occurs twice")
def duplicate_token(parts: Parts) -> None:
    parts.set("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + 2 * string("a"))


@attack("power of two")
def odd_alignment(parts: Parts) -> None:
    parts.set_u32("general.alignment", 48)


@attack("power of two")
def huge_alignment(parts: Parts) -> None:
    parts.set_u32("general.alignment", 1 << 31)


@attack("the tensor occurs twice")
def duplicate_tensor(parts: Parts) -> None:
    parts.entries[1].name = parts.entries[0].name


@attack("more than 63")
def long_tensor_name(parts: Parts) -> None:
    parts.entries[0].name = "x" * 64


@attack("5 dimensions")
def five_dimensions(parts: Parts) -> None:
    parts.entries[0].ne = [1, 1, 1, 1, 1]


@attack("0 dimensions")
def no_dimensions(parts: Parts) -> None:
    parts.entries[0].ne = []


@attack("is not possible")
def dimension_of_zero(parts: Parts) -> None:
    parts.entries[0].ne[0] = 0


@attack("more than the file has")
def dimensions_that_overflow(parts: Parts) -> None:
    parts.entries[0].ne = [1 << 32, 1 << 32]


@attack("is not possible with Q8_0")
def row_that_splits_a_block(parts: Parts) -> None:
    entry = parts.entry("token_embd.weight")
    entry.kind, entry.ne[0] = Q8_0, entry.ne[0] + 1


@attack("unknown ggml type 4")
def removed_tensor_type(parts: Parts) -> None:
    parts.entries[0].kind = 4


@attack("is not aligned")
def unaligned_tensor(parts: Parts) -> None:
    parts.entries[1].offset += 4


@attack("overlaps")
def overlapping_tensors(parts: Parts) -> None:
    parts.entries[1].offset = parts.entries[0].offset


@attack("leaves a gap")
def tensor_after_the_file(parts: Parts) -> None:
    parts.entries[-1].offset += HUGE


@attack("after the file")
def data_cut_short(parts: Parts) -> None:
    parts.tail = 64


@attack("part 2 of 3")
def second_part_of_a_split(parts: Parts) -> None:
    parts.set("split.no", U16, struct.pack("<H", 1))
    parts.set("split.count", U16, struct.pack("<H", 3))


@attack("is not named")
def split_with_another_name(parts: Parts) -> None:
    parts.set("split.no", U16, struct.pack("<H", 0))
    parts.set("split.count", U16, struct.pack("<H", 3))


@attack("16-bit")
def split_count_of_another_type(parts: Parts) -> None:
    parts.set_u32("split.count", 3)


@attack("a router of type F64")
def f64_router(parts: Parts) -> None:
    parts.retype("ffn_gate_inp.weight", F64, 8)


@attack("weights of type I32")
def integer_experts(parts: Parts) -> None:
    parts.retype("ffn_up_exps.weight", I32_WEIGHT, 4)


@attack("norm or bias of type F16")
def f16_norm(parts: Parts) -> None:
    parts.retype("attn_norm.weight", F16, 2)


@attack("router of shape")
def router_of_another_shape(parts: Parts) -> None:
    parts.entry("ffn_gate_inp.weight").ne.reverse()


@attack("does not hold")
def experts_in_two_dimensions(parts: Parts) -> None:
    entry = parts.entry("ffn_down_exps.weight")
    entry.ne = [entry.ne[0], entry.ne[1] * entry.ne[2]]


@attack("does not go with")
def experts_of_two_widths(parts: Parts) -> None:
    entry = parts.entry("ffn_up_exps.weight")
    entry.ne = [entry.ne[0] * 2, entry.ne[1] // 2, entry.ne[2]]


@attack("5 of 4 experts")
def more_experts_used_than_there_are(parts: Parts) -> None:
    parts.set_u32("expert_used_count", 5)


@attack("0 of 4 experts")
def no_experts_used(parts: Parts) -> None:
    parts.set_u32("expert_used_count", 0)


@attack("2000000 experts")
def expert_count_past_llama_cpp(parts: Parts) -> None:
    parts.set_u32("expert_count", 2_000_000)


@attack("0 layers")
def no_layers(parts: Parts) -> None:
    parts.set_u32("block_count", 0)


@attack("must be a whole number")
def layers_as_text(parts: Parts) -> None:
    parts.set("block_count", STRING, string("one"))


@attack("heads are 64 wide")
def rotation_past_the_head(parts: Parts) -> None:
    parts.set_u32("rope.dimension_count", 128)


@attack("more than 65536")
def heads_that_wrap_around(parts: Parts) -> None:
    parts.set_u32("attention.head_count_kv", (1 << 31) + 2)


@attack("does not hold 8 heads of 64")
def heads_that_the_query_does_not_have(parts: Parts) -> None:
    parts.set_u32("attention.head_count", 8)


@attack("5 heads cannot share 2 keys")
def heads_that_cannot_share_their_keys(parts: Parts) -> None:
    parts.set_u32("attention.head_count", 5)


@attack("not one of")
def unknown_rope_scaling(parts: Parts) -> None:
    parts.set("qwen3moe.rope.scaling.type", STRING, string("spiral"))
