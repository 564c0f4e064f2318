"""Reader of GGUF v2 and v3 headers that checks every length and offset before llama.cpp opens the file.

The layout and the refused files follow ggml/src/gguf.cpp of the pinned llama.cpp and docs/gguf.md of ggml. Long arrays
are skipped, not stored: only the first MAX_KEPT numbers are kept. gguf/model.py checks the meaning of the tensors.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

from edge_speq.errors import EdgeError

MAGIC = b"GGUF"
FIRST_READ = 2 << 20  # bytes
MAX_HEADER = 256 << 20  # bytes before the tensor data; a vocabulary of 260,000 tokens takes about 10 MiB
MAX_TENSORS = 1 << 16
MAX_FIELDS = 1 << 16
MAX_KEY = (1 << 16) - 1  # the format's own limit
MAX_TENSOR_NAME = 63  # GGML_MAX_NAME with its final zero
MAX_STRING = 16 << 20  # chat templates are the longest, with some 100 KiB
MAX_TOKENS = 1 << 20
MAX_STRINGS = 1 << 22  # strings of one array: merges outnumber tokens
MAX_KEPT = 4096  # stored numbers of one array, enough for per-layer hyper-parameters
MAX_ALIGNMENT = 1 << 16
MAX_PARTS = 1024
DEFAULT_ALIGNMENT = 32
TOKENS, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
BYTE = 6  # LLAMA_TOKEN_TYPE_BYTE

_SCALARS = dict(enumerate("BbHhIif?  Qqd"))  # struct codes by GGUF type; 8 is string, 9 is array
_STRING, _ARRAY, U16, U32 = 8, 9, 2, 4
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# ggml type: name, elements and bytes of a block (ggml.h, ggml-common.h)
# fmt: off
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}
# fmt: on


class GGUFError(EdgeError):
    """A GGUF file that must not be loaded: `field` at byte `offset` of `file` is wrong."""

    def __init__(self, file: Path, field: str, offset: int, problem: str, *, role: str, usage: bool = False) -> None:
        hint = "convert the model to GGUF first" if usage else "give an intact GGUF file: fetch or convert it again"
        super().__init__(f"cannot load the {role} {file}: {problem} ({field}, byte {offset})", hint, usage=usage)
        self.file, self.field, self.offset = file, field, offset


@dataclass(frozen=True, slots=True)
class Field:
    """Value of one key: a number, a bool or a string. For an array: its length and its first MAX_KEPT numbers."""

    kind: int  # GGUF type of the value, or of the array's elements
    offset: int  # byte of the value in the file
    value: int | float | bool | str | None = None
    count: int | None = None  # elements of an array
    values: tuple[int | float | bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    type: str
    ne: tuple[int, ...]  # ggml's order, columns first
    n_bytes: int
    file: Path
    offset: int  # byte of its entry in the header


@dataclass(slots=True)
class GGUFFile:
    """One GGUF file, or all parts of a split one. `fields` are those of the first part."""

    paths: list[Path]
    role: str
    size: int = 0
    version: int = 0
    fields: dict[str, Field] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    missing_bytes: list[int] = field(
        default_factory=list
    )  # bytes without a token, neither as <0x0A> nor as the byte itself
    has_byte_tokens: bool = False  # true if token_type marks byte tokens

    def fail(self, key: str, problem: str, tensor: Tensor | None = None) -> NoReturn:
        """Raise GGUFError with the offset of a field, or of the tensor's entry."""
        if tensor is not None:
            raise GGUFError(tensor.file, key, tensor.offset, problem, role=self.role)
        offset = self.fields[key].offset if key in self.fields else 0
        raise GGUFError(self.paths[0], key, offset, problem, role=self.role)


def read(path: str | Path, role: str = "model") -> GGUFFile:
    """Read the header of a GGUF file, and of all parts if it is the first part of a split model.

    Raises GGUFError if a header is invalid, and EdgeError if the file is missing or cannot be read.
    """
    first = _read_part(Path(path), role)
    if "split.count" not in first.fields:
        return first
    n_parts = _split_field(first, "split.count")
    if n_parts <= 1:
        return first
    part = _split_field(first, "split.no")
    match = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.gguf", str(path))
    if part != 0:
        problem = f"this is part {part + 1} of {n_parts} of a split model: give the first part"
        first.fail("split.no", problem)
    if n_parts > MAX_PARTS or match is None or not str(path).endswith(f"-00001-of-{n_parts:05}.gguf"):
        first.fail("split.count", f"{n_parts} parts, but the file is not named ...-00001-of-{n_parts:05}.gguf")
    paths = [Path(f"{match[1]}-{i + 1:05}-of-{n_parts:05}.gguf") for i in range(n_parts)]
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        first.fail("split.count", f"{len(missing)} of {n_parts} parts are missing: {', '.join(missing[:5])}")
    for i, other in enumerate(paths[1:], start=1):
        more = _read_part(other, role)
        if _split_field(more, "split.no") != i:
            more.fail("split.no", f"part {i + 1} is expected here")
        twice = first.tensors.keys() & more.tensors.keys()
        for name in sorted(twice):
            more.fail(name, "the tensor is in another part too", more.tensors[name])
        first.tensors |= more.tensors
        first.size += more.size
    total = first.fields.get("split.tensors.count")
    if total is None or total.value != len(first.tensors):
        first.fail("split.tensors.count", f"the parts hold {len(first.tensors)} tensors, not as many as they should")
    first.paths = paths
    return first


