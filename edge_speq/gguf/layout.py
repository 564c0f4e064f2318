"""How a GGUF file is laid out (docs/gguf.md of ggml): pieces of its header, where the bytes of its tensors are, and
their hashes. Reads in pieces, so that memory stays small."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edge_speq.errors import EdgeError
from edge_speq.gguf import container as gguf_file
from edge_speq.gguf.container import DEFAULT_ALIGNMENT, GGUFFile, Tensor
from edge_speq.progress import Progress, silent

PIECE = 8 << 20  # bytes
HEADER_BYTES = 24  # magic, version, tensor count, key count


@dataclass(frozen=True, slots=True)
class Span:
    tensor: Tensor
    offset: int  # of its data in tensor.file

    def pieces(self) -> Iterator[bytes]:
        try:
            with self.tensor.file.open("rb") as file:
                file.seek(self.offset)
                left = self.tensor.n_bytes
                while left:
                    piece = file.read(min(left, PIECE))
                    if not piece:
                        raise EdgeError(f"{self.tensor.file} became shorter while it was read")
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise EdgeError(f"{self.tensor.file} cannot be read: {error.strerror}") from error


def string(text: str) -> bytes:
    """A string as the header has it."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def entry(name: str, ne: Sequence[int], type_id: int, offset: int) -> bytes:
    """A tensor's entry in the header. type_id: ggml's; offset: of its data after the header, in bytes."""
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, type_id, offset)


def entry_bytes(tensor: Tensor, n_dims: int | None = None) -> int:
    """Bytes of a tensor's entry in the header: name, dimensions, type, offset."""
    return 8 + len(tensor.name.encode()) + 4 + 8 * (len(tensor.ne) if n_dims is None else n_dims) + 4 + 8


def alignment(file: GGUFFile) -> int:
    found = file.fields.get("general.alignment")
    return found.value if found is not None and isinstance(found.value, int) else DEFAULT_ALIGNMENT


def spans(file: GGUFFile) -> dict[str, Span]:
    """Every tensor with its data's offset, in the order of the file. gguf_file.read has checked that the data lie in
    a row, so offsets follow from sizes."""
    found: dict[str, Span] = {}
    for path in file.paths:
        # a part of a split model has an alignment of its own
        align = alignment(file if len(file.paths) == 1 else gguf_file._read_part(path, file.role))
        tensors = [tensor for tensor in file.tensors.values() if tensor.file == path]
        if not tensors:
            continue
        end = tensors[-1].offset + entry_bytes(tensors[-1])
        offset = padded(end, align)
        for tensor in tensors:
            found[tensor.name] = Span(tensor, offset)
            offset += padded(tensor.n_bytes, align)
    return found


def padded(n_bytes: int, align: int) -> int:
    return -(-n_bytes // align) * align


def hashes(file: GGUFFile, progress: Progress = silent) -> dict[str, str]:
    """SHA-256 of every tensor's data, in the order of the file."""
    found, done = {}, 0
    everything = spans(file)
    total = sum(span.tensor.n_bytes for span in everything.values())
    for name, span in everything.items():
        digest = hashlib.sha256()
        for piece in span.pieces():
            digest.update(piece)
            done += len(piece)
            progress(done, total)
        found[name] = digest.hexdigest()
    return found


def content_hash(file: GGUFFile, tensors: dict[str, str]) -> str:
    """One SHA-256 over names, types, shapes and hashes of all tensors, sorted by name: it says what the weights are,
    whatever their order, alignment and metadata."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = file.tensors[name]
        ne = list(tensor.ne)
        while len(ne) > 1 and ne[-1] == 1:  # llama.cpp drops them when it writes
            ne.pop()
        digest.update(f"{name}\0{tensor.type}\0{','.join(map(str, ne))}\0{tensors[name]}\n".encode())
    return digest.hexdigest()
