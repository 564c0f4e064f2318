"""Where llama-cpp-python's source comes from: a path the user names, the cache, or pip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import cache
from .digest import SKIPPED, file_sha256, files_sha256, files_under
from .failure import fail
from .upstream import Upstream

VARIABLE = "EDGE_SPEQ_LLAMA_SOURCE"
# The installer that runs this backend leaves these to its children, and pip's own build of the sdist would obey them.
INHERITED = ("PEP517_", "_PYPROJECT_HOOKS_", "PIP_BUILD_TRACKER")


@dataclass(frozen=True)
class Source:
    digest: str  # of the sdist, or of the files of an unpacked tree
    path: Path | None  # sdist or tree; None: the pinned sdist, not fetched yet


def identify(upstream: Upstream) -> Source:
    """Checks the source that the user names. The pinned sdist is known by its hash, before any download."""
    named = os.environ.get(VARIABLE)
    if not named:
        return Source(upstream.sha256, None)
    path = Path(named).expanduser().absolute()
    if path.is_dir():
        check_tree(path, upstream)
        return Source(files_sha256(path, files_under(path)), path)
    if not path.is_file():
        fail(f"{VARIABLE} names {path}, which does not exist", "give the absolute path of the sdist or unpacked tree")
    check_sdist(path, upstream)
    return Source(upstream.sha256, path)


def check_sdist(sdist: Path, upstream: Upstream) -> None:
    got = file_sha256(sdist)
    if got != upstream.sha256:
        fail(
            f"wrong sha256 of {sdist}\n  expected {upstream.sha256}\n  got      {got}",
            f"it must be the unmodified sdist of {upstream.name} {upstream.version}, as the package index serves it",
        )


def check_tree(tree: Path, upstream: Upstream) -> None:
    hint = f"unpack the sdist of {upstream.name} {upstream.version} afresh, or name the sdist itself"
    module = tree / "llama_cpp" / "__init__.py"
    for needed in (module, tree / "vendor" / "llama.cpp" / "CMakeLists.txt"):
        if not needed.is_file():
            fail(f"{tree} is not an unpacked {upstream.name} sdist: it has no {needed.relative_to(tree)}", hint)
    found = re.search(r'^__version__ = "(.+)"', module.read_text(encoding="utf-8"), re.MULTILINE)
    version = found[1] if found else "unknown"
    if version != upstream.version:
        fail(f"{tree} holds {upstream.name} {version}, expected {upstream.version}", hint)


def fetch(upstream: Upstream) -> Path:
    """The pinned sdist in the cache, downloaded when it is not there or damaged."""
    kept = cache.folder() / "sdist" / f"{upstream.name.replace('-', '_')}-{upstream.version}.tar.gz"
    if not (kept.is_file() and file_sha256(kept) == upstream.sha256):
        with tempfile.TemporaryDirectory(prefix="edge-speq-download-") as work:
            downloaded = download(upstream, Path(work))
            check_sdist(downloaded, upstream)
            cache.place(downloaded, kept)
    return kept


def download(upstream: Upstream, into: Path) -> Path:
    """Runs pip, so that the user's index, mirror, proxy and certificate settings apply.

    pip computes the metadata of every sdist that it downloads, which runs code from it; with the hash in the
    requirement it refuses any other file before that.
    """
    print(f"edge_speq: downloading {upstream.name} {upstream.version}", flush=True)
    requirement = into / "requirement.txt"
    requirement.write_text(f"{upstream.name}=={upstream.version} --hash=sha256:{upstream.sha256}\n", encoding="utf-8")
    # Not --no-binary :all:, which would also compile the sdist's build requirements (cmake, ninja).
    options = ["--no-deps", "--no-binary", upstream.name, "--progress-bar", "off", "--disable-pip-version-check"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--dest",
        str(into),
        "--requirement",
        str(requirement),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    status = subprocess.run(command, env=environment, check=False).returncode
    sdist = next(into.glob("*.tar.gz"), None)
    if status != 0 or sdist is None:
        fail(
            f"pip could not download the sdist of {upstream.name} {upstream.version} (its messages are above)",
            f"without a network, set {VARIABLE} to the absolute path of that sdist (or of the tree unpacked from it)",
        )
    return sdist


def unpack(source: Path, into: Path) -> Path:
    """A private copy of an sdist or of a tree under `into`, without its .git, which the build would otherwise read."""
    if source.is_dir():
        return Path(shutil.copytree(source, into / "tree", ignore=shutil.ignore_patterns(*SKIPPED)))
    with tarfile.open(source) as tar:
        members = [member for member in tar if not SKIPPED & set(member.name.split("/"))]
        for member in members:
            check_member(member, source)
        if hasattr(tarfile, "data_filter"):
            tar.extractall(into, members, filter="data")
        else:
            tar.extractall(into, members)
    (tree,) = into.iterdir()
    return tree


def check_member(member: tarfile.TarInfo, sdist: Path) -> None:
    """An sdist holds plain files and folders below one folder; Pythons before 3.11.4 have no filter that checks it."""
    path = PurePosixPath(member.name)
    if not (member.isfile() or member.isdir()) or path.is_absolute() or ".." in path.parts or "\\" in member.name:
        fail(f"{sdist} holds an unsafe member, {member.name!r}", "use the sdist as the package index serves it")
