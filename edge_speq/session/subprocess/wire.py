"""Messages between parent and child: a length, and a pickle of (kind, number, pickled content).

The content is pickled separately, so that the request is known even if the content cannot be unpickled. Pickle is safe
here, because both ends are the same installation and the parent starts the child.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
import threading
from typing import Any, BinaryIO

from edge_speq.errors import EdgeError

MAGIC = b"edge_speq engine 1\n"  # before the child's first message; anything earlier was printed by a library
LENGTH = struct.Struct("<Q")

Message = tuple[str, int, bytes]


class Channel:
    """A pair of pipes. `send` is safe from any thread; only one thread may `receive`."""

    def __init__(self, reading: BinaryIO, writing: BinaryIO) -> None:
        self._reading, self._writing = reading, writing
        self._lock = threading.Lock()

    def greet(self) -> None:
        with self._lock:
            self._writing.write(MAGIC)
            self._writing.flush()

    def await_greeting(self) -> bytes:
        """Read up to the greeting and return any output before it. Raises EOFError if the child exits first."""
        text = b""
        while not text.endswith(MAGIC):
            line = self._reading.readline()
            if not line:
                raise EOFError(text.decode(errors="replace"))
            text += line
        return text.removesuffix(MAGIC)

    def send(self, kind: str, number: int, content: Any = None) -> None:
        """Send a message. Raises EdgeError if the content cannot be pickled, OSError if the other end has exited."""
        data = pickle.dumps((kind, number, dumps(content)), pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._writing.write(LENGTH.pack(len(data)) + data)
            self._writing.flush()

    def receive(self) -> Message:
        """Return the next message. Raises EOFError if the other end has exited."""
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        message: Message = pickle.loads(self._exactly(length))
        return message

    def _exactly(self, n: int) -> bytes:
        data = self._reading.read(n)
        if len(data) < n:
            raise EOFError
        return data

    def close(self) -> None:
        for end in (self._reading, self._writing):
            with contextlib.suppress(OSError):  # unsent data are dropped
                end.close()


def dumps(content: Any) -> bytes:
    try:
        return pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # user objects may raise anything
        raise EdgeError(
            f"this cannot be sent to another process: {error}",
            "with isolation, arguments and results are pickled: give functions of importable modules, and plain data",
            usage=True,
        ) from error


def loads(content: bytes) -> Any:
    try:
        return pickle.loads(content)
    except Exception as error:
        raise EdgeError(
            f"a message of the other process cannot be unpickled: {error}",
            "with isolation, functions and classes must be in modules that the child can import, not in __main__",
        ) from error


def portable(error: BaseException) -> BaseException:
    """Return the error itself if it survives pickling, otherwise an EdgeError with its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error)
        return error
    except Exception:
        if isinstance(error, EdgeError):
            return EdgeError(error.message, error.hint, usage=error.usage)
        return EdgeError(f"{type(error).__name__}: {error}")
