"""edge-speq serve as a user runs it: a process, its output, its signals, its exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_speq.system import install_hint

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

COMMAND = (sys.executable, "-m", "edge_speq", "serve", "-t", "1", "-c", "512")
LONG = b'{"prompt": "Once", "max_tokens": 500, "temperature": 0, "logit_bias": {"0": -100, "2": -100}, "stream": true}'


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A server that is not expected to run."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )


@contextlib.contextmanager
def started(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that is ready, and its url."""
    process = subprocess.Popen(
        [*COMMAND, "--json", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert set(ready) == {"url", "model"}
        yield process, ready["url"]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def end(process: subprocess.Popen[str], *signals: int) -> tuple[int, str]:
    """Exit code and stderr."""
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    rest, complaints = process.communicate(timeout=30)
    assert rest == ""  # stdout was one line
    assert "Traceback" not in complaints
    return process.returncode, complaints


def test_ready_is_one_line_and_sigterm_ends_well() -> None:
    with started("--alias", "small") as (process, url):
        assert json.load(urllib.request.urlopen(f"{url}/health"))["status"] == "ok"
        assert json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][0]["id"] == "small"
        code, text = end(process, signal.SIGTERM)
    assert code == 0
    assert text == f"listening on {url}, loading small\n"


def test_ctrl_c_ends_with_130() -> None:
    with started() as (process, _):
        assert end(process, signal.SIGINT)[0] == 130


def test_ctrl_c_while_loading_and_generating() -> None:
    process = subprocess.Popen([*COMMAND, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert re.match(r"listening on http://127\.0\.0\.1:\d+, loading tales-moe\n", process.stderr.readline())
    assert end(process, signal.SIGINT)[0] == 130
    with started() as (process, url):
        request = urllib.request.Request(f"{url}/v1/completions", LONG, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert answer.readline()
            begun = time.monotonic()
            code, _ = end(process, signal.SIGINT, signal.SIGINT)  # the second one does not wait
        assert code == 130
        assert time.monotonic() - begun < 5.0


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = serve("--port", str(port))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0].startswith(f"error: cannot listen on 127.0.0.1:{port}: ")
    assert len(done.stderr.splitlines()) == 2 and "--port" in done.stderr


def test_others_need_a_key(tmp_path: Path) -> None:
    done = serve("--host", "0.0.0.0", "--port", "0", EDGE_SPEQ_API_KEY="")
    assert done.returncode == 2
    done = serve("--host", "0.0.0.0", "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no API key is set" in done.stderr and "--api-key" in done.stderr
    (tmp_path / "key").write_text("from-a-file\n")
    for arguments, environment, key in (
        (("--api-key-file", str(tmp_path / "key")), {}, "from-a-file"),
        ((), {"EDGE_SPEQ_API_KEY": "from-outside"}, "from-outside"),
    ):
        with started("--host", "0.0.0.0", *arguments, **environment) as (_, url):
            port = url.rpartition(":")[2]
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/models", headers={"authorization": f"Bearer {key}"}
            )
            assert json.load(urllib.request.urlopen(request))["object"] == "list"
            with pytest.raises(urllib.error.HTTPError, match="401") as refused:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models")
            refused.value.close()


def test_arguments_that_cannot_be() -> None:
    for arguments, complaint in (
        (("--api-key", "a", "--api-key-file", "b"), "exclude each other"),
        (("--api-key-file", "/nowhere"), "cannot read /nowhere"),
        (("--port", "99999"), "is not a port"),
        (("--port", "0", "--chat-format", "nonsense"), "chat format 'nonsense' is not known"),
        (("--port", "0", "/no/model.gguf"), "/no/model.gguf"),
    ):
        done = serve(*arguments)
        assert done.returncode in (1, 2) and done.stdout == ""
        assert complaint in done.stderr and "Traceback" not in done.stderr


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError('No module', name='uvicorn')\n")
    done = serve(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 1
    assert done.stderr == f"error: the server needs uvicorn\nhint: {install_hint('serve')}\n"
