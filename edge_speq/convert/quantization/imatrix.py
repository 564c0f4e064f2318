"""Importance matrices: mean squared activations of every input column of every weight and expert.

The file format is that of llama.cpp's tools/imatrix (GGUF). For each weight, `NAME.in_sum2`, [n_expert or 1, columns],
has sums of squares over tokens, and `NAME.counts`, [n_expert or 1, 1], the number of tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.convert.evaluation import graph, reader
from edge_speq.errors import EdgeError
from edge_speq.gguf import atomic, container, layout, writer
from edge_speq.progress import Progress, silent

PRIOR = 32  # tokens: weight of all experts' mean in `means`
SUMS, COUNTS = ".in_sum2", ".counts"
F32 = 0

Array = npt.NDArray[np.float64]


class Importance:
    """Sums of squares by weight. `datasets`: names of the texts; `chunks`: number of windows."""

    def __init__(self, datasets: list[str] | None = None) -> None:
        self.sums: dict[str, Array] = {}  # [n_expert or 1, columns]
        self.counts: dict[str, Array] = {}  # [n_expert or 1]
        self.datasets = datasets or []
        self.chunks = 0

    @staticmethod
    def wanted(name: str) -> bool:
        return name.startswith("blk.")  # llama.cpp's tool also leaves out the output layer

    def observe(self, name: str, weight: graph.GraphTensor, rows: graph.Rows, ids: graph.Ids | None) -> None:
        n, columns = (weight.ne[2] if ids is not None else 1), weight.ne[0]
        sums = self.sums.setdefault(name, np.zeros((n, columns)))
        counts = self.counts.setdefault(name, np.zeros(n))
        if ids is None:
            sums[0] += np.square(rows, dtype=np.float64).sum(axis=(0, 1))
            counts[0] += rows.shape[0] * rows.shape[1]
            return
        seen = np.broadcast_to(rows, (*ids.shape, columns))
        for expert in np.unique(ids):
            chosen = seen[ids == expert]
            sums[expert] += np.square(chosen, dtype=np.float64).sum(axis=0)
            counts[expert] += len(chosen)

    def means(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the means by weight, [n_expert or 1, columns].

        The mean over all experts is added to each expert with the weight of PRIOR tokens, because rarely chosen experts
        have few or no tokens.
        """
        found = {}
        for name, sums in self.sums.items():
            counts = self.counts[name]
            mean = sums.sum(axis=0) / max(1.0, float(counts.sum()))
            prior = PRIOR if len(counts) > 1 else 0
            drawn = (sums + prior * mean) / np.maximum(1.0, counts + prior)[:, None]
            found[name] = drawn.astype(np.float32)
        return found

    @property
    def unseen(self) -> int:
        """Return the number of experts that no token chose, over all blocks."""
        return sum(int((n == 0).sum()) for name, n in self.counts.items() if name.endswith("ffn_down_exps.weight"))


def collect(
    model: str | Path,
    text: str,
    *,
    dataset: str,
    most: int | None = None,
    n_threads: int | None = None,
    progress: Progress = silent,
) -> Importance:
    """Return the importance matrix of at most `most` tokens of the text. `progress` counts tokens.

    Raises EdgeError if the text is too short.
    """
    found = Importance([dataset])
    options: dict[str, Any] = {"n_threads": n_threads, "wanted": found.wanted, "observe": found.observe}
    with contextlib.closing(reader.Reader(model, **options)) as opened:
        windows = list(reader.windows(opened.tokens(text), most))
        if not windows:
            raise EdgeError(f"the text has fewer than {reader.LEAST} tokens", "give a longer text", usage=True)
        total, done = sum(map(len, windows)), 0
        for window in windows:
            for _ in opened.read(window):
                pass
            found.chunks += 1
            done += len(window)
            progress(done, total)
    return found


def entries(importance: Importance) -> list[writer.Entry]:
    made = []
    for name in sorted(importance.sums):
        sums, counts = importance.sums[name], importance.counts[name]
        made.append(writer.Entry(name + SUMS, (sums.shape[1], sums.shape[0]), F32, 4 * sums.size, _data(sums)))
        made.append(writer.Entry(name + COUNTS, (1, len(counts)), F32, 4 * counts.size, _data(counts)))
    return made


def _data(values: Array) -> Iterator[bytes]:
    """Yield the values as float32. Conversion is delayed, as all sums of a large model take some hundred MB."""
    yield values.astype("<f4").tobytes()


def size(importance: Importance) -> int:
    """Return the bytes of the file, which do not depend on the text."""
    return writer.size(_keys(importance), entries(importance))


def write(
    importance: Importance, path: str | Path, *, force: bool = False, sources: tuple[str | Path, ...] = ()
) -> int:
    """Write the file and return its bytes. Raises EdgeError."""
    keys, tensors = _keys(importance), entries(importance)
    n_bytes = writer.size(keys, tensors)
    with atomic.output(path, force, sources=sources, expected_bytes=n_bytes) as temporary:
        writer.write(temporary, keys, tensors)
    return n_bytes


def _keys(importance: Importance) -> dict[str, writer.Value]:
    return {
        "general.type": "imatrix",
        "imatrix.datasets": importance.datasets,
        "imatrix.chunk_count": importance.chunks,
        "imatrix.chunk_size": reader.WINDOW,
    }


def read(path: str | Path) -> Importance:
    """Read an importance matrix. Raises EdgeError if the file is not one in GGUF format."""
    file = container.read(path, "importance matrix")
    found = Importance([Path(path).name])
    arrays = dict(_arrays(file))
    chunks = file.fields.get("imatrix.chunk_count")
    found.chunks = chunks.value if chunks is not None and isinstance(chunks.value, int) else 0
    for key, sums in arrays.items():
        name = key.removesuffix(SUMS)
        if key == name:
            continue
        counts = arrays.get(name + COUNTS)
        if counts is None or counts.size != len(sums) or not np.isfinite(sums).all() or not np.isfinite(counts).all():
            file.fail(key, "its counts are missing or do not fit, or a value is not finite", file.tensors[key])
        found.sums[name], found.counts[name] = sums, counts.ravel()
    if not found.sums:
        raise EdgeError(f"{path} holds no importance matrix", "make one with edge-speq convert imatrix", usage=True)
    return found


def _arrays(file: container.GGUFFile) -> Iterator[tuple[str, Array]]:
    for name, span in layout.spans(file).items():
        if name.endswith((SUMS, COUNTS)):
            if span.tensor.type != "F32" or len(span.tensor.ne) > 2:
                file.fail(name, "an importance matrix has F32 tensors of two dimensions", span.tensor)
            data = np.frombuffer(b"".join(span.pieces()), dtype="<f4").astype(np.float64)
            yield name, data.reshape(-1, span.tensor.ne[0])
