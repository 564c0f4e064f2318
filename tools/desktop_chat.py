"""A chat window on top of edge_speq.Session: what docs/embedding.md says, as a program.

    python tools/desktop_chat.py                                   # the bundled pair
    python tools/desktop_chat.py model.gguf --draft draft.gguf --resident 1/4 --isolation process

Nothing that takes time runs on the window's thread: replies come from a thread each, and figures, other budgets and
closing are taken care of by another one. Needs PySide6: pip install PySide6-Essentials
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from edge_speq import EdgeError, Plan, Session, Stats
from edge_speq.gguf import bundled as demo
from edge_speq.session.subprocess.freeze import freeze_support
from edge_speq.system import install_hint

try:
    from PySide6.QtCore import QObject, Qt, QTimer, Signal
    from PySide6.QtGui import QCloseEvent, QTextCursor
    from PySide6.QtWidgets import (
        QApplication,
        QComboBox,
        QFormLayout,
        QGroupBox,
        QHBoxLayout,
        QLabel,
        QLineEdit,
        QMainWindow,
        QPlainTextEdit,
        QProgressBar,
        QPushButton,
        QVBoxLayout,
        QWidget,
    )
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}\nhint: {install_hint('desktop')}")

SHARES = ("1/8", "1/4", "1/2", "3/4", "1")
POLL_MS = 400  # between two looks at the figures
MIB = 1 << 20


class Messenger(QObject):  # type: ignore[misc]  # PySide6 is not installed where types are checked
    """What threads tell the window: emitting is safe anywhere, slots run on the window's thread."""

    progressed = Signal(float)
    loaded = Signal()
    piece = Signal(str)
    ended = Signal(str)  # "stop", "length", "stopped", or an error's text
    measured = Signal(object)  # Stats
    resized = Signal(str)
    failed = Signal(str)
    closed = Signal()


