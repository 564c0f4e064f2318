"""Loads each file given with EdgeLlama and writes two tokens, in a process each:

    python load_gguf.py [--unchecked] FILE...

prints {file: [status, why]} as JSON. Status 0 is loaded and decoded, 1 refused with an error, 2 a Python exception, a
negative number the signal that killed the process. `why` is the last line that it wrote on its way out. A process may
take a gibibyte more than it has at its start, and some seconds. With --unchecked llama.cpp gets the files as they are.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO

import llama_cpp  # noqa: F401  # before the fork: children share it

from edge_speq import EdgeError, EdgeLlama, _native
from edge_speq.gguf import container
from edge_speq.gguf import model as gguf_model

MAX_BYTES = 1 << 30  # of address space beyond what the process has at its start
MAX_SECONDS = 20


def load(path: str) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MAX_BYTES, size + MAX_BYTES))
    signal.alarm(MAX_SECONDS)
    dice = sum(Path(path).name.encode())  # the same in every run
    slots = {"resident": "3/4"} if dice & 1 else {}
    try:
        llm = EdgeLlama(path, n_ctx=64, n_threads=1, n_batch=32, **slots)  # type: ignore[arg-type]
        llm.create_completion("The cat\n", max_tokens=2, temperature=dice >> 1 & 1)
        llm.close()
    except EdgeError as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 2
    return 0


def in_a_child(path: str, errors: IO[bytes]) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(errors.fileno(), 2)
        os._exit(load(path))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(paths: list[str]) -> None:
    os.environ["GGML_NO_BACKTRACE"] = "1"
    _native.load_backends()
    if paths[0] == "--unchecked":
        gguf_model.check_model = container.read
        del paths[0]
    statuses = {}
    for path in paths:
        with tempfile.TemporaryFile() as errors:
            status = in_a_child(path, errors)
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
        statuses[path] = [status, lines[-1] if lines else ""]
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(sys.argv[1:])
