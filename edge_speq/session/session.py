"""Session: a model for any number of threads and tasks, in this process or in a child process."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_speq.core import Plan, Stats
from edge_speq.errors import EdgeError
from edge_speq.planning.load_request import LoadRequest, split_options
from edge_speq.session.handles import LoadStream, Reply, Stream, TextStream
from edge_speq.session.request_queue import RequestQueue, SessionEngine
from edge_speq.session.requests import CAPACITY, PATIENCE, ModelCall, ModelFacts, RequestCounts, SessionRequest
from edge_speq.units import require_choice

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge_speq.engine.step_records import OnStep
    from edge_speq.planning.load_options import LoadOptions

ISOLATIONS = ("none", "process")
EXPLICIT = ("isolation", "wait", "capacity", "patience", "max_waiting", "on_step", "n_gpu_layers", "verbose")


class Session:
    """A loaded model that serves one request after the other, in the order of arrival.

    Every method may be called from any thread. Some block: create_completion, create_chat_completion, call, resize,
    stats, residency and close. With asyncio use stream, iterate, submit and `await`; use asyncio.to_thread for the
    blocking methods.

    Args:
        model: a GGUF file.
        isolation: "none", or "process": the engine runs in a child process. If that dies (native abort, signal, out of
            memory), the running request gets an EdgeError, and the next one starts another process. Arguments and
            results are then pickled, and a Budget cannot be shared.
        wait: return when the model is loaded; otherwise return immediately, and `loading` reports the progress.
        capacity: items that the reader of a stream may be behind before the engine pauses; None: never pause.
        patience: seconds that the engine pauses for a reader, before the stream ends with an EdgeError.
        max_waiting: requests that may wait while one is served; one more raises QueueFull. None: any number.
        on_step, n_gpu_layers, verbose, options: as in EdgeLlama. Unknown or invalid options raise EdgeError here, also
            with wait=False.

    Raises EdgeError. A session is closed when it is dropped and when the interpreter exits.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        isolation: str = "none",
        wait: bool = True,
        capacity: int | None = CAPACITY,
        patience: float = PATIENCE,
        max_waiting: int | None = None,
        on_step: OnStep | None = None,
        n_gpu_layers: int = -1,
        verbose: bool = False,
        **options: Unpack[LoadOptions],
    ) -> None:
        require_choice("isolation", isolation, ISOLATIONS)
        ours, _ = split_options(options, EXPLICIT)
        LoadRequest(str(model), **ours)
        hooks = {"on_step": on_step, "n_gpu_layers": n_gpu_layers, "verbose": verbose}
        self._capacity, self._patience = capacity, patience
        loading = SessionRequest(None)
        self._queue = RequestQueue(_engine(isolation, Path(model), {**options, **hooks}), loading, max_waiting)
        self.loading = LoadStream(loading)
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
        """Do as llama_cpp.Llama.create_completion: return a completion, or with stream=True a Stream of chunks."""
        return self._create("create_completion", prompt, stream, arguments)

    __call__ = create_completion

    def create_chat_completion(self, messages: list[Any], *, stream: bool = False, **arguments: Any) -> Any:
        """Do as llama_cpp.Llama.create_chat_completion: return a completion, or with stream=True a Stream of chunks."""
        return self._create("create_chat_completion", messages, stream, arguments)

    def _create(self, name: str, prompt: Any, stream: bool, arguments: dict[str, Any]) -> Any:
        if stream:
            return self.iterate(name, prompt, **arguments, stream=True)
        return self.call(name, prompt, **arguments)

    def call(self, function: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return submit(...).result()."""
        with self.submit(function, *args, **kwargs) as reply:
            return reply.result()

    # --- for threads and asyncio ---------------------------------------------------------------------------------

    def stream(self, prompt: str | list[Any], **arguments: Any) -> TextStream:
        """Return the pieces of a completion's text, for `for` and `async for`. A list of messages is a chat."""
        is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
        name = "create_chat_completion" if is_chat else "create_completion"
        return TextStream(self._submit(ModelCall(name, (prompt,), arguments | {"stream": True}, streams=True)))

    def submit(self, function: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Reply[Any]:
        """Queue a call of the model and return a Reply: `.result()` or `await` it.

        The call is a method of EdgeLlama by its name ("create_completion", "tokenize", "embed", ...), or a function
        whose first argument is the model.
        """
        if kwargs.get("stream"):
            raise EdgeError("submit waits for one result", "use stream(), or create_completion", usage=True)
        return Reply(self._submit(ModelCall(function, args, kwargs)))

    def iterate(self, function: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Stream[Any]:
        """Queue a call that returns an iterator, as `submit` does, and return a Stream of its items."""
        return Stream(self._submit(ModelCall(function, args, kwargs, streams=True)))

    def _submit(self, call: ModelCall) -> SessionRequest:
        request = SessionRequest(call, self._capacity, self._patience)
        self._queue.add(request)
        return request

    # --- state ---------------------------------------------------------------------------------------

    @property
    def n_waiting(self) -> int:
        """Return the number of waiting requests."""
        return self.workload()[1]

    def workload(self) -> tuple[int, int]:
        """Return how many requests are served (0 or 1; loading the model is one) and how many wait."""
        return self._queue.workload()

    def counts(self) -> RequestCounts:
        """Return how many requests have finished, were cancelled, refused, or failed. A snapshot."""
        return self._queue.counts()

    @property
    def is_cancelling(self) -> bool:
        """Return true if the running request has been cancelled and its graph is about to end."""
        return self._queue.is_cancelling()

    @property
    def facts(self) -> ModelFacts:
        """Return the properties of the model. Raises EdgeError while it is loading."""
        if (facts := self.loading.facts) is None:
            raise EdgeError("the model is still loading", "read `loading`, or open the session with wait=True")
        return facts

    def stats(self) -> Stats:
        """Return the statistics since the model was loaded (with isolation, by the current process).

        Does not wait in the queue. Raises EdgeError if no model is loaded.
        """
        return self._queue.engine.stats()

    def residency(self) -> list[str] | None:
        """Return for each block one digit per expert: 0 absent, 1 loading, 2 resident, 3 in use. None without slots.

        Does not wait in the queue. Raises EdgeError if no model is loaded.
        """
        return self._queue.engine.residency()

    # --- resizing and closing -------------------------------------------------------------------------

    def resize(self, *, resident: float | str | None = None, vram_budget: int | str | None = None) -> Plan:
        """Do as EdgeLlama.resize, between two steps of the request that runs."""
        return self._queue.engine.resize(resident=resident, vram_budget=vram_budget)

    def drain(self, grace: float) -> None:
        """Start to close: end waiting requests and a load now, the running request after `grace` seconds.

        Does not wait. Requests that are ended or arrive later get a SessionClosed error. Call `close` to wait for the
        engine.
        """
        self._queue.end(grace)

    def close(self) -> None:
        """Free the model, and return when the engine has stopped. Unfinished requests end with an EdgeError."""
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
