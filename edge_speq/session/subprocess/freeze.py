"""How the child is started, also in a frozen application.

`wire` defines the messages, `process` is the parent's handle of the child, `remote` the session's engine on top of it,
and `child` the other side.
"""

from __future__ import annotations

import json
import subprocess
import sys

FLAG = "--edge-speq-engine"  # the first argument of a frozen application that is to be the child


def command() -> list[str]:
    """Return the command that starts the child, which does not import the application's main module."""
    if getattr(sys, "frozen", False):
        return [sys.executable, FLAG]
    code = "import json,sys; sys.path[:] = json.loads(sys.argv[1]); "
    code += "from edge_speq.session.subprocess import child; child.main()"
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", code, json.dumps(sys.path)]


def freeze_support() -> None:
    """Become the child if this process was started as one; then it does not return.

    Call it first in a frozen application. PyInstaller does so with the hook in edge_speq/_pyinstaller. Without freezing
    it does nothing.
    """
    if getattr(sys, "frozen", False) and sys.argv[1:2] == [FLAG]:
        from edge_speq.session.subprocess import child

        child.main()
