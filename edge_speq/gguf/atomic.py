"""Files that are whole or absent: written beside the target under another name, then renamed over it.

A process that is killed leaves its temporary file behind, `.NAME.<random>.edge-speq-partial`. The next one that
writes the same target removes it; on POSIX a lock that dies with its process tells it from one in use, on Windows an
open file cannot be removed anyway.
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
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no space, no quota, over RLIMIT_FSIZE or what a file system can hold
SPARE = 1 << 20  # bytes that file systems take besides a file's own
PROBE = 1 << 20

_open: set[Path] = set()  # temporary files of this process, for `discard_all`


@contextlib.contextmanager
def output(
    path: str | Path, force: bool = False, *, sources: Iterable[str | Path] = (), expected_bytes: int | None = None
) -> Iterator[Path]:
    """Yields the path of an empty temporary file, which becomes `path` when the block ends well and is removed when it
    does not. Raises EdgeError when the target exists (unless `force`), is one of `sources` or is no place for a file,
    and when `expected_bytes` do not fit on the disk or the disk gets full."""
    target = check(path, force, sources=sources)
    with scratch(target, expected_bytes) as temporary:
        yield temporary
        if not force and os.path.lexists(target):  # it was made meanwhile
            raise _exists(target)
        try:
            _sync(temporary)
            os.replace(temporary, target)
            _sync_folder(target.parent)
        except OSError as error:
            raise failure(target, error) from error


@contextlib.contextmanager
def scratch(target: Path, expected_bytes: int | None = None) -> Iterator[Path]:
    """Yields an empty temporary file beside target, which is gone after the block. Raises EdgeError when the disk is
    or gets full."""
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
    """What `output` checks before it writes, for `--dry-run` too. Returns where the file will be, links followed."""
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
    """Raises EdgeError when the disk of target has no room for so many bytes."""
    free = shutil.disk_usage(target.parent).free
    if n_bytes + SPARE > free:
        message = f"{target} takes {n_bytes} bytes, but only {free} are free in {target.parent}"
        raise EdgeError(message, "free some space, or write to another disk")


def require_space(temporary: Path, target: str | Path) -> None:
    """After native code failed to write without saying why: raises EdgeError when the disk takes no more bytes."""
    try:
        with temporary.open("ab") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise failure(Path(target), error) from error


def discard_all() -> None:
    """Removes the temporary files of this process, which is about to end without unwinding."""
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
        os.close(descriptor)  # an open file can be neither truncated by others nor renamed
        return temporary, None
    import fcntl

    with contextlib.suppress(OSError):  # a file system without locks: the file counts as stale, see _remove_stale
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
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
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
    """Makes the rename durable. Windows has no way to, and some network file systems refuse."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
