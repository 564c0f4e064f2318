"""Session: a model for any number of threads and tasks, in this process or in one of its own."""

from __future__ import annotations

import asyncio
import atexit
import collections
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from edge_speq.core import Plan, Stats
from edge_speq.errors import EdgeError
from edge_speq.session.requests import CAPACITY, PATIENCE, ModelCall, Reply, SessionRequest, Sink, Stream, TextStream
from edge_speq.units import require_choice

ISOLATIONS = ("none", "process")
GRACE = 5.0  # seconds that closing waits for a process before it kills it


class SessionEngine(Protocol):
    """Loads, runs and closes on the session's thread; the rest may come from any."""

    def load(self, sink: Sink) -> Any: ...
    def run(self, sink: Sink) -> Any: ...
    def close(self) -> None: ...
    def cancel(self) -> None: ...
    def kill(self) -> None: ...
    def stats(self) -> Stats: ...
    def resize(self, **bounds: Any) -> Plan: ...


class Session:
    """A loaded model that serves one request after the other, in the order in which they came.

    Every method may be called from any thread. Those that wait (create_completion, create_chat_completion, call,
    resize, stats, close) are for threads; with asyncio use stream, submit and `await`, and asyncio.to_thread for the
    rest. Args, besides those of EdgeLlama:
        isolation: "none", or "process": the engine runs in a child process. When that dies (a native abort, a signal,
            no memory left) the request that runs gets an EdgeError, and the next one starts another process. Arguments
            and results are then pickled, and a Budget cannot be shared.
        wait: returns when the model is loaded; otherwise at once, and `loading` says how far it is.
        capacity: items that the reader of a stream may be behind before the engine pauses.
        patience: seconds that it pauses, holding up the others, before the stream is ended with an EdgeError.

    Raises EdgeError. A session that is dropped, or alive when the interpreter ends, is closed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        isolation: str = "none",
        wait: bool = True,
        capacity: int = CAPACITY,
        patience: float = PATIENCE,
        **options: Any,
    ) -> None:
        require_choice("isolation", isolation, ISOLATIONS)
        self._capacity, self._patience = capacity, patience
        loading = SessionRequest(None)
        self._queue = _Queue(_engine(isolation, Path(model), options), loading)
        self.loading: Stream[float] = Stream(loading)  # the fraction that is loaded, at most once a percent
        weakref.finalize(self, self._queue.end).atexit = False
        self._queue.start()
        if wait:
            try:
                self.loading.result()
            except BaseException:
                self.close()
                raise

    # --- for threads -----------------------------------------------------------------------------------

    def create_completion(self, prompt: str | list[int], *, stream: bool = False, **arguments: Any) -> Any:
        """As llama_cpp.Llama.create_completion: a completion, or with stream=True a Stream of chunks."""
        return self._create("create_completion", prompt, stream, arguments)

    __call__ = create_completion

    def create_chat_completion(self, messages: list[Any], *, stream: bool = False, **arguments: Any) -> Any:
        """As llama_cpp.Llama.create_chat_completion: a completion, or with stream=True a Stream of chunks."""
        return self._create("create_chat_completion", messages, stream, arguments)

    def _create(self, name: str, prompt: Any, stream: bool, arguments: dict[str, Any]) -> Any:
        if stream:
            return Stream(self._submit(ModelCall(name, (prompt,), arguments | {"stream": True}, streams=True)))
        return self.call(name, prompt, **arguments)

    def call(self, function: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """submit(...).result()"""
        with self.submit(function, *args, **kwargs) as reply:
            return reply.result()

    # --- for everybody ---------------------------------------------------------------------------------

    def stream(self, prompt: str | list[Any], **arguments: Any) -> TextStream:
        """The pieces of a completion's text, for `for` and `async for`: of a chat when prompt is a list of messages."""
        is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        name = "create_chat_completion" if is_chat else "create_completion"
        return TextStream(self._submit(ModelCall(name, (prompt,), arguments | {"stream": True}, streams=True)))

    def submit(self, function: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Reply[Any]:
        """Has something done with the model in its turn: a method of EdgeLlama by its name ("create_completion",
        "tokenize", "embed", ...), or a function whose first argument is the model. `.result()` or `await` it."""
        if kwargs.get("stream"):
            raise EdgeError("submit waits for one result", "use stream(), or create_completion", usage=True)
        return Reply(self._submit(ModelCall(function, args, kwargs)))

    def _submit(self, call: ModelCall) -> SessionRequest:
        request = SessionRequest(call, self._capacity, self._patience)
        self._queue.add(request)
        return request

    @property
    def n_waiting(self) -> int:
        """Requests that have not had their turn."""
        return self._queue.n_waiting()

    def stats(self) -> Stats:
        """What happened since the model was loaded (with isolation, in the process that runs now). Does not wait for
        its turn. Raises EdgeError while there is no loaded model."""
        return self._queue.engine.stats()

    def resize(self, *, resident: float | str | None = None, vram_budget: int | str | None = None) -> Plan:
        """EdgeLlama.resize: between two steps of the request that runs."""
        return self._queue.engine.resize(resident=resident, vram_budget=vram_budget)

    def close(self) -> None:
        """Frees the model. Requests that run or wait end with an EdgeError; returns when the engine has stopped."""
        self._queue.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Session:
        try:
            async for _ in self.loading:
                pass
        except BaseException:
            await asyncio.to_thread(self.close)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)


