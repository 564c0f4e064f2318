"""Layout of a GGUF file (docs/gguf.md of ggml): entries of its header, offsets of tensor data, and hashes.

Data are read in pieces of PIECE bytes, so that memory use stays small.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edge_speq.errors import EdgeError
from edge_speq.gguf import container
from edge_speq.gguf.container import DEFAULT_ALIGNMENT, GGUFFile, Tensor
from edge_speq.progress import Progress, silent

PIECE = 8 << 20  # bytes
HEADER_BYTES = 24  # magic, version, tensor count, key count


@dataclass(frozen=True, slots=True)
class Span:
    tensor: Tensor
    offset: int  # byte of its data in tensor.file

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
    """Return a string in the header's encoding: a 64-bit length and UTF-8 bytes."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def entry(name: str, ne: Sequence[int], type_id: int, offset: int) -> bytes:
    """Return a tensor's entry in the header. `type_id`: ggml type; `offset`: bytes from the end of the header."""
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, type_id, offset)


def entry_bytes(tensor: Tensor, n_dims: int | None = None) -> int:
    """Return the bytes of a tensor's entry in the header: name, dimensions, type, offset."""
    return 8 + len(tensor.name.encode()) + 4 + 8 * (len(tensor.ne) if n_dims is None else n_dims) + 4 + 8


def alignment(file: GGUFFile) -> int:
    found = file.fields.get("general.alignment")
    return found.value if found is not None and isinstance(found.value, int) else DEFAULT_ALIGNMENT


def spans(file: GGUFFile) -> dict[str, Span]:
    """Return every tensor with the offset of its data, in the order of the file.

    Offsets follow from the sizes, because container.read has checked that the data are contiguous.
    """
    found: dict[str, Span] = {}
    for path in file.paths:
        # each part of a split model may have another alignment
        align = alignment(file if len(file.paths) == 1 else container._read_part(path, file.role))
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
    """Return the SHA-256 of every tensor's data, in the order of the file."""
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
    """Return one SHA-256 over the names, types, shapes and hashes of all tensors, sorted by name.

    It identifies the weights independently of tensor order, alignment and metadata.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = file.tensors[name]
        ne = list(tensor.ne)
        while len(ne) > 1 and ne[-1] == 1:  # llama.cpp drops trailing dimensions of 1 when it writes
            ne.pop()
        digest.update(f"{name}\0{tensor.type}\0{','.join(map(str, ne))}\0{tensors[name]}\n".encode())
    return digest.hexdigest()
