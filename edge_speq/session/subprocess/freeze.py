"""Command that starts the child process, also in a frozen application.

Related modules: `wire` defines the messages, `process` is the parent's handle of the child, `remote` the session's
engine that uses it, and `child` the child's side.
"""

from __future__ import annotations

import json
import subprocess
import sys

FLAG = "--edge-speq-engine"  # first argument of a frozen application that runs as the child


def command() -> list[str]:
    """Return the command that starts the child, which does not import the application's main module."""
    if getattr(sys, "frozen", False):
        return [sys.executable, FLAG]
    code = "import json,sys; sys.path[:] = json.loads(sys.argv[1]); "
    code += "from edge_speq.session.subprocess import child; child.main()"
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", code, json.dumps(sys.path)]


def freeze_support() -> None:
    """Run the child, and do not return, if this process was started as the child of a frozen application.

    Call it first in a frozen application; with PyInstaller the hook in edge_speq/_pyinstaller does. It does nothing in
    an application that is not frozen.
    """
    if getattr(sys, "frozen", False) and sys.argv[1:2] == [FLAG]:
        from edge_speq.session.subprocess import child

        child.main()
