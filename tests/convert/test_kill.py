"""Conversions that are killed and disks that fill up: the output is whole or absent, the source untouched."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import tiny_checkpoint

from edge_speq.convert.huggingface import hf
from edge_speq.convert.quantization import draft, quantize
from edge_speq.errors import EdgeError
from edge_speq.gguf import atomic

posix = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL, no RLIMIT_FSIZE there")
SUFFIX = atomic.SUFFIX


def digest(path: Path) -> str:
    """Of a file, or of the files of a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


@dataclass(frozen=True)
class Conversion:
    """A command that writes `out`, what it makes when nothing stops it, and how long that takes."""

    arguments: tuple[str, ...]
    source: Path
    out: Path
    whole: str
    seconds: float

    @classmethod
    def of(cls, source: Path, out: Path, *arguments: str) -> Conversion:
        started = time.monotonic()
        done = subprocess.run(command(arguments), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        whole = digest(out)
        out.unlink()
        return cls(arguments, source, out, whole, time.monotonic() - started)


def command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "edge_speq", "convert", *arguments]


def conversions(bundled: tuple[Path, Path], folder: Path, checkpoint: Path | None = None) -> list[Conversion]:
    source = Path(shutil.copy(bundled[0], folder / "source.gguf"))
    out = [folder / name / "out.gguf" for name in ("quantized", "experts", "converted")]
    for path in out:
        path.parent.mkdir()
    made = [
        Conversion.of(source, out[0], "quantize", str(source), str(out[0]), "--type", "q8_0"),
        Conversion.of(
            source, out[1], "draft", str(source), "-o", str(out[1]), "--type", "q3_k", "--experts-only", "--no-measure"
        ),
    ]
    if checkpoint is not None:
        arguments = ("hf", str(checkpoint), "-o", str(out[2]), "--outtype", "q4_k_m")
        made.append(Conversion.of(checkpoint, out[2], *arguments))
    return made


def kill(conversion: Conversion, after: float, force: bool) -> float | None:
    """Starts the conversion and kills it; returns how long it took where it was faster. With force, an older file is
    there."""
    out = conversion.out
    if force:
        out.write_bytes(b"older")
    elif out.exists():
        out.unlink()
    before, started, faster = digest(conversion.source), time.monotonic(), None
    arguments = [*command(conversion.arguments), *(["--force"] if force else [])]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.wait(after) == 0
            faster = time.monotonic() - started
        except subprocess.TimeoutExpired:
            process.kill()
    assert digest(conversion.source) == before
    if out.exists():
        assert (force and not faster and out.read_bytes() == b"older") or digest(out) == conversion.whole
    else:
        assert not force
    others = [path.name for path in out.parent.iterdir() if path != out]
    assert all(name.endswith(SUFFIX) for name in others)
    return faster


def finish(conversion: Conversion) -> None:
    """The next run is as if nothing had happened, and removes what the killed ones left."""
    subprocess.run([*command(conversion.arguments), "--force"], check=True, capture_output=True)
    assert digest(conversion.out) == conversion.whole
    assert list(conversion.out.parent.iterdir()) == [conversion.out]


def kill_often(made: list[Conversion], times: int) -> int:
    """So many kills of conversions that still ran; returns how many left a file half written."""
    chance, killed, half_written = random.Random(11), 0, 0
    seconds = [conversion.seconds for conversion in made]
    while killed < times:
        i = killed % len(made)
        faster = kill(made[i], chance.uniform(0.2, 1.0) * seconds[i], force=chance.random() < 0.5)
        if faster is None:
            killed += 1
            half_written += len(list(made[i].out.parent.glob(f".*{SUFFIX}"))) > 0
        else:
            seconds[i] = min(seconds[i], faster)
    for conversion in made:
        finish(conversion)
    return half_written


