"""Applies our patches, exactly or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from .failure import fail


class Complaints(logging.Handler):
    """patch-ng only logs what it tolerates (an applied patch, a mismatch in one hunk); every such line is a failure."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().strip())


def apply_patches(patches: Iterable[Path], tree: Path) -> None:
    for patch in patches:
        if not patch.is_file():
            fail(f"upstream.toml lists {patch.name}, but {patch} does not exist", "restore native/patches/ from git")
        complaints = apply(patch, tree)
        if complaints:
            fail(
                f"{patch.name} does not apply:\n  " + "\n  ".join(complaints),
                "the source must be the pinned, unpatched llama-cpp-python of native/upstream.toml",
            )


def apply(patch: Path, tree: Path) -> list[str]:
    """Returns what is wrong with the patch; empty means that it was applied as written."""
    import patch_ng  # type: ignore[import-untyped]

    complaints = Complaints()
    logger = logging.getLogger("patch_ng")
    logger.addHandler(complaints)
    try:
        parsed = patch_ng.fromfile(str(patch))
        if not parsed:
            return complaints.lines or ["not a unified diff"]
        # patch-ng would overwrite a file that the patch means to create.
        created = [item.target.decode().removeprefix("b/") for item in parsed.items if item.source == b"/dev/null"]
        existing = [f"{name} exists already" for name in created if (tree / name).exists()]
        if existing:
            return existing
        applied = parsed.apply(root=str(tree), fuzz=False)
        return complaints.lines or ([] if applied else ["patch-ng gives no reason"])
    finally:
        logger.removeHandler(complaints)
