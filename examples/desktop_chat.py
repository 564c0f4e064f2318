"""A chat window on top of edge_speq.Session; docs/guide/embedding.md explains it.

    python examples/desktop_chat.py                                   # the bundled models
    python examples/desktop_chat.py model.gguf --draft draft.gguf --resident 1/4 --isolation process

Nothing slow runs on the window's thread. Each reply has its own thread, and one more thread reads the counters, changes
the budget and closes the session. Needs PySide6: pip install '.[desktop]' in a checkout of edge_speq.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from edge_speq import EdgeError, Session, Stats
from edge_speq.gguf.bundled import DRAFT, MODEL, path
from edge_speq.session.subprocess.freeze import freeze_support

try:
    from PySide6 import QtWidgets
    from PySide6.QtCore import QObject, Qt, QTimer, Signal
    from PySide6.QtGui import QCloseEvent, QTextCursor
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}\nhint: pip install '.[desktop]' in a checkout of edge_speq")

SHARES = ("1/8", "1/4", "1/2", "3/4", "1")
POLL_MS = 400  # between two readings of the counters


class Messenger(QObject):  # type: ignore[misc]  # PySide6 is not installed where types are checked
    """Signals from any thread; the window receives them on its own thread."""

    progressed = Signal(float)
    loaded = Signal()
    piece = Signal(str)
    ended = Signal(str)  # "stop", "length", "stopped", or an error's text
    measured = Signal(object)  # Stats
    resized = Signal(str)
    failed = Signal(str)
    closed = Signal()


class Talk:
    """The conversation and its threads. It touches no widget."""

    def __init__(self, session: Session, messenger: Messenger, max_tokens: int) -> None:
        self._session, self._messenger, self._max_tokens = session, messenger, max_tokens
        self._messages: list[dict[str, str]] = []
        self._stream: Any = None
        self._threads: list[threading.Thread] = []
        self._aside = ThreadPoolExecutor(1, "aside")
        self._reading: Future[None] | None = None
        self._is_closing = False
        self._run(self._load)

    def _run(self, target: Any, *args: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _load(self) -> None:
        try:
            for fraction in self._session.loading:
                self._messenger.progressed.emit(fraction)
            self._messenger.loaded.emit()
        except EdgeError as error:
            self._messenger.failed.emit(f"not loaded: {described(error)}")

    def cancel_load(self) -> None:
        self._session.loading.cancel()

    def ask(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        self._stream = self._open()
        self._run(self._read, self._stream)

    def _open(self) -> Any:
        return self._session.stream(list(self._messages), max_tokens=self._max_tokens)

    def _read(self, stream: Any) -> None:
        pieces: list[str] = []
        try:
            outcome = self._collect(stream, pieces)
        except Exception as error:  # a callback or a template may raise anything, and the window must show it
            outcome = described(error)
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
        self._messenger.ended.emit(outcome)

    def _collect(self, stream: Any, pieces: list[str]) -> str:
        while True:
            try:
                with stream:
                    for piece in stream:
                        pieces.append(piece)
                        self._messenger.piece.emit(piece)
                return stream.finish_reason or "stop"
            except ValueError as error:
                if "exceed context window" not in str(error) or len(self._messages) < 3:
                    raise
                del self._messages[:2]  # forget the oldest question and reply
                stream = self._stream = self._open()
            except EdgeError as error:
                if error.message == "cancelled":
                    return "stopped"
                raise

    def stop(self) -> None:
        if self._stream is not None:
            self._stream.cancel()

    def measure(self) -> None:
        if not self._is_closing and (self._reading is None or self._reading.done()):
            self._reading = self._aside.submit(self._measure)

    def _measure(self) -> None:
        with contextlib.suppress(EdgeError):  # no model is loaded at the moment
            self._messenger.measured.emit(self._session.stats())

    def resize(self, share: str) -> None:
        self._aside.submit(self._resize, share)

    def _resize(self, share: str) -> None:
        try:
            self._messenger.resized.emit(self._session.resize(resident=share).reason)
        except EdgeError as error:
            self._messenger.resized.emit(described(error))

    def close(self) -> None:
        self._is_closing = True
        self._aside.submit(self._close)
        self._aside.shutdown(wait=False)

    def _close(self) -> None:
        self._session.close()
        for thread in self._threads:
            thread.join()
        self._messenger.closed.emit()


def described(error: Exception) -> str:
    return f"{error.message}. {error.hint}" if isinstance(error, EdgeError) and error.hint else str(error)


class Figures(QtWidgets.QGroupBox):  # type: ignore[misc]
    """Expert counters, acceptance of draft tokens, speed and memory."""

    def __init__(self) -> None:
        super().__init__("Experts")
        form = QtWidgets.QFormLayout(self)
        names = ("hits", "misses", "hit rate", "acceptance", "speed", "memory")
        self.labels = {name: QtWidgets.QLabel("–") for name in names}
        for name, label in self.labels.items():
            label.setObjectName(name)
            form.addRow(name, label)

    def show_stats(self, stats: Stats) -> None:
        experts, speculation = stats.experts, stats.speculation
        texts = {
            "hits": "not observed" if experts.hits is None else f"{experts.hits:,}",
            "misses": "not observed" if experts.misses is None else f"{experts.misses:,}",
            "hit rate": "–" if experts.hit_rate is None else f"{100 * experts.hit_rate:.1f} %",
            "acceptance": f"{100 * speculation.acceptance:.1f} %" if speculation.drafted else "–",
            "speed": f"{stats.timing.tok_per_s:.1f} tok/s" if stats.timing.n_decoded else "–",
            "memory": f"{stats.used_bytes / 2**20:.1f} MiB",
        }
        for name, text in texts.items():
            self.labels[name].setText(text)


class Window(QtWidgets.QMainWindow):  # type: ignore[misc]
    """The conversation on the left, budget and figures on the right."""

    def __init__(self, session: Session, title: str, share: str | None, max_tokens: int) -> None:
        super().__init__()
        self.setWindowTitle(f"{title} – edge_speq")
        self.resize(900, 560)
        self.outcome = ""  # of the last reply
        self._is_closing = self._is_closed = False
        self._build(share)
        self.messenger = Messenger()
        self._connect_messenger()
        self.talk = Talk(session, self.messenger, max_tokens)
        self._connect_widgets()
        self._timer = QTimer(self)
        self._timer.timeout.connect(self.talk.measure)
        self._timer.start(POLL_MS)

    def _build(self, share: str | None) -> None:
        self.transcript = QtWidgets.QPlainTextEdit(readOnly=True)
        self.entry = QtWidgets.QLineEdit(placeholderText="A message", enabled=False)
        self.send, self.stop, self.apply = (
            QtWidgets.QPushButton(text, enabled=False) for text in ("Send", "Stop", "Apply")
        )
        self.progress, self.cancel = QtWidgets.QProgressBar(), QtWidgets.QPushButton("Cancel")
        self.shares = QtWidgets.QComboBox()
        self.shares.addItems(SHARES)
        self.shares.setCurrentText(share if share in SHARES else "1")
        self.figures, self.note = Figures(), QtWidgets.QLabel("loading", wordWrap=True)
        budget = QtWidgets.QGroupBox("Share of the experts in slots")
        budget.setLayout(row(self.shares, self.apply))
        left, right, whole = QtWidgets.QVBoxLayout(), QtWidgets.QVBoxLayout(), QtWidgets.QHBoxLayout()
        left.addLayout(row(self.progress, self.cancel))
        left.addWidget(self.transcript)
        left.addLayout(row(self.entry, self.send, self.stop))
        left.addWidget(self.note)
        right.addWidget(budget)
        right.addWidget(self.figures)
        right.addStretch()
        whole.addLayout(left, 3)
        whole.addLayout(right, 1)
        central = QtWidgets.QWidget()
        central.setLayout(whole)
        self.setCentralWidget(central)

    def _connect_messenger(self) -> None:
        self.messenger.progressed.connect(self._on_progress)  # a lambda would run on the sender's thread
        self.messenger.loaded.connect(self._on_loaded)
        self.messenger.failed.connect(self._on_failed)
        self.messenger.piece.connect(self._append)
        self.messenger.ended.connect(self._on_ended)
        self.messenger.measured.connect(self.figures.show_stats)
        self.messenger.resized.connect(self._on_resized)
        self.messenger.closed.connect(self._on_closed)

    def _connect_widgets(self) -> None:
        self.entry.returnPressed.connect(self._ask)
        self.send.clicked.connect(self._ask)
        self.stop.clicked.connect(self.talk.stop)
        self.cancel.clicked.connect(self.talk.cancel_load)
        self.apply.clicked.connect(self._resize)

    def _on_progress(self, fraction: float) -> None:
        self.progress.setValue(int(100 * fraction))

    def _on_loaded(self) -> None:
        self.progress.hide()
        self.cancel.hide()
        self.apply.setEnabled(True)
        self._ready("ready")

    def _on_failed(self, text: str) -> None:
        self.progress.hide()
        self.cancel.hide()
        self.outcome = text
        self.note.setText(text)

    def _ready(self, note: str) -> None:
        for widget, on in ((self.entry, True), (self.send, True), (self.stop, False)):
            widget.setEnabled(on and not self._is_closing)
        self.entry.setFocus(Qt.FocusReason.OtherFocusReason)
        self.note.setText(note)

    def _ask(self) -> None:
        text = self.entry.text().strip()
        if not text or not self.send.isEnabled():
            return
        self.entry.clear()
        for widget, on in ((self.entry, False), (self.send, False), (self.stop, True)):
            widget.setEnabled(on)
        self.outcome = ""
        self.note.setText("writing")
        self._append(("\n\n" if self.transcript.toPlainText() else "") + f"> {text}\n\n")
        self.talk.ask(text)

    def _append(self, text: str) -> None:
        self.transcript.moveCursor(QTextCursor.MoveOperation.End)
        self.transcript.insertPlainText(text)
        self.transcript.ensureCursorVisible()

    def _on_ended(self, outcome: str) -> None:
        self.outcome = outcome
        self.talk.measure()
        self._ready({"stop": "ready", "length": "ready: the reply reached its limit"}.get(outcome, outcome))

    def _resize(self) -> None:
        self.apply.setEnabled(False)
        self.talk.resize(self.shares.currentText())

    def _on_resized(self, text: str) -> None:
        self.apply.setEnabled(True)
        self.note.setText(text)
        self.talk.measure()

    def closeEvent(self, event: QCloseEvent) -> None:
        """Keep the window until the engine has stopped, which takes as long as the running step."""
        event.setAccepted(self._is_closed)
        if not self._is_closed and not self._is_closing:
            self._is_closing = True
            self._timer.stop()
            self.centralWidget().setEnabled(False)
            self.note.setText("closing")
            self.talk.close()

    def _on_closed(self) -> None:
        self._is_closed = True
        self.close()


def row(*widgets: QtWidgets.QWidget) -> QtWidgets.QHBoxLayout:
    layout = QtWidgets.QHBoxLayout()
    for widget in widgets:
        layout.addWidget(widget)
    return layout


def window(options: argparse.Namespace) -> Window:
    model, draft, share = options.model, options.draft, options.resident
    if model is None:
        model, draft, share = path(MODEL), draft or path(DRAFT), share or "1/2"
    session = Session(
        model, isolation=options.isolation, wait=False, draft=draft, resident=share, n_ctx=options.ctx_size
    )
    return Window(session, str(model).replace("\\", "/").rsplit("/", 1)[-1], share, options.n_predict)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", metavar="MODEL", help="a GGUF file (default: the bundled MoE)")
    p.add_argument("--draft", metavar="D", help="a draft GGUF with the model's vocabulary")
    p.add_argument("--resident", metavar="SHARE", help="share of the expert bytes that slots may hold: 1/4")
    p.add_argument("--isolation", choices=("none", "process"), default="none", help="process that runs the engine")
    p.add_argument("-c", "--ctx-size", metavar="N", type=int, default=2048)
    p.add_argument("-n", "--n-predict", metavar="N", type=int, default=512, help="most tokens of a reply")
    p.add_argument("--say", metavar="TEXT", help="send this, print the reply and exit: a check of the installation")
    p.add_argument("--screenshot", metavar="FILE", help="with --say: save the window after the reply as a PNG")
    return p.parse_args(arguments)


def say_and_leave(shown: Window, text: str, screenshot: str | None) -> None:
    """Drive the window without a user."""

    def ask() -> None:
        shown.entry.setText(text)
        shown.send.click()

    def leave() -> None:
        if screenshot:
            shown.grab().save(screenshot)
        print(shown.transcript.toPlainText(), flush=True)
        figures = [f"{name} {label.text()}" for name, label in shown.figures.labels.items()]
        print(shown.note.text(), *figures, sep=", ", file=sys.stderr)
        shown.close()

    shown.messenger.loaded.connect(ask)
    for end in (shown.messenger.ended, shown.messenger.failed):
        end.connect(lambda _: QTimer.singleShot(POLL_MS, leave))  # the last figures arrive after the reply


def main() -> int:
    freeze_support()
    options = parse()
    logging.basicConfig(level=logging.WARNING)
    application = QtWidgets.QApplication(sys.argv[:1])
    try:
        shown = window(options)
    except EdgeError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
    shown.show()
    if options.say:
        say_and_leave(shown, options.say, options.screenshot)
    application.exec()
    return 0 if not options.say or shown.outcome in ("stop", "length") else 1


if __name__ == "__main__":
    sys.exit(main())
