"""Atomic output files: written to a temporary file in the target's folder, then renamed over the target.

A killed process leaves its temporary file `.NAME.<random>.edge-speq-partial` behind. The next process that writes the
same target removes it. A file in use is not removed: on POSIX its writer holds a lock, on Windows the system refuses.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from edge_speq.errors import EdgeError

SUFFIX = ".edge-speq-partial"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no space, no quota, over RLIMIT_FSIZE or the file system's limit
SPARE = 1 << 20  # bytes of file system overhead per file
PROBE = 1 << 20

_open: set[Path] = set()  # temporary files of this process, read by `discard_all`


@contextlib.contextmanager
def output(
    path: str | Path, force: bool = False, *, sources: Iterable[str | Path] = (), expected_bytes: int | None = None
) -> Iterator[Path]:
    """Yield an empty temporary file; rename it to `path` if the block succeeds, remove it if the block raises.

    Raises EdgeError if the target exists (unless `force`), is one of `sources` or cannot be a file. Raises EdgeError
    also if the disk has no room for `expected_bytes` or becomes full.
    """
    target = check(path, force, sources=sources)
    with scratch(target, expected_bytes) as temporary:
        yield temporary
        if not force and os.path.lexists(target):  # another process created it meanwhile
            raise _exists(target)
        try:
            _sync(temporary)
            os.replace(temporary, target)
            _sync_folder(target.parent)
        except OSError as error:
            raise failure(target, error) from error


@contextlib.contextmanager
def scratch(target: Path, expected_bytes: int | None = None) -> Iterator[Path]:
    """Yield an empty temporary file in the target's folder, and remove it after the block.

    Raises EdgeError if the disk is or becomes full.
    """
    try:
        _remove_stale(target)
        if expected_bytes is not None:
            require_free(target, expected_bytes)
        temporary, lock = _create(target)
    except OSError as error:
        raise failure(target, error) from error
    try:
        yield temporary
    except OSError as error:
        if error.errno in FULL:
            raise failure(target, error) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _open.discard(temporary)


def check(
    path: str | Path, force: bool = False, *, sources: Iterable[str | Path] = (), expected_bytes: int | None = None
) -> Path:
    """Run the checks of `output` without writing, as `--dry-run` does. Return the target with links resolved."""
    target = Path(os.path.realpath(path))
    for source in sources:
        if target.exists() and Path(source).exists() and os.path.samefile(target, source):
            raise EdgeError(f"{path} is the source itself", "give the output another name", usage=True)
    if not target.parent.is_dir():
        raise EdgeError(f"there is no folder {target.parent}", "make it first", usage=True)
    if target.exists() and not target.is_file():
        raise EdgeError(f"{path} is not a file that could be replaced", "give the output another name", usage=True)
    if os.path.lexists(target) and not force:
        raise _exists(target)
    if expected_bytes is not None:
        require_free(target, expected_bytes)
    return target


def require_free(target: Path, n_bytes: int) -> None:
    """Raise EdgeError if the target's disk has less than n_bytes (and SPARE) free."""
    free = shutil.disk_usage(target.parent).free
    if n_bytes + SPARE > free:
        message = f"{target} takes {n_bytes} bytes, but only {free} are free in {target.parent}"
        raise EdgeError(message, "free some space, or write to another disk")


def require_space(temporary: Path, target: str | Path) -> None:
    """Raise EdgeError if the disk is full. Call it after native code failed to write without an error code."""
    try:
        with temporary.open("ab") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise failure(Path(target), error) from error


def discard_all() -> None:
    """Remove the temporary files of this process, before it exits without unwinding."""
    for temporary in list(_open):
        with contextlib.suppress(OSError):
            temporary.unlink()


def failure(target: Path, error: OSError) -> EdgeError:
    if error.errno in FULL:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return EdgeError(f"{target} was not written: {why}", "free some space, or write to another disk")
    return EdgeError(f"{target} was not written: {error.strerror or error}", "write to another folder")


def _exists(target: Path) -> EdgeError:
    return EdgeError(f"{target} exists already", "give --force to replace it, or another name", usage=True)


def _create(target: Path) -> tuple[Path, int | None]:
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}{SUFFIX}"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    _open.add(temporary)
    if sys.platform == "win32":
        os.close(descriptor)  # Windows cannot rename an open file
        return temporary, None
    import fcntl

    with contextlib.suppress(OSError):  # without locks on this file system, _remove_stale treats the file as stale
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return temporary, descriptor


def _remove_stale(target: Path) -> None:
    pattern = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{8}" + re.escape(SUFFIX))
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name) and path not in _open:
            with contextlib.suppress(OSError):
                _remove_unless_locked(path)


def _remove_unless_locked(path: Path) -> None:
    if sys.platform == "win32":
        path.unlink()
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises OSError while the writer runs
        path.unlink()
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename durable. Windows cannot, and some network file systems refuse."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
