"""Commands are run share by share, and what an interrupted run has stored is not measured again."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import runner, store
from benchmarks.__main__ import main
from benchmarks.registry import Entry, entries
from benchmarks.runner import Failed, Runner


def entry(*files: str) -> Entry:
    return Entry("fake", "speed", "Fake", "Is it?", "here", files, "speed.report")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What the programs of an entry were called with; the second call fails once."""
    log, code = tmp_path / "calls", tmp_path / "program.py"
    code.write_text(
        "import json, sys\n"
        f"log = open({str(log)!r}, 'a+'); log.write(json.dumps(sys.argv[1:]) + '\\n'); log.seek(0)\n"
        "if len(log.readlines()) == 2: sys.exit(1)\n"
        "for i in range(2): print(json.dumps({'share': sys.argv[-1], 'row': i}))\n"
    )
    monkeypatch.setitem(runner.PROGRAMS, "edge-speq", [sys.executable, str(code)])
    lines = {"a.json": ["edge-speq bench -m tales-f16.gguf --resident 1/8,1/4 > a.json"]}
    monkeypatch.setattr(runner, "command_lines", lines.__getitem__)

    class Calls(list[Any]):
        def read(self) -> list[list[str]]:
            return [json.loads(line) for line in log.read_text().splitlines()]

    return Calls()


def test_shares_that_were_measured_are_kept(calls: Any, tmp_path: Path) -> None:
    model = tmp_path / "tales-f16.gguf"
    model.touch()
    made = Runner(tmp_path, tmp_path)
    with pytest.raises(Failed, match="exit code 1"):
        made.run(entry("a.json"))
    assert not (tmp_path / "a.json").exists() and (tmp_path / "a.json.part").exists()
    made.run(entry("a.json"))
    assert calls.read() == [["bench", "-m", str(model), "--resident", share] for share in ("1/8", "1/4", "1/4")]
    rows = json.loads((tmp_path / "a.json").read_text())
    assert rows == [{"share": share, "row": i} for share in ("1/8", "1/4") for i in range(2)]
    made.run(entry("a.json"))
    assert len(calls.read()) == 3  # it was stored
    assert not (tmp_path / "a.json.part").exists()


def test_models_are_made_before_they_are_used(calls: Any, tmp_path: Path) -> None:
    with pytest.raises(Failed):
        Runner(tmp_path, tmp_path).run(entry("a.json"))
    made, used = calls.read()
    assert made[:2] == ["convert", "quantize"] and made[3] == str(tmp_path / "tales-f16.gguf") == used[2]


def test_at_the_deadline_a_command_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "slow.py"
    code.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(runner, "command_lines", lambda _: [f"python {code} b.json"])
    started = time.monotonic()
    with pytest.raises(Failed, match="the same command continues"):
        Runner(tmp_path, tmp_path, started + 1).run(entry("b.json"))
    with pytest.raises(Failed, match="no time left"):
        Runner(tmp_path, tmp_path, started).run(entry("b.json"))
    assert time.monotonic() - started < 15


def test_cells_are_measured_once(tmp_path: Path) -> None:
    out, seen = tmp_path / "cells.json", list[str]()

    def cell(name: str, *, fails: bool = False) -> tuple[str, Any]:
        def measure() -> str:
            seen.append(name)
            if fails:
                raise KeyboardInterrupt
            return name.upper()

        return name, measure

    with pytest.raises(KeyboardInterrupt):
        store.measured(out, [cell("a"), cell("b", fails=True)], store.whole)
    store.measured(out, [cell("a"), cell("b")], store.whole)
    assert seen == ["a", "b", "b"] and json.loads(out.read_text()) == ["A", "B"]


def test_what_is_not_known_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(entries())
    assert main(["run", "readme_speed", "nobody"]) == 2
    assert "no entry 'nobody'" in capsys.readouterr().err
