"""Write a GGUF file from another one: unchanged fields are copied byte by byte, tensors are streamed.

At most layout.PIECE bytes, or one expert, of a tensor are in memory at a time. The output is deterministic.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edge_speq.errors import EdgeError
from edge_speq.gguf import container, layout
from edge_speq.gguf.container import DEFAULT_ALIGNMENT, MAGIC, TYPES, U32, GGUFFile, Tensor
from edge_speq.progress import Progress, silent

ALIGNMENT = "general.alignment"
F32, STRING = 6, 8  # GGUF value types
TYPE_IDS = {name: number for number, (name, _, _) in TYPES.items()}

Value = tuple[int, int | float | str]  # GGUF type and value of a field
Changes = Mapping[str, Value | None]  # fields to set; None removes a field
Data = Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write. `data` is called once to yield its bytes."""

    name: str
    type: str
    ne: tuple[int, ...]
    data: Data

    @property
    def n_bytes(self) -> int:
        return n_bytes(self.type, self.ne)


def n_bytes(type_name: str, ne: Sequence[int]) -> int:
    _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
    size = ne[0] // block * block_bytes
    for n in ne[1:]:
        size *= n
    return size


class Source:
    """Fields and tensor bytes of a checked model; a context manager that closes the files."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._spans = layout.spans(file)
        self._open: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._open.values():
            stream.close()
        self._open = {}

    def read(self, tensor: Tensor, start: int = 0, size: int | None = None) -> bytes:
        """Return `size` bytes of a tensor from `start`; by default all. Raises EdgeError if they cannot be read."""
        path, position = tensor.file, self._spans[tensor.name].offset
        length = tensor.n_bytes - start if size is None else size
        try:
            if path not in self._open:
                self._open[path] = path.open("rb")
            self._open[path].seek(position + start)
            data = self._open[path].read(length)
        except OSError as error:
            raise EdgeError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) < length:
            raise EdgeError(f"{path} became shorter while it was read", "let nobody write to it meanwhile")
        return data

    def expert(self, tensor: Tensor, index: int) -> bytes:
        """Return the bytes of one expert of a stacked tensor, whose last dimension counts experts."""
        size = tensor.n_bytes // tensor.ne[-1]
        return self.read(tensor, index * size, size)

    def copy(self, tensor: Tensor) -> NewTensor:
        """Return the tensor unchanged, as one to write."""
        return NewTensor(tensor.name, tensor.type, tensor.ne, lambda: self._chunks(tensor))

    def _chunks(self, tensor: Tensor) -> Iterator[bytes]:
        for start in range(0, tensor.n_bytes, layout.PIECE):
            yield self.read(tensor, start, min(layout.PIECE, tensor.n_bytes - start))

    def fields(self) -> list[tuple[str, bytes]]:
        """Return the name and header bytes of each field, in the file's order, without the split.* fields."""
        path = self.file.paths[0]
        names = sorted(self.file.fields.items(), key=lambda item: item[1].offset)
        starts = [found.offset - len(key.encode()) - 8 for key, found in names]
        entries = [tensor.offset for tensor in self.file.tensors.values() if tensor.file == path]
        with path.open("rb") as stream:
            # a first part may hold no tensors: the fields then end with the last one, usually a split.* number
            header = stream.read(min(entries)) if entries else _whole_header(stream, self.file)
        ends = [*starts[1:], len(header)]
        raw = [(key, header[a:b]) for (key, _), a, b in zip(names, starts, ends, strict=True)]
        return [(key, data) for key, data in raw if not key.startswith("split.")]


def _whole_header(stream: BinaryIO, file: GGUFFile) -> bytes:
    """Return the header of a first part without tensors. Its last field must be a number, so that its end is known."""
    key, last = max(file.fields.items(), key=lambda item: item[1].offset)
    if last.count is not None or isinstance(last.value, str):
        file.fail(key, "the first part holds no tensors and ends with text: merge the parts first")
    code = container._SCALARS[last.kind]
    return stream.read(last.offset + 4 + struct.calcsize(f"<{code}"))


def _field(key: str, value: Value) -> bytes:
    kind, content = value
    head = layout.string(key) + struct.pack("<I", kind)
    if isinstance(content, str):
        return head + layout.string(content)
    return head + struct.pack(f"<{container._SCALARS[kind]}", content)


class Rewrite:
    """The file to write: the source's fields with changes, and tensors in the order in which they are written."""

    def __init__(self, source: Source, changes: Changes, tensors: Sequence[NewTensor], alignment: int = 0) -> None:
        kept = source.file.fields.get(ALIGNMENT)
        self.alignment = alignment or layout.alignment(source.file)
        if kept is not None or self.alignment != DEFAULT_ALIGNMENT:
            changes = {**changes, ALIGNMENT: (U32, self.alignment)}
        self.tensors = tensors
        self._header = self._build_header(source, changes)

    def _build_header(self, source: Source, changes: Changes) -> bytes:
        fields: dict[str, bytes] = dict(source.fields())
        for key, value in changes.items():
            if value is None:
                fields.pop(key, None)
            else:
                fields[key] = _field(key, value)
        entries, offset = [], 0
        for tensor in self.tensors:
            entries.append(layout.entry(tensor.name, tensor.ne, TYPE_IDS[tensor.type], offset))
            offset += layout.padded(tensor.n_bytes, self.alignment)
        counts = struct.pack("<IQQ", 3, len(self.tensors), len(fields))
        header = b"".join((MAGIC, counts, *fields.values(), *entries))
        return header.ljust(layout.padded(len(header), self.alignment), b"\0")

    @property
    def size(self) -> int:
        """Return the size of the file in bytes."""
        return len(self._header) + sum(layout.padded(tensor.n_bytes, self.alignment) for tensor in self.tensors)

    def write(self, path: Path, progress: Progress = silent) -> None:
        total = self.size
        with path.open("wb") as stream:
            done = stream.write(self._header)
            for tensor in self.tensors:
                start = done
                for chunk in tensor.data():
                    done += stream.write(chunk)
                    progress(done, total)
                if done - start != tensor.n_bytes:
                    raise AssertionError(f"{tensor.name}: {done - start} bytes made, {tensor.n_bytes} announced")
                done += stream.write(bytes(layout.padded(done, self.alignment) - done))
