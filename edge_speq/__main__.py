"""The process of the edge-speq command: Ctrl-C is taken care of before anything is imported that takes time."""

from __future__ import annotations

import sys

from edge_speq.cli import interrupt


def main() -> int:
    interrupt.leave_at_once()
    from edge_speq.cli import main as cli

    code = cli.main()
    interrupt.never_again()
    return code


if __name__ == "__main__":
    sys.exit(main())
