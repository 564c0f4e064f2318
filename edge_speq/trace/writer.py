"""Write traces. Every CHUNK steps become members of a zip file, so memory stays bounded."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.errors import EdgeError
from edge_speq.trace.step import Step

VERSION = 1
CHUNK = 256  # steps
IS_PROMPT, WHOLE = 1, 2  # flags of a step


class Writer:
    """Writes a trace to a temporary file beside `path`, which close() renames to `path`.

    An exception that leaves the `with` block also closes it, with `complete` False, so an interrupted recording keeps
    its steps. Without any step no file is left. Raises EdgeError if the file cannot be written.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        if path.exists() and not path.is_file():  # a device, which the rename would replace
            raise EdgeError(f"{path} is not a file that could be replaced", "give another -o FILE", usage=True)
        self._path, self.meta = path, meta
        self._steps: list[Step] = []
        self._n_chunks = self.n_steps = 0
        self.complete = True
        try:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        except OSError as error:
            raise EdgeError(f"cannot write {path}: {error.strerror}", "give another -o FILE") from error
        self._temporary = Path(name)
        self._file = os.fdopen(handle, "wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=4)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.complete = self.complete and kind is None
        self.close()

    def add(self, step: Step) -> None:
        """Append a step."""
        self._steps.append(step)
        self.n_steps += 1
        if len(self._steps) >= CHUNK:
            self._flush()

    def close(self) -> None:
        """Write the remaining steps and rename the file. Raises EdgeError if that fails."""
        if not self.n_steps:
            self._discard()
            return
        try:
            self._flush()
            meta = json.dumps(self.meta | {"version": VERSION, "n_steps": self.n_steps, "complete": self.complete})
            self._write("meta", np.frombuffer(meta.encode(), dtype=np.uint8))
            self._zip.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.chmod(0o666 & ~_umask())
            self._temporary.replace(self._path)
        except OSError as error:
            self._discard()
            raise EdgeError(f"cannot write {self._path}: {error.strerror}", "is the disk full?") from error

    def _discard(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._zip.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._steps:
            return
        for name, values in columns(self._steps, self._most_experts()).items():
            self._write(f"{name}.{self._n_chunks:06d}", values)
        self._n_chunks += 1
        self._steps = []

    def _most_experts(self) -> int:
        return max(int((self.meta.get(name) or {}).get("n_expert", 0)) for name in ("experts", "draft_experts"))

    def _write(self, name: str, values: npt.NDArray[Any]) -> None:
        with self._zip.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, np.ascontiguousarray(values), allow_pickle=False)


def columns(steps: list[Step], n_expert: int) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a chunk, by name.

    Arrays with a row per token concatenate the steps, token axis first; `width` and `n_foreseen` hold the lengths.
    """
    ids = np.uint8 if n_expert <= 256 else np.uint16
    foreseen = [step.foreseen for step in steps if step.foreseen is not None]
    made: dict[str, npt.NDArray[Any]] = {
        "passage": np.array([s.passage for s in steps], dtype=np.int32),
        "width": np.array([s.width for s in steps], dtype=np.int16),
        "n_foreseen": np.array([-1 if s.foreseen is None else s.foreseen.shape[1] for s in steps], dtype=np.int16),
        "n_shown": np.array([s.n_shown for s in steps], dtype=np.int16),
        "n_drafted": np.array([s.n_drafted for s in steps], dtype=np.int16),
        "n_accepted": np.array([s.n_accepted for s in steps], dtype=np.int16),
        "flags": np.array([IS_PROMPT * s.is_prompt + WHOLE * s.whole for s in steps], dtype=np.uint8),
        "ms": np.array([(s.step_ms, s.draft_ms, s.stall_ms) for s in steps], dtype=np.float32),
        "tokens": np.concatenate([s.tokens for s in steps]).astype(np.int32),
        "routing": _by_token([s.routing for s in steps]).astype(ids),
    }
    read = [step.read for step in steps if step.read is not None]
    if read:
        made["n_read"] = np.array([0 if s.read is None else s.read.shape[1] for s in steps], dtype=np.int16)
        made["read"] = _by_token(read).astype(np.int16)  # with -1
    if foreseen:
        made["foreseen"] = _by_token(foreseen).astype(ids)
    if all(step.gates is not None for step in steps):
        made["gates"] = _by_token([s.gates for s in steps if s.gates is not None]).astype(np.float16)
    return made


def _by_token(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate([array.transpose(1, 0, 2) for array in arrays])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
