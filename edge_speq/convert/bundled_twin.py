"""The demo's draft: a low-bit copy of the bundled MoE's experts, made once and kept in the cache folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_speq import _native
from edge_speq.convert.quantization import draft
from edge_speq.errors import EdgeError
from edge_speq.gguf import bundled, container, draft_experts
from edge_speq.gguf import model as gguf_model

TWIN_TYPE = "q2_k"
CACHE_VARIABLE = "EDGE_SPEQ_CACHE"


def cache_folder() -> Path:
    """Return the user's cache folder of edge_speq; EDGE_SPEQ_CACHE replaces it."""
    from platformdirs import user_cache_path

    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else user_cache_path("edge_speq", appauthor=False)


@contextlib.contextmanager
def twin(on_making: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a file of the bundled MoE's experts at TWIN_TYPE, 12 MB: `edge-speq convert draft --experts-only`.

    The first call makes it within seconds, after calling on_making, and keeps it in the cache folder. The name has the
    llama.cpp commit, since another quantizer may write other bytes. A file that is damaged or from other weights is
    made again. If the folder cannot be written, the file is temporary and removed after the block.
    """
    name = f"{Path(bundled.MODEL).stem}-{TWIN_TYPE}-experts-{_native.llama_cpp_commit()[:10]}.gguf"
    kept = _kept(name, on_making)
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="edge_speq-") as temporary:
        on_making()
        _make(Path(temporary) / name)
        yield Path(temporary) / name


def _kept(name: str, on_making: Callable[[], None]) -> Path | None:
    """Return the file in the cache folder, made if it is missing; None if that is not possible."""
    try:
        file = cache_folder() / name
        if not _is_twin(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            on_making()
            _make(file)
    except (EdgeError, OSError, RuntimeError):  # no room, no right to write, or no home folder
        return None
    return file


def _make(out: Path) -> None:
    target = bundled.path(bundled.MODEL)
    draft.make(target, out, draft.recipe(target, TWIN_TYPE), experts_only=True, force=True)


def _is_twin(file: Path) -> bool:
    """Return true if the file is valid and has the experts of the bundled MoE."""
    if not file.is_file():
        return False
    try:
        draft_experts.read(container.read(file, "twin's experts"), gguf_model.check_model(bundled.path(bundled.MODEL)))
    except EdgeError:
        return False
    return True