def _split_field(file: GGUFFile, key: str) -> int:
    """Return a split field, which must be 16 bits wide: llama.cpp aborts on other types."""
    found = file.fields.get(key)
    if found is None or found.kind != U16 or not isinstance(found.value, int):
        file.fail(key, "a split model needs it as a 16-bit number")
    return found.value


def _read_part(path: Path, role: str) -> GGUFFile:
    if not path.is_file():
        raise EdgeError(f"{role} file not found: {path}", "give the path of a .gguf file", usage=True)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            magic = _front(stream, min(size, len(MAGIC)))
            if magic != MAGIC:
                problem = f"not a GGUF file, it begins with {magic!r}"
                raise GGUFError(path, "magic", 0, problem, usage=True, role=role)
            n = FIRST_READ
            while True:
                try:
                    return _Reader(_front(stream, min(n, size, MAX_HEADER)), size, path, role).read()
                except _MoreError:
                    n *= 8
    except OSError as error:
        raise EdgeError(f"{role} file cannot be read: {path}: {error.strerror}") from error


class _MoreError(Exception):
    """The header is longer than the bytes read so far."""


def _front(stream: BinaryIO, n: int) -> bytes:
    """Return the first n bytes of a file. It is not mapped, so that a disk error raises OSError instead of SIGBUS."""
    stream.seek(0)
    data = stream.read(n)
    if len(data) < n:
        raise OSError(errno.EIO, f"a read ended after {len(data)} of {n} bytes")
    return data


