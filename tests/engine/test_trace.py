from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.traces import EXPERTS, text

from edge_speq import EdgeLlama, trace
from edge_speq.bench.recorder import Recorder
from edge_speq.cli.main import main
from edge_speq.errors import EdgeError
from edge_speq.trace import Step, Writer, writer

META: dict[str, Any] = {
    "experts": dataclasses.asdict(EXPERTS),
    "k_max": 2,
    "prompts": [{"id": "a", "domain": "prose"}, {"id": "b", "domain": "code"}],
}


def written(path: Path, steps: list[Step]) -> Path:
    with Writer(path, META) as out:
        for step in steps:
            out.add(step)
    return path


def assert_equal(a: Step, b: Step) -> None:
    for field in dataclasses.fields(Step):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("gates", [False, True])
def test_what_is_read_is_what_was_written(tmp_path: Path, k: int, gates: bool) -> None:
    steps = text(1, 600, k=k, passages=2, gates=gates)  # three chunks
    for i, width in ((0, 64), (3, 2), (301, 7)):
        read = np.random.default_rng(i).integers(-1, EXPERTS.n_expert, (EXPERTS.n_blocks, width, EXPERTS.n_expert_used))
        steps[i] = dataclasses.replace(steps[i], read=read.astype(np.int32))
    found = trace.read(written(tmp_path / "t.npz", steps))
    assert found.experts == EXPERTS and found.k_max == 2
    assert len(found.steps) == len(steps) > 2 * writer.CHUNK
    for a, b in zip(found.steps, steps, strict=True):
        assert_equal(a, b)
    assert len(found.of_domain("prose")) + len(found.of_domain("code")) == len(steps)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]
    assert "routing.000002" in np.load(tmp_path / "t.npz").files


def test_memory_is_bounded_by_a_chunk(tmp_path: Path) -> None:
    steps = text(1, 50)
    with Writer(tmp_path / "t.npz", META) as out:
        for i in range(20 * writer.CHUNK):
            out.add(steps[i % len(steps)])
            assert len(out._steps) < writer.CHUNK


def test_an_interrupted_recording_keeps_its_steps(tmp_path: Path) -> None:
    steps, path = text(1, 300), tmp_path / "t.npz"

    def interrupted() -> None:
        with Writer(path, META) as out:
            for step in steps[:290]:
                out.add(step)
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    found = trace.read(path)
    assert len(found.steps) == 290 and found.meta["complete"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_without_a_step_there_is_no_file(tmp_path: Path) -> None:
    with Writer(tmp_path / "t.npz", META):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no special files here")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(EdgeError, match="not a file that could be replaced") as caught:
        Writer(pipe, META)
    assert caught.value.usage and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="no"):
        Writer(tmp_path / "no" / "t.npz", META)


def test_a_cut_trace_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "t.npz", text(1, 300)).read_bytes()
    for share in (0, 0.1, 0.5, 0.9, 0.99):
        path = tmp_path / "cut.npz"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(EdgeError, match=r"cut\.npz"):
            trace.read(path)


def test_damaged_members_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t.npz", text(1, 300))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def refused(match: str, **changed: bytes | None) -> None:
        bad = tmp_path / "bad.npz"
        with zipfile.ZipFile(bad, "w") as archive:
            for name, data in (members | {f"{k.replace('_', '.')}.npy": v for k, v in changed.items()}).items():
                if data is not None:
                    archive.writestr(name, data)
        with pytest.raises(EdgeError, match=match):
            trace.read(bad)

    def array(values: Any, dtype: Any) -> bytes:
        made = tmp_path / "array.npy"
        np.save(made, np.asarray(values, dtype=dtype), allow_pickle=True)
        return made.read_bytes()

    def meta(**changed: Any) -> bytes:
        original = json.loads(np.load(path)["meta"].tobytes())
        return array(np.frombuffer(json.dumps(original | changed).encode(), np.uint8), np.uint8)

    refused("version 9", meta=meta(version=9))
    read = np.zeros((3, EXPERTS.n_blocks, EXPERTS.n_expert_used))
    refused("of prompts", n_read_000000=array([2] + [0] * 255, np.int16), read_000000=array(read, np.int16))
    read[1] = EXPERTS.n_expert
    refused("of prompts", n_read_000000=array([3] + [0] * 255, np.int16), read_000000=array(read, np.int16))
    refused("not a trace", meta=None)
    refused("not a trace", meta=array([1, 2], np.uint8))
    refused("not a trace", meta=meta(experts={"n_blocks": 1}))
    refused("not whole", routing_000001=members["routing.000001.npy"], meta=meta(n_steps=5))
    refused("not a trace", routing_000000=None)
    refused("not a trace", routing_000000=array([{"a": 1}], object))  # pickled
    refused("not a trace", routing_000000=array(np.full((900, 4, 2), 99), np.uint8))
    refused("not a trace", width_000000=array([7], np.int16))


def test_what_is_no_file_is_usage(tmp_path: Path) -> None:
    with pytest.raises(EdgeError) as caught:
        trace.read(tmp_path / "none.npz")
    assert caught.value.usage and caught.value.hint


# --- recording -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(bundled: tuple[Path, Path], twin: Path) -> tuple[list[Step], Recorder, list[str]]:
    options: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "draft_tokens": 2}
    model = Recorder(str(bundled[0]), draft=str(twin), policy="all", lookahead=4, gates=True, **options)
    steps: list[Step] = []
    model.sink = steps.append
    with contextlib.closing(model):
        texts = []
        for i, prompt in enumerate(("Once upon a time", "def main():")):
            model.begin_passage(i)
            texts.append(model.create_completion(prompt, max_tokens=24, temperature=0.0)["choices"][0]["text"])
        model.write()
    return steps, model, texts


