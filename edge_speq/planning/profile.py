"""Results of `edge-speq tune` for a model, its draft and a device: a JSON file in the user's configuration folder.

A profile fills in arguments that were left at their defaults. A profile that is corrupt, from another build, or from
a machine with another number of processors is ignored; a warning names its file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_speq import __version__, _native, system
from edge_speq.core import ON_MISS
from edge_speq.drafting.spec import is_file
from edge_speq.errors import EdgeError
from edge_speq.planning.load_request import OPTIONS, LoadRequest
from edge_speq.units import parse_draft_tokens

VERSION = 2
FOLDER_VARIABLE = "EDGE_SPEQ_CONFIG"
BOUNDS = ("resident", "vram_budget")
AGAIN = "run edge-speq tune again, or delete the file"

log = logging.getLogger("edge_speq")


@dataclass(frozen=True, slots=True)
class Key:
    """Model, draft and device of a profile. Hashes are those of gguf.fingerprint: headers and sizes, not weights."""

    model: str
    draft: str | None  # hash of a draft file, otherwise the name: self or ngram
    device: str  # name and description from ggml and its driver

    @property
    def file_name(self) -> str:
        """Return a short file name that is valid on every file system."""
        device = re.sub(r"[^A-Za-z0-9]+", "-", self.device).strip("-")[:40]
        tail = hashlib.sha256(self.device.encode()).hexdigest()[:8]
        return f"{self.model[:16]}-{(self.draft or 'alone')[:16]}-{device}-{tail}.json"


@dataclass(frozen=True, slots=True)
class TuneProfile:
    """Arguments that `edge-speq tune` found fastest, and the bounds that it tuned for.

    - `bounds`: arguments resident and vram_budget.
    - `chosen`: draft_tokens, on_miss, n_threads, and draft if tune compared several (an absolute path, self or ngram).
    - `found`: report for people: costs, candidates, predicted and measured speeds.
    """

    key: Key
    bounds: dict[str, Any]
    chosen: dict[str, Any]
    found: dict[str, Any]
    draft_hash: str | None = None  # hash of the chosen draft, as in Key


def folder() -> Path:
    """Return the folder of stored profiles. The environment variable EDGE_SPEQ_CONFIG moves it."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named) / "profiles"
    import platformdirs

    return Path(platformdirs.user_config_dir("edge_speq", appauthor=False, roaming=True)) / "profiles"


def key(model: str | Path, draft: str | Path | None) -> Key:
    """Return the key of a model and draft on this machine: read their headers, and load the backends.

    Raises EdgeError if a file is missing or is not a GGUF model.
    """
    from edge_speq.gguf import model as gguf_model
    from edge_speq.gguf.fingerprint import header_hash

    _native.load_backends()
    of_draft = None if draft is None else draft_hash(draft)
    return Key(header_hash(gguf_model.check_model(model)), of_draft, str(_native.compute_device()))


def draft_hash(draft: str | Path) -> str:
    """Return the header hash of a draft file, or the name of a draft without a file (self, ngram).

    Raises EdgeError if the file is not a GGUF file.
    """
    from edge_speq.gguf import container
    from edge_speq.gguf.fingerprint import header_hash

    return header_hash(container.read(draft, "draft")) if is_file(draft) else str(draft)


# --- storing and reading -----------------------------------------------------------------------------------


def store(profile: TuneProfile) -> Path:
    """Write the profile to the path that profile="auto" reads, replacing an earlier one atomically. Return the path.

    Raises EdgeError if the folder or the file cannot be written.
    """
    from edge_speq.gguf import atomic

    path = folder() / profile.key.file_name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgeError(f"cannot make the folder {path.parent}: {error}", f"name another: {FOLDER_VARIABLE}") from error
    with atomic.output(path, force=True) as temporary:
        temporary.write_text(json.dumps(_stamp() | dataclasses.asdict(profile), indent=1) + "\n", encoding="utf-8")
    return path


def _stamp() -> dict[str, Any]:
    """Return the versions and the processor count; a profile with other values is stale."""
    return {
        "version": VERSION,
        "edge_speq": __version__,
        "llama_cpp": _native.llama_cpp_commit(),
        "processors": system.usable_cpus(),
    }


