"""Loads each file given with EdgeLlama, in a process each: python load_gguf.py FILE... prints {file: status} as JSON.

Status 0 is loaded, 1 refused with an error, 2 a Python exception (a chat template that jinja2 cannot parse is none),
a negative number the signal that killed the process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback

from jinja2 import TemplateSyntaxError

from edge_speq import EdgeError, EdgeLlama, _native

MAX_BYTES = 8 << 30  # of address space
MAX_SECONDS = 60


def load(path: str) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    signal.alarm(MAX_SECONDS)
    try:
        EdgeLlama(path, n_ctx=64, n_threads=1, n_batch=32).close()
    except (EdgeError, TemplateSyntaxError):  # llama_cpp.Llama does not catch the second one
        return 1
    except Exception:
        traceback.print_exc()
        return 2
    return 0


def main() -> None:
    _native.load_backends()
    statuses = {}
    for path in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            os._exit(load(path))
        statuses[path] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
