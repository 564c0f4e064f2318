"""The user's build cache: finished wheels by content key, and the downloaded sdist."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from .digest import files_sha256, files_under
from .upstream import Upstream

# Everything in native/ that decides what a wheel contains, besides the patches that upstream.toml lists.
RECIPE = ("CMakeLists.txt", "pyproject.toml", "upstream.toml", "edge_build.py", "LICENSE")
RECIPE_FOLDERS = ("_build", "include", "src")


def folder() -> Path:
    if chosen := os.environ.get("EDGE_SPEQ_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "edge_speq"


def recipe(native: Path, upstream: Upstream) -> str:
    """Digest of everything of ours in the wheel; a missing file fails later, with its own message."""
    files = [native / name for name in RECIPE] + [native / "patches" / name for name in upstream.patches]
    for name in RECIPE_FOLDERS:
        files += files_under(native / name)
    return files_sha256(native, [path for path in files if path.is_file()])


def key(ingredients: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def find(wheel_key: str) -> Path | None:
    wheels = (folder() / "wheels" / wheel_key).glob("*.whl")
    return next((wheel for wheel in wheels if zipfile.is_zipfile(wheel)), None)


def store(wheel_key: str, wheel: Path) -> None:
    """Keeps a copy for the next install. A cache that cannot be written costs time, not the build."""
    try:
        place(wheel, folder() / "wheels" / wheel_key / wheel.name)
    except OSError as error:
        print(f"warning: the wheel was not kept in the build cache: {error}", flush=True)


def place(file: Path, target: Path) -> None:
    """Copies by rename, so that builds that run at the same time see a whole file or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
        os.replace(shutil.copy2(file, partial), target)
