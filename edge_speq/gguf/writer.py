"""Writer of GGUF v3 files (docs/gguf.md of ggml; little endian) with streamed tensor data."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edge_speq.gguf.container import DEFAULT_ALIGNMENT, MAGIC
from edge_speq.gguf.layout import HEADER_BYTES, entry, padded, string
from edge_speq.progress import Progress, silent

Value = int | str | Sequence[str]  # a 32-bit number, a string, an array of strings
U32, STRING, ARRAY = 4, 8, 9


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    ne: tuple[int, ...]  # columns first
    type: int  # ggml type
    n_bytes: int
    pieces: Iterable[bytes]  # its data, n_bytes in total


def write(path: Path, keys: dict[str, Value], entries: Sequence[Entry], progress: Progress = silent) -> None:
    """Write a file with keys and tensors in the given order, deterministically. Raises OSError."""
    total, done = size(keys, entries), 0
    with path.open("wb") as file:
        header = _header(keys, entries)
        done += _put(file, header + bytes(padded(len(header), DEFAULT_ALIGNMENT) - len(header)))
        for each in entries:
            start = done
            for piece in each.pieces:
                done += _put(file, piece)
                progress(done, total)
            if done - start != each.n_bytes:
                raise AssertionError(f"{each.name}: {done - start} bytes, not {each.n_bytes}")
            done += _put(file, bytes(padded(each.n_bytes, DEFAULT_ALIGNMENT) - each.n_bytes))


def size(keys: dict[str, Value], entries: Sequence[Entry]) -> int:
    """Return the bytes of the file that `write` makes."""
    header = padded(len(_header(keys, entries)), DEFAULT_ALIGNMENT)
    return header + sum(padded(each.n_bytes, DEFAULT_ALIGNMENT) for each in entries)


def _put(file: BinaryIO, data: bytes) -> int:
    file.write(data)
    return len(data)


def _header(keys: dict[str, Value], entries: Sequence[Entry]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(entries), len(keys))]
    assert sum(map(len, parts)) == HEADER_BYTES
    for key, value in keys.items():
        parts += [string(key), _value(value)]
    offset = 0
    for each in entries:
        parts.append(entry(each.name, each.ne, each.type, offset))
        offset += padded(each.n_bytes, DEFAULT_ALIGNMENT)
    return b"".join(parts)


def _value(value: Value) -> bytes:
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + string(value)
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(string(text) for text in value)
