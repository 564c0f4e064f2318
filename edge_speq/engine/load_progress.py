"""Report the loading progress of a model and its draft as one fraction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp

from edge_speq.errors import EdgeError

if TYPE_CHECKING:
    from edge_speq.planning.survey import ResolvedRequest

Progress = Callable[[float], "bool | None"]
"""Called with the fraction that is loaded, from 0 to 1. Returning False ends the load."""


class LoadProgress:
    """Calls `progress` while llama.cpp reads the model and the draft.

    If `progress` raises, the load ends. The exception is stored for raise_error(), since ctypes would only print it.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._error: BaseException | None = None
        self._ended = False
        self._callbacks: list[Any] = []  # must outlive the load

    def attach(self, request: ResolvedRequest, model_params: Any, draft_params: Any) -> None:
        """Install the callbacks in llama.cpp's parameters."""
        share = _share_of(request.model, request.draft)
        for params, start, end in ((model_params, 0.0, share), (draft_params, share, 1.0)):
            params.progress_callback = self._callback(start, end)

    def _callback(self, start: float, end: float) -> Any:
        def report(fraction: float, _user: object) -> bool:
            try:
                self._ended = self._progress(start + (end - start) * fraction) is False
            except BaseException as error:  # KeyboardInterrupt too
                self._error, self._ended = error, True
            return not self._ended

        self._callbacks.append(llama_cpp.llama_progress_callback(report))
        return self._callbacks[-1]

    def raise_error(self, model_path: str) -> None:
        """Raise the callback's exception, or EdgeError if the callback ended the load. Otherwise do nothing."""
        if self._error is not None:
            raise self._error
        if self._ended:
            raise EdgeError(f"loading {model_path} was cancelled")


def _share_of(model: Path, draft: Path | None) -> float:
    """Return the model's share of the bytes of both files; a missing file is reported elsewhere."""
    if draft is None:
        return 1.0
    with contextlib.suppress(OSError):
        size = model.stat().st_size
        return size / (size + draft.stat().st_size)
    return 1.0
