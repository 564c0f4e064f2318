"""PyInstaller hooks for applications that use edge_speq.

PyInstaller finds this folder through the entry point `pyinstaller40: hook-dirs` (PyInstaller's manual, "Providing
PyInstaller Hooks with your Package").
"""

from __future__ import annotations

from pathlib import Path


def hook_folders() -> list[str]:
    return [str(Path(__file__).parent)]
