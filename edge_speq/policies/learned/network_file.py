"""What `learned` foresight has learned: arrays in an npz file, and the geometry of the models that they belong to.

A file may come from anybody. Nothing is unpickled; each array's type and shape are read first and must be those that
the geometry calls for, so a file cannot ask for more memory than its own model would need.
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
LEARN = "edge-speq tune --learn TRACE -o FILE makes one, --foresight FILE gives it"
READERS = ("auto", "learned")  # policies
N_HISTORY = 3  # what was demanded: of late, for long, by the last step
MOST = {"blocks": 4096, "experts": 65536, "used": 4096, "hidden": 1024, "tokens": 1 << 22, "places": 256}
MOST_META = 1 << 20  # bytes
MOST_NUMBERS = 1 << 28  # in all arrays
BAD = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)

Floats = npt.NDArray[np.float32]
Geometry = tuple[int, int, int]  # blocks, experts of each, experts that a token uses


def geometry(experts: Experts) -> Geometry:
    return experts.n_blocks, experts.n_expert, experts.n_expert_used


def geometry_hash(target: Geometry, draft: Geometry | None) -> str:
    """sha256 of both; bytes and types are left out, since routing does not depend on them."""
    return hashlib.sha256(json.dumps([target, draft]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Weights:
    """A hidden layer of `hidden` units for each token, and chances of all experts from it (foresight.learned has the
    formula). Sizes: T target experts and D draft experts over all blocks, V tokens, H hidden units, B blocks.
    """

    meta: dict[str, Any]
    tokens: npt.NDArray[np.int32]  # [V], the ids that have rows, rising
    token_in: Floats  # [V + 1, H], of the token itself; the first row is for all others
    before_in: Floats  # [V + 1, H], of the token before it
    draft_in: Floats  # [D + 1, H], of the draft's experts; the last row: its routing is not known
    last_in: Floats  # [T, H], of what the target chose for the last token of text
    place: Floats  # [P], how much that still says after so many tokens
    bias: Floats  # [H]
    out: Floats  # [H, T]
    out_bias: Floats  # [T]
    twin: Floats  # [B], of an expert that a draft of the same geometry chose
    history: Floats  # [N_HISTORY, B]
    later_out: Floats  # [H, T]; these for the step after
    later_bias: Floats  # [T]
    later_history: Floats  # [N_HISTORY, B]
    later_mix: Floats  # [3]: what tokens looked ahead at say, the guess beside them, and the guess without them

    @property
    def target(self) -> Geometry:
        return _geometry(self.meta["target"])

    @property
    def draft(self) -> Geometry | None:
        return None if self.meta["draft"] is None else _geometry(self.meta["draft"])

    def require(self, target: Experts, draft: Experts | None) -> None:
        """Raises EdgeError unless it was learned for experts of these. A run without a draft is always served."""
        if geometry(target) != self.target:
            raise EdgeError(
                f"this foresight was learned for {_words(self.target)}, the model has {_words(geometry(target))}",
                HINT,
                usage=True,
            )
        if draft is not None and draft.n_blocks and geometry(draft) != self.draft:
            theirs = "a draft without routed experts" if self.draft is None else f"a draft of {_words(self.draft)}"
            raise EdgeError(
                f"this foresight was learned with {theirs}, this draft has {_words(geometry(draft))}",
                "record traces with this draft and learn from them",
                usage=True,
            )


def load_for_policy(path: str | Path | None, policy: str) -> Weights | None:
    """The file of a policy that reads one. Raises EdgeError where the two do not go together."""
    if path is None:
        if policy == "learned":
            raise EdgeError("policy learned needs a file of learned foresight", LEARN, usage=True)
        return None
    if policy not in READERS:
        raise EdgeError(
            f"policy {policy} reads no learned foresight", f"use {' or '.join(READERS)}, or no file", usage=True
        )
    return read(path)


def shapes(
    target: Geometry, draft: Geometry | None, n_tokens: int, hidden: int, places: int
) -> dict[str, tuple[int, ...]]:
    """Of each array."""
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
    """Raises EdgeError when that is impossible; a file that was there before then stays as it is."""
    arrays = {name: getattr(weights, name) for name in _shapes_of(weights.meta)}
    meta = np.frombuffer(json.dumps(weights.meta).encode(), dtype=np.uint8)
    if path.exists() and not path.is_file():
        raise EdgeError(f"cannot write {path}: it is no file", "give another -o FILE", usage=True)
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
    """Raises EdgeError for a file that is missing, corrupt, of another version, or does not fit together."""
    path = Path(path)
    if not path.is_file():
        raise EdgeError(f"there is no foresight {path}", "edge-speq tune --learn TRACE -o FILE makes one", usage=True)
    try:
        with zipfile.ZipFile(path) as archive:
            meta = json.loads(_member(archive, "meta", None, np.uint8).tobytes())
            if meta["version"] != VERSION:
                raise EdgeError(f"{path} is foresight of version {meta['version']}, this one reads {VERSION}", HINT)
            expected = _shapes_of(meta)
            kinds = {name: np.int32 if name == "tokens" else np.float32 for name in expected}
            arrays = {name: _member(archive, name, shape, kinds[name]) for name, shape in expected.items()}
        made = Weights(meta, **arrays)
        _require_sound(made)
    except (*BAD, RecursionError) as error:
        raise EdgeError(f"{path} is not learned foresight: {error}", HINT) from error
    return made


def _shapes_of(meta: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Raises ValueError for sizes that no model has."""
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
    """An array whose header is as expected; the header is read before anything of its size."""
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
            raise ValueError(f"{name} has values that are no numbers")
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