def _engine(isolation: str, model: Path, options: dict[str, Any]) -> SessionEngine:
    if isolation == "process":
        from edge_speq.session.subprocess.remote import RemoteEngine

        return RemoteEngine(model, options)
    from edge_speq.session.in_process import (
        InProcess,  # imports llama_cpp, which an isolated session leaves to its child
    )

    return InProcess(str(model), options)


class _Queue:
    """The requests of a session and the thread that works them off. It does not know the session, which can thus be
    collected."""

    def __init__(self, engine: SessionEngine, loading: SessionRequest) -> None:
        self.engine = engine
        self._changed = threading.Condition()  # guards what follows; reentrant, as Request's
        self._waiting: collections.deque[SessionRequest] = collections.deque()
        self._current: SessionRequest | None = None
        self._refusal: EdgeError | None = None  # set once the session is closed, or failed to load
        self._thread = threading.Thread(target=self._work, name="edge_speq session", daemon=True)
        self._pid = os.getpid()
        self.add(loading)

    def start(self) -> None:
        atexit.register(self.close)  # a daemon thread in native code would outlive the libraries' own end
        self._thread.start()

    def add(self, request: SessionRequest) -> None:
        if os.getpid() != self._pid:
            raise EdgeError("a session does not survive a fork", "open it in the process that uses it")
        if self._thread is threading.current_thread():
            raise EdgeError("a callback of this session asks it for something: it would wait for itself")
        request.interrupt = self._interrupt
        with self._changed:
            if self._refusal is not None:
                raise _again(self._refusal)
            self._waiting.append(request)
            self._changed.notify_all()

    def n_waiting(self) -> int:
        with self._changed:
            return sum(not request.is_over for request in self._waiting)

    def _interrupt(self, request: SessionRequest, timeout: float) -> None:
        if self._changed.acquire(timeout=timeout):
            try:
                if self._current is request:  # and stays it meanwhile: the next one is not to be cancelled
                    self.engine.cancel()
            finally:
                self._changed.release()

    # --- the session's thread --------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (request := self._next()) is not None:
                self._serve(request)
                del request  # and with it what it was asked with, while the thread waits for the next one
        finally:
            self.engine.close()
            atexit.unregister(self.close)

    def _next(self) -> SessionRequest | None:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._refusal is not None)
                if self._refusal is not None:
                    return None
                request = self._waiting.popleft()
                if not request.is_over or request.is_load:
                    self._current = request
                    return request

    def _serve(self, request: SessionRequest) -> None:
        try:
            request.end(self.engine.load(request) if request.is_load else self.engine.run(request))
        except BaseException as error:
            request.fail(error)
            if request.is_load:
                message, hint = (error.message, error.hint) if isinstance(error, EdgeError) else (str(error), "")
                self._refuse(EdgeError(f"the model was not loaded: {message}", hint))
        finally:
            with self._changed:
                self._current = None

    # --- the end ---------------------------------------------------------------------------------------

    def _refuse(self, refusal: EdgeError) -> None:
        """Ends what waits and what runs. No request is taken any more."""
        with self._changed:
            self._refusal = self._refusal or refusal
            left = [*self._waiting, *([self._current] if self._current is not None else [])]
            self._waiting.clear()
            self._changed.notify_all()
        for request in left:
            request.cancel(_again(refusal))

    def end(self) -> None:
        """Has the thread close the engine, without waiting for it."""
        if os.getpid() == self._pid:  # else a fork's copy: thread and engine are not in this process
            self._refuse(EdgeError("the session is closed", "open another one"))

    def close(self) -> None:
        self.end()
        if os.getpid() != self._pid or self._thread is threading.current_thread():
            return  # closed by a callback of its own, the thread ends afterwards
        self._thread.join(GRACE)
        if self._thread.is_alive():
            self.engine.kill()
            self._thread.join()


def _again(error: EdgeError) -> EdgeError:
    """A copy, since every raise adds its own traceback."""
    return EdgeError(error.message, error.hint, usage=error.usage)
