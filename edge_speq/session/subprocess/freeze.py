"""The engine of a session in a process of its own: `Session(model, isolation="process")`.

`wire` is what the two processes speak, `process` the child as the parent sees it, `remote` the session's engine on top
of that, and `child` the other side.
"""

from __future__ import annotations

import json
import subprocess
import sys

FLAG = "--edge-speq-engine"  # the first argument of a frozen application that is to be the child


def command() -> list[str]:
    """What starts the child. The application's own main module is not imported there."""
    if getattr(sys, "frozen", False):
        return [sys.executable, FLAG]
    code = "import json,sys; sys.path[:] = json.loads(sys.argv[1]); "
    code += "from edge_speq.session.subprocess import child; child.main()"
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", code, json.dumps(sys.path)]


def freeze_support() -> None:
    """Call it first in a frozen application: where the process is to be the child, it does not return. PyInstaller does
    it by itself with the hook in edge_speq/_pyinstaller; without freezing it does nothing."""
    if getattr(sys, "frozen", False) and sys.argv[1:2] == [FLAG]:
        from edge_speq.session.subprocess import child

        child.main()