@posix
@pytest.mark.long
def test_killed_conversions_leave_whole_files_or_none(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    kill_often(conversions(bundled, tmp_path), 6)


@posix
@pytest.mark.slow
def test_200_kills_leave_whole_files_or_none(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint: Path | None = None
    with contextlib.suppress(EdgeError, pytest.skip.Exception):
        hf.converter_folder()
        checkpoint = tiny_checkpoint.write_checkpoint(tmp_path / "checkpoint")
    assert kill_often(conversions(bundled, tmp_path, checkpoint), 200) > 50


@posix
def test_the_converters_own_process_ends_too(tmp_path: Path) -> None:
    try:
        hf.converter_folder()
    except EdgeError as error:
        pytest.skip(f"{error.message}: it comes with the wheel of native/")
    if not Path("/proc").is_dir():
        pytest.skip("looks for processes in /proc")
    checkpoint = tiny_checkpoint.write_checkpoint(tmp_path / "checkpoint")
    arguments = ("hf", str(checkpoint), "-o", str(tmp_path / "out.gguf"), "--outtype", "q8_0")
    with subprocess.Popen(command(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: processes(tmp_path) - {process.pid})
        process.kill()
    wait_for(lambda: not processes(tmp_path))
    assert not (tmp_path / "out.gguf").exists()


def processes(named: Path) -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(named).encode() in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@posix
@pytest.mark.parametrize("limit", [1 << 20, 9 << 20])
@pytest.mark.parametrize("verb", ["quantize", "draft"])
def test_a_file_that_may_not_grow_is_one_error_and_no_file(
    verb: str, limit: int, bundled: tuple[Path, Path], tmp_path: Path
) -> None:
    """RLIMIT_FSIZE fails a write in the middle, whoever writes: here llama.cpp, and our own code."""
    import resource

    out, before = tmp_path / "out.gguf", digest(bundled[0])
    if verb == "quantize":
        arguments = ("quantize", str(bundled[0]), str(out), "--type", "q8_0")
    else:
        arguments = ("draft", str(bundled[0]), "-o", str(out), "--type", "q2_k", "--experts-only", "--no-measure")
    limits = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(command(arguments), capture_output=True, text=True, check=False, preexec_fn=limits)
    assert done.returncode == 1, done.stderr
    assert "out.gguf was not written: " in done.stderr and "hint: free some space" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert list(tmp_path.iterdir()) == [] and digest(bundled[0]) == before


@posix
def test_a_converter_whose_file_may_not_grow(tmp_path: Path) -> None:
    import resource

    try:
        hf.converter_folder()
    except EdgeError as error:
        pytest.skip(f"{error.message}: it comes with the wheel of native/")
    checkpoint = tiny_checkpoint.write_checkpoint(tmp_path / "checkpoint")
    limits = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    arguments = ("hf", str(checkpoint), "-o", str(tmp_path / "out.gguf"), "--outtype", "f16")
    done = subprocess.run(command(arguments), capture_output=True, text=True, check=False, preexec_fn=limits)
    assert done.returncode == 1 and "out.gguf was not written: " in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if sys.platform != "linux" or mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_is_refused_before_and_survived_during(
    small_disk: Path, bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "out.gguf"
    done = subprocess.run(
        command(("quantize", str(bundled[0]), str(out), "--type", "q8_0")), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "bytes, but only" in done.stderr and list(small_disk.iterdir()) == []
    monkeypatch.setattr(atomic, "require_free", lambda *_: None)  # as if others took the space meanwhile
    recipe = draft.recipe(bundled[0], "q2_k")
    for convert in (
        lambda: quantize.quantize(bundled[0], out, quantize.recipe("q8_0")),
        lambda: draft.make(bundled[0], out, recipe, experts_only=True),
    ):
        with pytest.raises(EdgeError, match="was not written: the disk is full"):
            convert()
        assert list(small_disk.iterdir()) == []
    quantize.quantize(bundled[1], out, quantize.recipe("q8_0"))
    assert list(small_disk.iterdir()) == [out]


@posix
def test_ctrl_c_removes_what_is_half_written(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ("quantize", str(bundled[0]), str(tmp_path / "out.gguf"), "--type", "q4_k_m")
    with subprocess.Popen(command(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        wait_for(lambda: any(path.name.endswith(SUFFIX) for path in tmp_path.iterdir()))
        process.send_signal(2)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == b""
    assert list(tmp_path.iterdir()) == []