def test_recording_changes_no_text_and_misses_no_step(recorded: Any, bundled: tuple[Path, Path], twin: Path) -> None:
    steps, model, texts = recorded
    with contextlib.closing(
        EdgeLlama(str(bundled[0]), draft=str(twin), policy="all", draft_tokens=2, n_ctx=256, n_threads=1)
    ) as plain:
        for prompt, expected in zip(("Once upon a time", "def main():"), texts, strict=True):
            assert plain.create_completion(prompt, max_tokens=24, temperature=0.0)["choices"][0]["text"] == expected
        counted = plain.stats().speculation
    verified = [step for step in steps if not step.is_prompt]
    assert len(verified) == counted.steps
    assert sum(step.n_drafted for step in verified) == counted.drafted == model.stats().speculation.drafted
    assert sum(step.n_accepted for step in verified) == counted.accepted
    assert {step.passage for step in steps} == {0, 1}


def test_a_step_has_its_routing_foresight_gates_and_times(recorded: Any) -> None:
    steps, model, _ = recorded
    verified = [step for step in steps if not step.is_prompt]
    agree = []
    for step in verified:
        assert step.routing.shape == (6, step.n_drafted + 1, 4) == step.gates.shape
        assert len(step.tokens) == step.width and step.step_ms > 0 and step.draft_ms > 0
        assert step.foreseen is not None and step.foreseen.shape[1] == step.n_shown + 4
        assert step.shown is not None and step.shown.shape[1] == step.n_shown >= step.n_drafted - 1
        gates = step.gates.astype(float)
        assert (np.diff(gates, axis=2) <= 0).all() and (gates > 0).all() and (gates.sum(axis=2) <= 1.01).all()
        agree.append(
            np.mean([len(set(a) & set(b)) / 4 for a, b in zip(step.foreseen[:, 0], step.routing[:, 0], strict=True)])
        )
    assert np.mean(agree) > 0.7  # the twin at 2 bits; a draft out of step would share an eighth
    assert model.meta()["is_twin"] is True


def test_a_prompts_routing_is_what_its_tokens_ask_for(bundled: tuple[Path, Path]) -> None:
    """Of its last 64 tokens, and of the last block, whose other rows llama.cpp drops, of the last one."""
    prompt = " ".join(["The keeper of the lighthouse told a story of the sea and of a storm in winter."] * 6)
    seen = []
    for width in (1, 512):
        steps: list[Step] = []
        model = Recorder(str(bundled[0]), policy="lru", resident=1.0, n_ctx=512, n_threads=1, n_batch=width)
        model.sink = steps.append
        with contextlib.closing(model):
            model.begin_passage(0)
            model.create_completion(prompt, max_tokens=2, temperature=0.0)
            model.write()
        seen.append(steps)
    single, whole = seen
    assert [step.read is None for step in whole] == [False] + [True] * (len(whole) - 1)
    read = whole[0].read
    assert read is not None and read.shape == (6, 64, 4)
    assert (read[5, :63] == -1).all() and (read[5, 63] >= 0).all() and (read[:5] >= 0).all()
    asked = np.concatenate([step.routing for step in single if step.is_prompt], axis=1)[:, -64:]
    agree = [len(set(a) & set(b)) / 4 for a, b in zip(read[:5].reshape(-1, 4), asked[:5].reshape(-1, 4), strict=True)]
    assert np.mean(agree) > 0.97  # wide kernels round otherwise


def test_a_dense_draft_shows_no_routing(bundled: tuple[Path, Path]) -> None:
    model = Recorder(str(bundled[0]), draft=str(bundled[1]), policy="all", draft_tokens=1, n_ctx=256, n_threads=1)
    steps: list[Step] = []
    model.sink = steps.append
    with contextlib.closing(model):
        model.create_completion("One", max_tokens=6)
        model.write()
        assert model.meta()["is_twin"] is False
    assert steps and all(step.foreseen is None for step in steps)


# --- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts_last", [False, True])
def test_the_command_records_own_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bundled: Any, prompts_last: bool
) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "t.npz"
    prompts.write_text('{"prompt": "One day", "domain": "tale"}\n', encoding="utf-8")
    options = ["--draft", str(bundled[1]), "-o", str(out), "-n", "8", "-c", "256"]
    arguments = [*options[:2], str(prompts), *options[2:]] if prompts_last else [str(prompts), *options]
    assert main(["trace", str(bundled[0]), *arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = trace.read(out)
    assert said["steps"] == len(found.steps) and said["complete"] is True
    assert found.domains == ["tale"] and found.meta["n_passages"] == 1
    assert sum(step.n_accepted + 1 for step in found.steps) >= 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "/nowhere/at/all.npz"], "cannot write"),
        (["-o", "x.npz", "--texts", "0"], "count"),
        (["no.gguf", "-o", "x.npz"], "no.gguf"),
        (["no.gguf", "none.jsonl", "-o", "x.npz"], "none.jsonl"),
        (["no.gguf", "-o", "x.npz", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trace", *arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and said in captured.err
    assert not list(tmp_path.iterdir())


def test_a_dense_model_has_nothing_to_record(bundled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(bundled[1]), "-o", str(tmp_path / "t.npz")]) == 1
    assert "no routed experts" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to another process")
def test_ctrl_c_leaves_a_whole_trace(tmp_path: Path, bundled: Any) -> None:
    out = tmp_path / "t.npz"
    command = [sys.executable, "-m", "edge_speq", "trace", str(bundled[0]), "-o", str(out), "-n", "900", "--texts", "8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said.decode()
    assert b"Traceback" not in said and b"interrupted" in said
    found = trace.read(out)
    assert found.meta["complete"] is False and len(found.steps) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]