class _Reader:
    """Parser of one header, from front to back. `_pos` never passes `_end`, the number of bytes read."""

    def __init__(self, data: bytes, size: int, path: Path, role: str) -> None:
        self._data, self._end, self._pos = data, len(data), len(MAGIC)
        self._may_go_on = self._end < min(size, MAX_HEADER)
        self._file = GGUFFile([path], role, size)

    def fail(self, field: str, offset: int, problem: str) -> NoReturn:
        raise GGUFError(self._file.paths[0], field, offset, problem, role=self._file.role)

    def read(self) -> GGUFFile:
        file = self._file
        file.version = version = self._number(_U32, "version")
        if version & 0xFFFF == 0:
            self.fail("version", 4, "a big-endian file: convert it to little endian (gguf-py has a script)")
        if version not in (2, 3):
            self.fail("version", 4, f"GGUF version {version}, known are 2 and 3")
        n_tensors = self._count("tensor_count", MAX_TENSORS, 24)
        n_fields = self._count("kv_count", MAX_FIELDS, 13)
        for i in range(n_fields):
            self._field(i)
        alignment = self._alignment()
        entries = [self._tensor(i) for i in range(n_tensors)]
        data = -(-self._pos // alignment) * alignment
        expected = 0  # llama.cpp requires contiguous tensor data: no overlaps, no gaps
        for tensor, relative in entries:
            if relative != expected:
                why = "overlaps the tensor before it" if relative < expected else "leaves a gap before it"
                why = why if relative % alignment == 0 else f"is not aligned to {alignment} bytes"
                self.fail(tensor.name, tensor.offset, f"its data at {relative} {why}, expected at {expected}")
            if data + expected + tensor.n_bytes > file.size:
                problem = f"its data ends {data + expected + tensor.n_bytes - file.size} bytes after the file"
                self.fail(tensor.name, tensor.offset, problem)
            expected += -(-tensor.n_bytes // alignment) * alignment
        return file

    def _number(self, code: struct.Struct, field: str) -> int:
        self._require(code.size, field)
        value: int = code.unpack_from(self._data, self._pos)[0]
        self._pos += code.size
        return value

    def _require(self, n: int, field: str) -> None:
        if n > self._end - self._pos:
            if self._may_go_on:
                raise _MoreError
            what = "the file ends here" if self._end < MAX_HEADER else f"the header is longer than {MAX_HEADER} bytes"
            self.fail(field, self._pos, f"{what}, {n} bytes are missing")

    def _count(self, field: str, most: int, least_bytes: int) -> int:
        """Read a count, and check that the rest of the header has room for `least_bytes` per item."""
        start = self._pos
        count = self._number(_U64, field)
        if count > most:
            self.fail(field, start, f"{count} is more than {most}")
        self._require(count * least_bytes, field)
        return count

    def _string(self, field: str, most: int) -> bytes:
        length = self._count(field, most, 1)
        self._pos += length
        return self._data[self._pos - length : self._pos]

    def _name(self, field: str, most: int) -> str:
        start = self._pos
        name = self._string(field, most)
        try:
            text = name.decode()
        except UnicodeDecodeError:
            text = ""
        if not text.isprintable() or not text:
            self.fail(field, start, f"a name must be printable text, not {name[:40]!r}")
        return text

    def _field(self, i: int) -> None:
        key = self._name(f"key {i}", MAX_KEY)
        start = self._pos
        if key in self._file.fields:
            self.fail(key, start, "the key occurs twice")
        kind = self._number(_U32, key)
        if kind == _STRING:
            found = Field(kind, start, self._string(key, MAX_STRING).decode(errors="replace"))
        elif kind == _ARRAY:
            kind = self._number(_U32, key)
            found = self._strings(key, start) if kind == _STRING else self._numbers(key, start, kind)
        else:
            code = self._code(key, start, kind)
            self._require(code.size, key)
            found = Field(kind, start, code.unpack_from(self._data, self._pos)[0])
            self._pos += code.size
        self._file.fields[key] = found

    def _code(self, key: str, start: int, kind: int) -> struct.Struct:
        code = _SCALARS.get(kind, " ")
        if code == " ":
            self.fail(key, start, "arrays of arrays are not known" if kind == _ARRAY else f"unknown type {kind}")
        return struct.Struct(f"<{code}")

    def _numbers(self, key: str, start: int, kind: int) -> Field:
        size = self._code(key, start, kind).size
        count = self._count(key, MAX_HEADER, size)
        kept = min(count, MAX_KEPT)
        values = struct.unpack_from(f"<{kept}{_SCALARS[kind]}", self._data, self._pos)
        if key == TOKEN_TYPES:
            self._file.has_byte_tokens = BYTE in struct.unpack_from(f"<{count}{_SCALARS[kind]}", self._data, self._pos)
        self._pos += count * size
        return Field(kind, start, count=count, values=values)

    def _strings(self, key: str, start: int) -> Field:
        count = self._count(key, MAX_TOKENS if key == TOKENS else MAX_STRINGS, 8)
        if key == TOKENS:
            self._tokens(count)
            return Field(_STRING, start, count=count)
        data, pos, end, unpack = self._data, self._pos, self._end, _U64.unpack_from
        for _ in range(count):
            if pos + 8 > end:
                pos += 8
                break
            pos += 8 + unpack(data, pos)[0]
        self._require(pos - self._pos, key)
        self._pos = pos
        return Field(_STRING, start, count=count)

    def _tokens(self, count: int) -> None:
        """Skip the tokens and refuse duplicates, on which llama.cpp aborts.

        As in llama.cpp, a token ends at its first zero byte, and empty tokens get a name with their index.
        """
        data, pos, end, unpack = self._data, self._pos, self._end, _U64.unpack_from
        seen: set[bytes] = set()
        for i in range(count):
            length = unpack(data, pos)[0] if pos + 8 <= end else end
            token = pos + 8
            pos = token + length
            if pos > end:
                if self._may_go_on:
                    raise _MoreError
                self.fail(TOKENS, token - 8, f"token {i} ends after the file or the longest header")
            word = data[token:pos]
            seen.add(word.partition(b"\0")[0] or b"[EMPTY_%d]" % i)
            if len(seen) != i + 1:
                self.fail(TOKENS, token, f"token {i} occurs twice: {word[:40]!r}")
        self._pos = pos
        missing = (byte for byte in range(256) if not seen & {b"<0x%02X>" % byte, bytes([byte])})
        self._file.missing_bytes = list(missing)

    def _alignment(self) -> int:
        found = self._file.fields.get("general.alignment")
        if found is None:
            return DEFAULT_ALIGNMENT
        value = found.value
        if found.kind != U32 or not isinstance(value, int) or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            problem = f"the alignment must be a power of two from 8 to {MAX_ALIGNMENT}, as a 32-bit number"
            self._file.fail("general.alignment", problem)
        return value

    def _tensor(self, i: int) -> tuple[Tensor, int]:
        start = self._pos
        name = self._name(f"tensor {i}", MAX_TENSOR_NAME)
        if name in self._file.tensors:
            self.fail(name, start, "the tensor occurs twice")
        n_dims = self._number(_U32, name)
        if not 1 <= n_dims <= 4:
            self.fail(name, start, f"{n_dims} dimensions, not 1 to 4")
        ne = tuple(self._number(_U64, name) for _ in range(n_dims))
        kind = self._number(_U32, name)
        if kind not in TYPES:
            self.fail(name, start, f"unknown ggml type {kind}")
        type_name, block, block_bytes = TYPES[kind]
        if min(ne) < 1 or ne[0] % block:
            self.fail(name, start, f"shape {list(ne)} is not possible with {type_name}, whose blocks have {block}")
        n_bytes = ne[0] // block * block_bytes
        for n in ne[1:]:
            n_bytes *= n
        if n_bytes > self._file.size:
            self.fail(name, start, f"shape {list(ne)} takes {n_bytes} bytes, more than the file has")
        tensor = Tensor(name, type_name, ne, n_bytes, self._file.paths[0], start)
        self._file.tensors[name] = tensor
        return tensor, self._number(_U64, name)