class Talk:
    """The conversation and the threads that carry it; no widget is touched here."""

    def __init__(self, session: Session, messenger: Messenger, max_tokens: int) -> None:
        self._session, self._messenger, self._max_tokens = session, messenger, max_tokens
        self._messages: list[dict[str, str]] = []
        self._stream: Any = None
        self._threads: list[threading.Thread] = []
        self._aside = ThreadPoolExecutor(1, "aside")
        self._look: Future[None] | None = None
        self._is_closing = False

    def start(self) -> None:
        self._run(self._load)

    def _run(self, target: Any, *args: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _load(self) -> None:
        try:
            for fraction in self._session.loading:
                self._messenger.progressed.emit(fraction)
        except EdgeError as error:
            self._messenger.failed.emit(f"not loaded: {said(error)}")
        else:
            self._messenger.loaded.emit()

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
        except Exception as error:  # whatever it ends with, the window hears of it
            outcome = said(error)
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
                del self._messages[:2]  # the oldest turn is forgotten
                stream = self._stream = self._open()
            except EdgeError as error:
                if error.message == "cancelled":
                    return "stopped"
                raise

    def stop(self) -> None:
        if self._stream is not None:
            self._stream.cancel()

    def measure(self) -> None:
        if not self._is_closing and (self._look is None or self._look.done()):
            self._look = self._aside.submit(self._measure)

    def _measure(self) -> None:
        with contextlib.suppress(EdgeError):  # there is no loaded model at the moment
            self._messenger.measured.emit(self._session.stats())

    def resize(self, share: str) -> None:
        self._aside.submit(self._resize, share)

    def _resize(self, share: str) -> None:
        try:
            plan: Plan = self._session.resize(resident=share)
        except EdgeError as error:
            self._messenger.resized.emit(said(error))
        else:
            self._messenger.resized.emit(plan.reason)

    def close(self) -> None:
        self._is_closing = True
        self._aside.submit(self._close)
        self._aside.shutdown(wait=False)

    def _close(self) -> None:
        self._session.close()
        for thread in self._threads:
            thread.join()
        self._messenger.closed.emit()


def said(error: Exception) -> str:
    return f"{error.message}. {error.hint}" if isinstance(error, EdgeError) and error.hint else str(error)


class Figures(QGroupBox):  # type: ignore[misc]
    """What happened to the experts, and how fast the text comes."""

    def __init__(self) -> None:
        super().__init__("Experts")
        form = QFormLayout(self)
        self.labels = {name: QLabel("–") for name in ("hits", "misses", "hit rate", "acceptance", "speed", "memory")}
        for name, label in self.labels.items():
            label.setObjectName(name)
            form.addRow(name, label)

    def show_stats(self, stats: Stats) -> None:
        experts, speculation = stats.experts, stats.speculation
        rate = experts.hit_rate
        texts = {
            "hits": "not observed" if experts.hits is None else f"{experts.hits:,}",
            "misses": "not observed" if experts.misses is None else f"{experts.misses:,}",
            "hit rate": "–" if rate is None else f"{100 * rate:.1f} %",
            "acceptance": f"{100 * speculation.acceptance:.1f} %" if speculation.drafted else "–",
            "speed": f"{stats.timing.tok_per_s:.1f} tok/s" if stats.timing.n_decoded else "–",
            "memory": f"{stats.used_bytes / MIB:.1f} MiB",
        }
        for name, text in texts.items():
            self.labels[name].setText(text)


class Window(QMainWindow):  # type: ignore[misc]
    """A conversation on the left, budget and figures on the right."""

    def __init__(self, session: Session, title: str, share: str | None, max_tokens: int) -> None:
        super().__init__()
        self.setWindowTitle(f"{title} – edge_speq")
        self.resize(900, 560)
        self.outcome = ""  # of the last reply
        self._is_closing = self._is_closed = False
        self._build(share)
        self.messenger = Messenger()
        self.talk = Talk(session, self.messenger, max_tokens)
        self._connect()
        self.talk.start()
        self._timer = QTimer(self)
        self._timer.timeout.connect(self.talk.measure)
        self._timer.start(POLL_MS)

    def _build(self, share: str | None) -> None:
        self.transcript = QPlainTextEdit(readOnly=True)
        self.entry = QLineEdit(placeholderText="A message", enabled=False)
        self.send, self.stop = QPushButton("Send", enabled=False), QPushButton("Stop", enabled=False)
        self.progress, self.cancel = QProgressBar(), QPushButton("Cancel")
        self.shares, self.apply = QComboBox(), QPushButton("Apply", enabled=False)
        self.shares.addItems(SHARES)
        self.shares.setCurrentText(share if share in SHARES else "1")
        self.figures, self.note = Figures(), QLabel("loading")
        self.note.setWordWrap(True)

        left = QVBoxLayout()
        left.addLayout(row(self.progress, self.cancel))
        left.addWidget(self.transcript)
        left.addLayout(row(self.entry, self.send, self.stop))
        left.addWidget(self.note)
        budget = QGroupBox("Share of the experts in slots")
        budget.setLayout(row(self.shares, self.apply))
        right = QVBoxLayout()
        right.addWidget(budget)
        right.addWidget(self.figures)
        right.addStretch()
        whole = QHBoxLayout()
        whole.addLayout(left, 3)
        whole.addLayout(right, 1)
        central = QWidget()
        central.setLayout(whole)
        self.setCentralWidget(central)

    def _connect(self) -> None:
        self.messenger.progressed.connect(self._on_progress)
        self.messenger.loaded.connect(self._on_loaded)
        self.messenger.failed.connect(self._on_failed)
        self.messenger.piece.connect(self._append)
        self.messenger.ended.connect(self._on_ended)
        self.messenger.measured.connect(self.figures.show_stats)
        self.messenger.resized.connect(self._on_resized)
        self.messenger.closed.connect(self._on_closed)
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
        self.entry.setEnabled(False)
        self.send.setEnabled(False)
        self.stop.setEnabled(True)
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
        """The window stays until the engine has stopped, which a step that runs may put off."""
        if self._is_closed:
            event.accept()
            return
        event.ignore()
        if not self._is_closing:
            self._is_closing = True
            self._timer.stop()
            self.centralWidget().setEnabled(False)
            self.note.setText("closing")
            self.talk.close()

    def _on_closed(self) -> None:
        self._is_closed = True
        self.close()


def row(*widgets: QWidget) -> QHBoxLayout:
    layout = QHBoxLayout()
    for widget in widgets:
        layout.addWidget(widget)
    return layout


def window(options: argparse.Namespace) -> Window:
    model, draft, share = options.model, options.draft, options.resident
    if model is None:
        model, draft = demo.path(demo.MODEL), draft or demo.path(demo.DRAFT)
        share = share or "1/2"
    engine = {"draft": draft, "resident": share, "n_ctx": options.ctx_size}
    session = Session(model, isolation=options.isolation, wait=False, **engine)
    return Window(session, str(model).replace("\\", "/").rsplit("/", 1)[-1], share, options.n_predict)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", metavar="MODEL", help="a GGUF file; the bundled MoE when left out")
    p.add_argument("--draft", metavar="D", help="a draft GGUF with the model's vocabulary")
    p.add_argument("--resident", metavar="SHARE", help="share of the expert bytes that slots may hold: 1/4")
    p.add_argument("--isolation", choices=("none", "process"), default="none", help="where the engine runs")
    p.add_argument("-c", "--ctx-size", metavar="N", type=int, default=2048)
    p.add_argument("-n", "--n-predict", metavar="N", type=int, default=512, help="most tokens of a reply")
    p.add_argument("--say", metavar="TEXT", help="send this, print the reply and leave: shows that it works")
    p.add_argument("--screenshot", metavar="FILE", help="with --say: the window as it was then, as a PNG")
    return p.parse_args(arguments)


def say_and_leave(shown: Window, text: str, screenshot: str | None) -> None:
    """The window as a program without a user."""

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
        end.connect(lambda _: QTimer.singleShot(POLL_MS, leave))  # the figures come a little later


def main() -> int:
    freeze_support()
    options = parse()
    logging.basicConfig(level=logging.WARNING)
    application = QApplication(sys.argv[:1])
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
