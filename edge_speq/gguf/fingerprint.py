"""A short hash that identifies a GGUF file by its header."""

from __future__ import annotations

import hashlib

from edge_speq.gguf import container


def header_hash(file: container.GGUFFile) -> str:
    """Return the SHA-256 over each part's header (up to the end of its tensor table) and its file size (8 bytes, LE).

    Models that differ in metadata, types or shapes, and truncated files, have different hashes. Weights are not read.
    """
    digest = hashlib.sha256()
    for path in file.paths:
        entries = [t for t in file.tensors.values() if t.file == path]
        end = max((t.offset + 8 + len(t.name.encode()) + 4 + 8 * len(t.ne) + 12 for t in entries), default=0)
        with path.open("rb") as stream:
            digest.update(stream.read(end))
        digest.update(path.stat().st_size.to_bytes(8, "little"))
    return digest.hexdigest()
