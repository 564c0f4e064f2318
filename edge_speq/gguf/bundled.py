"""The bundled models: a small MoE and its draft, which show slots and speculation without a download."""

from __future__ import annotations

from pathlib import Path

from edge_speq.errors import EdgeError

PROMPT = "The old house stood at the end of the lane, and"
MODEL, DRAFT = "tales-moe.gguf", "tales-draft.gguf"


def path(name: str) -> Path:
    """Return the path of a bundled model file: in the installed package, or in models/ of a source checkout.

    Raises EdgeError if the file is missing.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "models", package.parent / "models"):
        if (folder / name).is_file():
            return folder / name
    raise EdgeError(f"the bundled model {name} is missing from this installation", "install edge_speq again")
