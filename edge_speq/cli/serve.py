"""edge-speq serve: an HTTP server with OpenAI's API, and a page that shows the resident experts."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_speq.cli import arguments, interrupt
from edge_speq.errors import EdgeError
from edge_speq.system import install_hint

if TYPE_CHECKING:
    from edge_speq.server.serving import Server
    from edge_speq.server.settings import ServerSettings
    from edge_speq.session.session import Session

HOST, PORT, QUEUE = "127.0.0.1", 8080, 32
KEY_VARIABLE = "EDGE_SPEQ_API_KEY"


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="An HTTP server with OpenAI's API, and a page at / that shows which experts are resident. "
        "Without a MODEL: the bundled one.",
    )
    arguments.add_model(p)
    arguments.add_transfers(p)
    arguments.add_profile(p)
    p.add_argument("--host", metavar="H", default=HOST, help="address to listen on (%(default)s)")
    p.add_argument("--port", metavar="P", type=int, default=PORT, help="port, 0 for any free one (%(default)s)")
    p.add_argument("--api-key", metavar="KEY", help=f"key that clients must send; {KEY_VARIABLE} hides it from ps")
    p.add_argument("--api-key-file", metavar="FILE", help="file with the key")
    p.add_argument("--alias", metavar="NAME", help="name of the model for clients (default: the file's name)")
    p.add_argument("--chat-format", metavar="F", help="chat format of llama_cpp, such as chatml-function-calling")
    p.add_argument("--queue", metavar="N", type=int, default=QUEUE, help="requests that may wait (%(default)s)")
    arguments.add_output(p, json="print one line of JSON when the model is loaded: url and model")
    p.set_defaults(command=serve)


def serve(options: argparse.Namespace) -> int:
    arguments.with_demo_defaults(options)
    settings = _settings(options)
    try:
        from edge_speq.server import listener as listeners
        from edge_speq.server.serving import Server
    except ModuleNotFoundError as error:
        raise EdgeError(f"the server needs {error.name}", install_hint("serve")) from error
    with contextlib.closing(listeners.listen(settings)) as listener:
        url = listeners.url(listener, settings.host)
        _say(f"listening on {url}, loading {settings.name}")
        session = _open(options, settings)
        server = Server(session, settings, lambda: _ready(options, settings, url))
        # llama.cpp logs a cancelled graph as an error
        logging.getLogger("edge_speq.llama_cpp").addFilter(lambda _: options.verbose or not session.is_cancelling)
        with _signals(server) as received:
            server.run(listener)
    return interrupt.EXIT_CODE if received == [signal.SIGINT] else 0


def _settings(options: argparse.Namespace) -> ServerSettings:
    from edge_speq.server.settings import ServerSettings

    name = options.alias or Path(options.model).stem
    key = _api_key(options)
    return ServerSettings(name, options.host, options.port, key, n_waiting=options.queue)


def _api_key(options: argparse.Namespace) -> str | None:
    if options.api_key_file is None:
        return options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE)
    if options.api_key is not None:
        raise EdgeError("--api-key and --api-key-file exclude each other", "give one of them", usage=True)
    try:
        return Path(options.api_key_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeError(f"cannot read {options.api_key_file}: {error}", "it must be a text file", usage=True) from error


def _open(options: argparse.Namespace, settings: ServerSettings) -> Session:
    """Return a session that starts to load."""
    from edge_speq.server.service import open_session

    given = arguments.edge_options(options) | arguments.llama_options(options)
    if options.chat_format is not None:
        given["chat_format"] = _known_format(options.chat_format)
    return open_session(options.model, settings, **given)


def _known_format(name: str) -> str:
    from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerRegistry

    known = sorted(LlamaChatCompletionHandlerRegistry()._chat_handlers)
    if name not in known:
        raise EdgeError(f"chat format {name!r} is not known", f"choose one of {', '.join(known)}", usage=True)
    return name


def _ready(options: argparse.Namespace, settings: ServerSettings, url: str) -> None:
    if options.json:
        print(json.dumps({"url": url, "model": settings.name}), flush=True)
    else:
        _say(f"ready: {url} (Ctrl-C ends the server)")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals(server: Server) -> Iterator[list[int]]:
    """While the block runs, let Ctrl-C and SIGTERM stop the server; the second signal exits immediately.

    Yield a list that receives the number of the first signal.
    """
    received: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if received:
            os._exit(interrupt.EXIT_CODE if number == signal.SIGINT else 0)
        received.append(number)
        server.stop()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with interrupt.handler(stop):
            yield received
    finally:
        signal.signal(signal.SIGTERM, before)
