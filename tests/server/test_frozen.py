"""An application frozen by PyInstaller, with the hooks that come with the package: it runs without Python, and its
engine's process is itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("PyInstaller") is None, reason="needs PyInstaller"),
    pytest.mark.skipif(sys.platform == "win32", reason="kills with a POSIX signal"),
]

HOOKS = Path(__file__).resolve().parents[2] / "edge_speq" / "_pyinstaller"
# what it finds in a developer's environment takes minutes
NOT_MEANT = ("torch", "transformers", "matplotlib", "pytest", "hypothesis", "PIL")
APPLICATION = """
import os, signal, sys
from edge_speq import EdgeError, Session

ARGUMENTS = {"max_tokens": 8, "temperature": 0.0}
for isolation in ("none", "process"):
    with Session(sys.argv[1], isolation=isolation, draft=sys.argv[2], resident="1/2", n_ctx=256) as session:
        print(session("The old house", **ARGUMENTS)["choices"][0]["text"])
        assert session.stats().experts.hits
session = Session(sys.argv[1], isolation="process", n_ctx=256)
stream = session.stream("The old house", max_tokens=200, temperature=0.0)
next(stream)
os.kill(session._queue.engine._process.pid, signal.SIGABRT)
try:
    list(stream)
except EdgeError as error:
    print(error.message)
print(session("The old house", **ARGUMENTS)["choices"][0]["text"])
"""


def test_a_frozen_application(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    script = tmp_path / "application.py"
    script.write_text(APPLICATION, encoding="utf-8")
    freeze = ["--noconfirm", "--log-level=ERROR", f"--additional-hooks-dir={HOOKS}", str(script)]
    freeze += [f"--exclude-module={name}" for name in NOT_MEANT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run(
        [sys.executable, "-m", "PyInstaller", *freeze], cwd=tmp_path, env=environment, check=True, timeout=500
    )
    ended = subprocess.run(
        [str(tmp_path / "dist" / "application" / "application"), *map(str, bundled)],
        env={"PATH": os.defpath, "LANG": "C.UTF-8"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    first, second, death, last = ended.stdout.splitlines()
    assert first == second == last != ""
    assert death == "the engine's process was ended by SIGABRT"
