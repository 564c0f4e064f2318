"""edge-speq chat: a conversation with a model in the terminal, like `ollama run` and llama-cli."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edge_speq.cli import arguments, interrupt
from edge_speq.cli.lines import Lines
from edge_speq.cli.run import report
from edge_speq.errors import EdgeError

if TYPE_CHECKING:
    from edge_speq.cli.conversation import Conversation, Pieces
    from edge_speq.engine.llama import EdgeLlama

COMMAND = re.compile(r"/(\w*)(?:\s+(.*))?")  # does not match /usr/bin
HELP = '''\
/help          show this list
/exit          leave, like Ctrl-D and /bye
/clear         forget the conversation, keep the system message
/stats         show speed and expert events since the model was loaded
/regen         write another reply to the last message
/system TEXT   set the system message, without TEXT remove it
"""            start and end a message of several lines
Ctrl-C         stop a reply; at the prompt leave with exit code 130'''


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="A conversation with a model, in the terminal or with one message per line of a piped stdin.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_model(p)
    arguments.add_transfers(p)
    arguments.add_profile(p)
    p.add_argument("--system", metavar="TEXT", help="system message")
    arguments.add_sampling(p, n_predict=0)
    arguments.add_output(p, json="print one JSON object per reply")
    p.set_defaults(command=chat)


def chat(options: argparse.Namespace) -> int:
    from edge_speq.cli.conversation import Conversation

    arguments.with_demo_defaults(options)
    llm = arguments.load(options)
    try:
        if "tokenizer.chat_template" not in llm.metadata:
            say(f"note: the model has no chat template, {llm.chat_format} is used: replies may be poor")
        conversation = Conversation(llm, options.system, options.n_predict, options.temp, options.seed)
        ChatSession(llm, conversation, data=options.json).run()
    finally:
        llm.close()
    return 0


class ChatSession:
    """Reads messages and commands, and writes replies. With `data`, each reply is one JSON object."""

    def __init__(self, llm: EdgeLlama, conversation: Conversation, *, data: bool) -> None:
        self._llm = llm
        self._conversation = conversation
        self._data = data
        self._lines = Lines(data=data)
        self._n_forgotten = 0  # forgotten turns that were reported to the user

    def run(self) -> None:
        """Run until the end of stdin or /exit. Raises KeyboardInterrupt for Ctrl-C at the prompt of a terminal."""
        if self._lines.typed:
            say("/help lists the commands, Ctrl-D leaves")
        with contextlib.suppress(EOFError):
            while self._handle(*self._read()):
                pass

    def _read(self) -> tuple[str, bool]:
        if not self._lines.typed:
            return self._lines.message()
        with interrupt.handler(_raise):
            try:
                return self._lines.message()
            except (EOFError, KeyboardInterrupt):
                say("")  # the shell's prompt starts on a new line
                raise

    def _handle(self, text: str, quoted: bool) -> bool:
        """Answer a message or run a command. Return false for /exit."""
        command = None if quoted else COMMAND.fullmatch(text.strip())
        try:
            if command and command[1] in ("exit", "bye"):
                return False
            if command:
                self._do(command[1], (command[2] or "").strip())
            elif text.strip():
                self._answer(self._conversation.ask(text))
        except EdgeError as error:
            if not self._lines.typed:
                raise
            say(f"error: {error.message}" + f"\nhint: {error.hint}" * bool(error.hint))
        return True

    def _do(self, name: str, text: str) -> None:
        if name == "regen":
            self._answer(self._conversation.ask_again())
        elif name == "stats":
            say(report(self._llm.stats()).strip())
        elif name == "clear":
            self._conversation.clear()
            self._n_forgotten = 0
        elif name == "system":
            self._conversation.system = text or None
        elif name == "help":
            say(HELP)
        else:
            say(f"/{name} is not a command, /help lists them")

    def _answer(self, pieces: Pieces) -> None:
        reply = ChatReply(self._llm)
        with reply.stoppable() if self._lines.typed else contextlib.nullcontext():  # otherwise Ctrl-C ends the command
            for piece in reply.read(pieces):
                self._tell_forgotten()
                if not self._data:
                    print(piece, end="", flush=True)
        if self._data:
            self._print_object(reply.text)
        else:
            print(flush=True)

    def _tell_forgotten(self) -> None:
        if self._conversation.n_forgotten and not self._n_forgotten:
            say("note: the context is full, the oldest messages are forgotten from now on")
        self._n_forgotten = self._conversation.n_forgotten

    def _print_object(self, text: str) -> None:
        reply = {"role": "assistant", "content": text, "finish_reason": self._conversation.finish_reason}
        print(json.dumps(reply | {"stats": self._llm.stats().to_dict()}), flush=True)


class ChatReply:
    """A reply that is being generated; Ctrl-C stops it."""

    def __init__(self, llm: EdgeLlama) -> None:
        self.text = ""
        self._llm = llm
        self._stop = interrupt.Stop()
        self._cancelled = False

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        log = logging.getLogger("edge_speq.llama_cpp")
        log.addFilter(self._is_news)
        try:
            with interrupt.handler(self._stop, at_once=self._cancel_prefill):
                yield
        finally:
            log.removeFilter(self._is_news)

    def read(self, pieces: Pieces) -> Iterator[str]:
        """Yield pieces until the reply ends or is stopped."""
        try:
            with contextlib.closing(pieces):  # the history takes the text so far
                for piece in pieces:
                    self.text += piece
                    yield piece
                    if self._stop.requested:
                        return
        except EdgeError:
            if not self._cancelled:
                raise

    def _cancel_prefill(self) -> None:
        """Cancel a long prefill; called from another thread. A token is short, so its end is awaited."""
        if not self.text:
            self._cancelled = True
            self._llm.cancel()

    def _is_news(self, _: logging.LogRecord) -> bool:
        return not self._cancelled  # llama.cpp calls a cancelled graph an error


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _raise(*_: object) -> None:
    raise KeyboardInterrupt
