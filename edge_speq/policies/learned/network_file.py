"""Files of trained predictors: the network's arrays in an npz file, with the geometry of target and draft.

A file is untrusted input. Nothing is unpickled. The type and shape of each array are read first and must match the
geometry. So a file cannot make the reader allocate more memory than its own model needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.core import Experts
from edge_speq.errors import EdgeError

VERSION = 1
HINT = "learn it again: edge-speq tune --learn TRACE -o FILE"
LEARN = "train one with edge-speq tune --learn TRACE -o FILE, and give it with --predictor FILE"
READERS = ("auto", "learned")  # policies that read such a file
N_HISTORY = 3  # features per expert: fast and slow demand frequency, and the last step's demand
MOST = {"blocks": 4096, "experts": 65536, "used": 4096, "hidden": 1024, "tokens": 1 << 22, "places": 256}
MOST_META = 1 << 20  # bytes
MOST_NUMBERS = 1 << 28  # in all arrays
BAD = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)

Floats = npt.NDArray[np.float32]
Geometry = tuple[int, int, int]  # blocks, experts per block, experts that a token uses


def geometry(experts: Experts) -> Geometry:
    """Return the numbers that a predictor depends on."""
    return experts.n_blocks, experts.n_expert, experts.n_expert_used


def geometry_hash(target: Geometry, draft: Geometry | None) -> str:
    """Return the sha256 of both geometries. It ignores bytes and types, on which routing does not depend."""
    return hashlib.sha256(json.dumps([target, draft]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Weights:
    """The network's arrays; policies.learned.network has the formula.

    Sizes: T target experts and D draft experts over all blocks, V tokens, H hidden units, B blocks, P places.
    """

    meta: dict[str, Any]
    tokens: npt.NDArray[np.int32]  # [V], the ids that have rows, ascending
    token_in: Floats  # [V + 1, H], for the token itself; row 0 is for all ids without a row
    before_in: Floats  # [V + 1, H], for the token before it
    draft_in: Floats  # [D + 1, H], for the draft's experts; the last row is for unknown routing
    last_in: Floats  # [T, H], for the target's experts of the last token of text
    place: Floats  # [P], weight of last_in for each token of the step
    bias: Floats  # [H]
    out: Floats  # [H, T]
    out_bias: Floats  # [T]
    twin: Floats  # [B], for an expert that a draft of the same geometry chose
    history: Floats  # [N_HISTORY, B]
    later_out: Floats  # [H, T]; this and the next three are for the step after
    later_bias: Floats  # [T]
    later_history: Floats  # [N_HISTORY, B]
    later_mix: Floats  # [3], weights: of tokens decoded ahead, of the mean of h beside them, and of the mean alone

    @property
    def target(self) -> Geometry:
        """Geometry of the target."""
        return _geometry(self.meta["target"])

    @property
    def draft(self) -> Geometry | None:
        """Geometry of the draft; None if the predictor was trained without a draft's routing."""
        return None if self.meta["draft"] is None else _geometry(self.meta["draft"])

    def require(self, target: Experts, draft: Experts | None) -> None:
        """Raise EdgeError unless the predictor fits target and draft. A run without a draft always fits."""
        if geometry(target) != self.target:
            raise EdgeError(
                f"this predictor was learned for {_words(self.target)}, the model has {_words(geometry(target))}",
                HINT,
                usage=True,
            )
        if draft is not None and draft.n_blocks and geometry(draft) != self.draft:
            theirs = "a draft without routed experts" if self.draft is None else f"a draft of {_words(self.draft)}"
            raise EdgeError(
                f"this predictor was learned with {theirs}, this draft has {_words(geometry(draft))}",
                "record traces with this draft and learn from them",
                usage=True,
            )


def load_for_policy(path: str | Path | None, policy: str) -> Weights | None:
    """Load the predictor for a policy; None without a path.

    Raises EdgeError if `learned` has no file, if the policy does not read one, or if the file is invalid.
    """
    if path is None:
        if policy == "learned":
            raise EdgeError("policy learned needs a trained predictor", LEARN, usage=True)
        return None
    if policy not in READERS:
        raise EdgeError(
            f"policy {policy} does not use a predictor", f"use policy {' or '.join(READERS)}, or no file", usage=True
        )
    return read(path)


