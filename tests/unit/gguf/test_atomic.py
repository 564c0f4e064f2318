"""edge_speq.gguf.atomic: outputs are whole or absent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_speq.errors import EdgeError
from edge_speq.gguf import atomic

KILLED = """
import os, sys
from edge_speq.gguf import atomic
with atomic.output(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""


def write(out: Path, data: bytes, error: BaseException | None = None, **options: Any) -> None:
    with atomic.output(out, **options) as temporary:
        temporary.write_bytes(data)
        if error is not None:
            raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_block_that_ends_well_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    with atomic.output(tmp_path / "out.gguf", expected_bytes=5) as temporary:
        assert temporary.parent == tmp_path and temporary.stat().st_size == 0
        temporary.write_bytes(b"whole")
        assert names(tmp_path) == [temporary.name]
    assert (tmp_path / "out.gguf").read_bytes() == b"whole" and names(tmp_path) == ["out.gguf"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), EdgeError("x"), SystemExit(3)])
def test_an_exception_leaves_nothing_and_stays_what_it_is(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        write(tmp_path / "out.gguf", b"half", error)
    assert names(tmp_path) == []


def test_an_existing_file_stays_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    with pytest.raises(EdgeError, match="exists already") as refused, atomic.output(out):
        raise AssertionError
    assert refused.value.usage and out.read_bytes() == b"old"
    with pytest.raises(ValueError, match="x"):
        write(out, b"half", ValueError("x"), force=True)
    assert out.read_bytes() == b"old" and names(tmp_path) == ["out.gguf"]
    write(out, b"new", force=True)
    assert out.read_bytes() == b"new"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def race() -> None:
        with atomic.output(tmp_path / "out"):
            (tmp_path / "out").write_bytes(b"theirs")

    with pytest.raises(EdgeError, match="exists already"):
        race()
    assert (tmp_path / "out").read_bytes() == b"theirs" and names(tmp_path) == ["out"]


def test_the_source_is_never_the_target(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"precious")
    (tmp_path / "link.gguf").symlink_to(source)
    os.link(source, tmp_path / "hard.gguf")
    for name in ("model.gguf", "link.gguf", "hard.gguf", "./model.gguf"):
        with pytest.raises(EdgeError, match="is the source itself"):
            atomic.check(tmp_path / name, force=True, sources=[source])


def test_places_where_no_file_can_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="there is no folder"):
        atomic.check(tmp_path / "absent" / "out")
    with pytest.raises(EdgeError, match="not a file that could be replaced"):
        atomic.check(tmp_path, force=True)
    with pytest.raises(EdgeError, match="was not written"), atomic.output(tmp_path / ("x" * 254)):
        raise AssertionError


def test_too_little_space_is_known_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"takes \d+ bytes, but only \d+ are free"):
        atomic.check(tmp_path / "out", expected_bytes=1 << 60)
    with pytest.raises(EdgeError, match="are free"), atomic.output(tmp_path / "out", expected_bytes=1 << 60):
        raise AssertionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", sorted(atomic.FULL))
def test_a_full_disk_is_one_clear_error(number: int, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="was not written") as failed:
        write(tmp_path / "out", b"half", OSError(number, os.strerror(number)))
    assert failed.value.hint.startswith("free some space") and names(tmp_path) == []


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="bad") as failed, atomic.output(tmp_path / "out"):
        raise OSError(errno.EIO, "bad")
    assert failed.value.errno == errno.EIO and names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_what_a_killed_run_left_is_gone_with_the_next_one(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False).returncode == -9
    (left,) = names(tmp_path)
    assert left.startswith(".out.gguf.") and left.endswith(atomic.SUFFIX)
    (tmp_path / ".other.gguf.00000000.edge-speq-partial").write_bytes(b"another's")
    with atomic.output(out) as temporary:
        temporary.write_bytes(b"whole")
    assert names(tmp_path) == [".other.gguf.00000000.edge-speq-partial", "out.gguf"]


def test_a_temporary_file_in_use_is_not_stale(tmp_path: Path) -> None:
    with atomic.scratch(tmp_path / "out") as first, atomic.scratch(tmp_path / "out") as second:
        assert first.exists() and second.exists()
        code = "import sys; from edge_speq.gguf import atomic\nwith atomic.output(sys.argv[1]): pass"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True)
        assert first.exists() and second.exists()
    assert names(tmp_path) == ["out"]


def test_leaving_at_once_removes_what_is_open(tmp_path: Path) -> None:
    with atomic.scratch(tmp_path / "out") as temporary:
        atomic.discard_all()
        assert not temporary.exists() and names(tmp_path) == []