def read(path: Path, expected: Key) -> TuneProfile:
    """Return the profile in a file. Raises EdgeError if it is corrupt, stale or made for another model or device."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        made_for, of_draft = Key(**data["key"]), data.get("draft_hash")
        profile = TuneProfile(made_for, data["bounds"], data["chosen"], data["found"], of_draft)
        _require_sound(profile)
    except OSError as error:
        raise EdgeError(f"cannot read the profile {path}: {error}", AGAIN) from error
    except (ValueError, TypeError, KeyError, AttributeError, EdgeError) as error:
        raise EdgeError(f"the profile {path} is corrupt: {error!r}", AGAIN) from error
    for name, now in _stamp().items():
        if data.get(name) != now:
            raise EdgeError(f"the profile {path} is stale: {name} was {data.get(name)!r} and is {now!r}", AGAIN)
    for field in dataclasses.fields(Key):
        if getattr(profile.key, field.name) != getattr(expected, field.name):
            raise EdgeError(f"the profile {path} was made for another {field.name}", AGAIN)
    _require_draft(profile, path)
    return profile


def _require_draft(profile: TuneProfile, path: Path) -> None:
    """Raise EdgeError if the chosen draft file has changed or is missing."""
    draft = profile.chosen.get("draft")
    if draft is None:
        return
    try:
        is_same = draft_hash(draft) == profile.draft_hash
    except EdgeError as error:
        raise EdgeError(f"the profile {path} is stale: {error.message}", AGAIN) from error
    if not is_same:
        raise EdgeError(f"the profile {path} is stale: the draft {draft} has changed", AGAIN)


def _require_sound(profile: TuneProfile) -> None:
    """Raise ValueError, KeyError or EdgeError for values that EdgeLlama would refuse."""
    chosen, bounds = profile.chosen, profile.bounds
    if not set(chosen) <= {"draft_tokens", "on_miss", "n_threads", "draft"} or not set(bounds) <= set(BOUNDS):
        raise ValueError("unknown arguments")
    parse_draft_tokens(chosen["draft_tokens"])
    if chosen["on_miss"] not in ON_MISS or not (type(chosen["n_threads"]) is int and 0 < chosen["n_threads"] <= 4096):
        raise ValueError("on_miss or n_threads is not possible")
    draft = chosen.get("draft")
    if draft is not None and is_file(draft) and not Path(draft).is_absolute():
        raise ValueError("draft is not an absolute path")
    _parsed(bounds)


# --- applying ----------------------------------------------------------------------------------------------


def apply(request: LoadRequest, stock: dict[str, Any]) -> tuple[LoadRequest, dict[str, Any] | None]:
    """Fill in a request, and `stock` (options of llama_cpp.Llama, changed in place), from the profile.

    Return the request and a dict of the profile's path and the values filled in, or None if no profile was used.
    Raises EdgeError if request.profile is a path without a file.
    """
    path = None if request.profile == "auto" else Path(str(request.profile))
    if path is not None and not path.is_file():
        raise EdgeError(f"there is no profile {path}", "edge-speq tune writes one", usage=True)
    if request.policy != "auto" or request.draft_model is not None:
        return request, None
    if path is None and not any(folder().glob("*.json")):  # avoids hashing the files
        return request, None
    try:
        made_for = key(request.model, request.draft)
    except EdgeError:  # loading the files reports what is wrong with them
        return request, None
    path = path or folder() / made_for.file_name
    profile = _usable(path, made_for, request)
    if profile is None:
        return request, None
    ours = _fill_in(profile, request)
    applied = dict(ours)
    if stock.get("n_threads") is None:
        applied["n_threads"] = stock["n_threads"] = profile.chosen["n_threads"]
    return request.replace(**ours), {"path": str(path), "applied": applied}


def _usable(path: Path, made_for: Key, request: LoadRequest) -> TuneProfile | None:
    if not path.is_file():
        return None
    try:
        profile = read(path, made_for)
    except EdgeError as error:
        log.warning("%s", error)
        return None
    if _alike(profile.bounds, request):
        return profile
    log.info("%s is for other bounds: %s", path, profile.bounds)
    return None


def _alike(bounds: dict[str, Any], request: LoadRequest) -> bool:
    """Return true if the caller gave no bounds, or exactly the bounds of the profile."""
    given = {name: getattr(request, name) for name in BOUNDS}
    return all(value is None for value in given.values()) or given == _parsed(bounds)


def _parsed(bounds: dict[str, Any]) -> dict[str, Any]:
    """Return the bounds of a profile, parsed as in LoadRequest. Raises EdgeError for a value that cannot be parsed."""
    return {name: OPTIONS[name].parse(bounds.get(name)) for name in BOUNDS}


def _fill_in(profile: TuneProfile, request: LoadRequest) -> dict[str, Any]:
    """Return the profile's values for options that the caller left at their defaults."""
    applied = {
        name: value for name, value in profile.bounds.items() if value is not None and getattr(request, name) is None
    }
    for name in ("draft_tokens", "on_miss"):
        if getattr(request, name) == "auto" and profile.chosen[name] != "auto":
            applied[name] = profile.chosen[name]
    draft = profile.chosen.get("draft")
    if draft is not None and request.draft_tokens != 0:  # a caller's own draft has another key
        applied["draft"] = draft
    return applied
