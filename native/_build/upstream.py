"""upstream.toml: which llama-cpp-python is built, and which patches it gets."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Upstream:
    name: str
    version: str
    sha256: str  # of the sdist
    llama_cpp_commit: str
    patches: list[str]  # file names under patches/, in the order of application

    @classmethod
    def load(cls, path: Path) -> Upstream:
        return cls(**tomllib.loads(path.read_text(encoding="utf-8")))