def shapes(
    target: Geometry, draft: Geometry | None, n_tokens: int, hidden: int, places: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array."""
    total, drafts = target[0] * target[1], 0 if draft is None else draft[0] * draft[1]
    return {
        "tokens": (n_tokens,),
        "token_in": (n_tokens + 1, hidden),
        "before_in": (n_tokens + 1, hidden),
        "draft_in": (drafts + 1, hidden),
        "last_in": (total, hidden),
        "place": (places,),
        "bias": (hidden,),
        "out": (hidden, total),
        "out_bias": (total,),
        "twin": (target[0],),
        "history": (N_HISTORY, target[0]),
        "later_out": (hidden, total),
        "later_bias": (total,),
        "later_history": (N_HISTORY, target[0]),
        "later_mix": (3,),
    }


def write(weights: Weights, path: Path) -> None:
    """Write a predictor atomically. Raises EdgeError if that fails; an existing file is then unchanged."""
    arrays = {name: getattr(weights, name) for name in _shapes_of(weights.meta)}
    meta = np.frombuffer(json.dumps(weights.meta).encode(), dtype=np.uint8)
    if path.exists() and not path.is_file():
        raise EdgeError(f"cannot write {path}: it is not a file", "give another -o FILE", usage=True)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent)
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, meta=meta, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise EdgeError(f"cannot write {path}: {error.strerror}", "give another -o FILE") from error


def read(path: str | Path) -> Weights:
    """Read a predictor. Raises EdgeError if the file is missing, corrupt, inconsistent or of another version."""
    path = Path(path)
    if not path.is_file():
        raise EdgeError(
            f"there is no predictor {path}", "train one with edge-speq tune --learn TRACE -o FILE", usage=True
        )
    try:
        with zipfile.ZipFile(path) as archive:
            meta = json.loads(_member(archive, "meta", None, np.uint8).tobytes())
            if meta["version"] != VERSION:
                raise EdgeError(f"{path} has version {meta['version']}, this edge-speq reads version {VERSION}", HINT)
            expected = _shapes_of(meta)
            kinds = {name: np.int32 if name == "tokens" else np.float32 for name in expected}
            arrays = {name: _member(archive, name, shape, kinds[name]) for name, shape in expected.items()}
        made = Weights(meta, **arrays)
        _require_sound(made)
    except (*BAD, RecursionError) as error:
        raise EdgeError(f"{path} is not a trained predictor: {error}", HINT) from error
    return made


def _shapes_of(meta: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the array shapes for a file's metadata. Raises ValueError if its sizes are impossible."""
    target = _geometry(meta["target"])
    draft = None if meta["draft"] is None else _geometry(meta["draft"])
    sizes = {name: _size(meta[name], MOST[name]) for name in ("tokens", "hidden", "places")}
    found = shapes(target, draft, sizes["tokens"], sizes["hidden"], sizes["places"])
    if sum(int(np.prod(shape, dtype=object)) for shape in found.values()) > MOST_NUMBERS:
        raise ValueError("its sizes are impossible")
    return found


def _geometry(values: Any) -> Geometry:
    blocks, experts, used = values
    found = _size(blocks, MOST["blocks"]), _size(experts, MOST["experts"]), _size(used, MOST["used"])
    if not all(found) or found[2] > found[1]:
        raise ValueError("its experts are impossible")
    return found


def _size(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r} is not a size")
    return value


def _member(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...] | None, kind: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Read an array after checking its header, so that its size is known before any data is read."""
    with archive.open(f"{name}.npy") as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{name} has another version of the npy format")
        found, is_fortran, dtype = np.lib.format.read_array_header_1_0(member, max_header_size=10_000)
        if shape is None and (len(found) != 1 or found[0] > MOST_META):
            raise ValueError(f"{name} has shape {found}")
        if is_fortran or dtype != np.dtype(kind) or (shape is not None and found != shape):
            raise ValueError(f"{name} is {dtype} of shape {found}")
        n_bytes = int(np.prod(found, dtype=object)) * dtype.itemsize
        data = member.read(n_bytes + 1)
    if len(data) != n_bytes:
        raise ValueError(f"{name} has {len(data)} bytes instead of {n_bytes}")
    values: npt.NDArray[Any] = np.frombuffer(data, dtype=dtype).reshape(found)
    return values


def _require_sound(made: Weights) -> None:
    for name in _shapes_of(made.meta):
        if not np.isfinite(getattr(made, name)).all():
            raise ValueError(f"{name} has values that are not finite")
    if (np.diff(made.tokens) <= 0).any():
        raise ValueError("its tokens are not in order")
    if not len(made.place) or not len(made.bias):
        raise ValueError("it is empty")
    if made.meta["hash"] != geometry_hash(made.target, made.draft):
        raise ValueError("its hash is not that of its experts")


def _words(found: Geometry) -> str:
    return f"{found[2]} of {found[1]} experts in {found[0]} blocks"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
