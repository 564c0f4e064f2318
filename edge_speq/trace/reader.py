"""Read traces, chunk by chunk."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq.core import ExpertGroup, Experts
from edge_speq.errors import EdgeError
from edge_speq.trace.step import Step
from edge_speq.trace.writer import IS_PROMPT, VERSION, WHOLE

BAD = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    zipfile.BadZipFile,
    json.JSONDecodeError,
    NotImplementedError,
)
HINT = "record it again with edge-speq trace"


@dataclass(frozen=True, slots=True)
class Trace:
    """A recording. `meta` describes its origin: model, draft, prompts, plan, counters and versions."""

    path: Path
    meta: dict[str, Any]
    experts: Experts
    steps: tuple[Step, ...]
    draft_experts: Experts | None = None  # of the draft; None if the trace has no routing of a draft

    @property
    def k_max(self) -> int:
        """Most tokens drafted in a step."""
        return int(self.meta["k_max"])

    @property
    def domains(self) -> list[str]:
        """The domain of each passage."""
        return [prompt["domain"] for prompt in self.meta["prompts"]]

    def of_domain(self, domain: str) -> tuple[Step, ...]:
        """Return the steps of all passages of a domain."""
        return tuple(step for step in self.steps if self.domains[step.passage] == domain)


def read(path: str | Path) -> Trace:
    """Read a trace into memory, about 100 bytes per token and block. Raises EdgeError if the file is not a trace."""
    path = Path(path)
    if not path.is_file():
        raise EdgeError(f"there is no trace {path}", HINT, usage=True)
    try:
        with zipfile.ZipFile(path) as archive:
            meta = json.loads(_array(archive, "meta").tobytes())
            if meta["version"] != VERSION:
                raise EdgeError(f"{path} is a trace of version {meta['version']}, this one reads {VERSION}", HINT)
            experts = _experts(meta["experts"])
            draft = _draft_experts(meta, experts)
            steps = tuple(_steps(archive, experts, draft or experts))
    except BAD as error:
        raise EdgeError(f"{path} is not a trace: {error}", HINT) from error
    if len(steps) != meta["n_steps"]:
        raise EdgeError(f"{path} is not whole: {len(steps)} of {meta['n_steps']} steps", HINT)
    shows = draft is not None and any(step.foreseen is not None for step in steps)
    return Trace(path, meta, experts, steps, draft if shows else None)


def _draft_experts(meta: dict[str, Any], experts: Experts) -> Experts | None:
    """Return the draft's experts. Older traces lack them; their draft always has the target's experts."""
    found = meta.get("draft_experts")
    return _experts(found) if found is not None else experts


def _experts(meta: dict[str, Any]) -> Experts:
    groups = tuple(ExpertGroup(**(group | {"blocks": tuple(group["blocks"])})) for group in meta["groups"])
    return Experts(meta["n_blocks"], meta["n_expert"], meta["n_expert_used"], groups)


def _array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as member:
        found: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
    return found


def _steps(archive: zipfile.ZipFile, experts: Experts, draft: Experts) -> Iterator[Step]:
    names = set(archive.namelist())
    chunk = 0
    while f"width.{chunk:06d}.npy" in names:
        suffix = f".{chunk:06d}"
        members = [name.removesuffix(f"{suffix}.npy") for name in names if name.endswith(f"{suffix}.npy")]
        yield from _of_chunk({name: _array(archive, name + suffix) for name in members}, experts, draft)
        chunk += 1


def _of_chunk(c: dict[str, npt.NDArray[Any]], experts: Experts, draft: Experts) -> Iterator[Step]:
    by_token = [c["routing"], c["tokens"], *([c["gates"]] if "gates" in c else [])]
    n_tokens, largest = int(c["width"].sum()), int(c["routing"].max(initial=0))
    n_seen = int(c["n_foreseen"].clip(min=0).sum())
    if any(len(values) != n_tokens for values in by_token) or (n_seen and len(c["foreseen"]) != n_seen):
        raise ValueError("the lengths of its arrays do not agree")
    if largest >= experts.n_expert or (n_seen and int(c["foreseen"].max()) >= draft.n_expert):
        raise ValueError("its routing does not fit its experts")
    reads = _read_of(c, experts)
    at = seen = 0
    for i, width in enumerate(c["width"].tolist()):
        shown = int(c["n_foreseen"][i])
        foreseen = None if shown < 0 else _by_block(c["foreseen"][seen : seen + shown], np.int32)
        step_ms, draft_ms, stall_ms = c["ms"][i].tolist()
        yield Step(
            passage=int(c["passage"][i]),
            tokens=c["tokens"][at : at + width],
            routing=_by_block(c["routing"][at : at + width], np.int32),
            foreseen=foreseen,
            n_shown=int(c["n_shown"][i]),
            n_drafted=int(c["n_drafted"][i]),
            n_accepted=int(c["n_accepted"][i]),
            is_prompt=bool(c["flags"][i] & IS_PROMPT),
            whole=bool(c["flags"][i] & WHOLE),
            step_ms=step_ms,
            draft_ms=draft_ms,
            stall_ms=stall_ms,
            gates=_by_block(c["gates"][at : at + width], np.float16) if "gates" in c else None,
            read=next(reads),
        )
        at, seen = at + width, seen + max(0, shown)


def _read_of(c: dict[str, npt.NDArray[Any]], experts: Experts) -> Iterator[npt.NDArray[np.int32] | None]:
    """Yield each step's `read` array; None for steps without one, such as all steps of older traces."""
    n_read = c.get("n_read", np.zeros(len(c["width"]), dtype=np.int16))
    read = c.get("read", np.zeros((0, experts.n_blocks, experts.n_expert_used), dtype=np.int16))
    if len(read) != n_read.sum() or (len(read) and not -1 <= read.min() <= read.max() < experts.n_expert):
        raise ValueError("what was read of prompts does not fit its experts")
    end = np.cumsum(n_read)
    return (_by_block(read[e - n : e], np.int32) if n else None for n, e in zip(n_read.tolist(), end, strict=True))


def _by_block(values: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.ascontiguousarray(values.transpose(1, 0, 2), dtype=dtype)
