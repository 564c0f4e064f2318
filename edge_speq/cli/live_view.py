"""What a model does while it writes, on stderr: a screen of a terminal, or else a plain line a second."""

from __future__ import annotations

import codecs
import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from edge_speq.cli import heatmap, interrupt
from edge_speq.engine.step_records import StepRecord

if TYPE_CHECKING:
    from edge_speq.engine.llama import EdgeLlama

SCREEN = "\x1b[?1049h\x1b[?25l\x1b[2J"  # the other screen, without a cursor
RESTORE = "\x1b[0m\x1b[?25h\x1b[?1049l"
FRAME_SECONDS, LINE_SECONDS = 0.1, 1.0
WINDOW = 32  # steps that the figures are of
TEXT_LINES = 4


class View:
    """Give `step` as on_step and `text` each piece that is written; `llm` as soon as it is loaded."""

    def __init__(
        self,
        stream: TextIO,
        *,
        name: str,
        link_bytes_per_s: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.llm: EdgeLlama | None = None
        self.on_terminal = stream.isatty()
        self._stream, self._name, self._clock = stream, name, clock
        self._link = link_bytes_per_s
        self._plain = not _can_write(stream, heatmap.FILLED + heatmap.LOADING)
        self._coloured = "NO_COLOR" not in os.environ
        self._recent: collections.deque[StepRecord] = collections.deque(maxlen=WINDOW)
        self._heat: heatmap.Heat | None = None
        self._text = ""
        self._n_steps = self._n_tokens = 0
        self._shown_at = -1e9

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """On a terminal the screen is the view's while the block runs, also where an exception or Ctrl-C ends it."""
        if not self.on_terminal:
            yield
            self._show()
            return
        interrupt.last_words(RESTORE.encode())
        self._write(SCREEN)
        try:
            yield
        finally:
            self._write(RESTORE)
            interrupt.last_words(b"")

    def text(self, piece: str) -> None:
        self._text += piece
        if self.on_terminal:
            interrupt.last_words((RESTORE + self._text + "\n").encode(errors="replace"))

    def step(self, record: StepRecord) -> None:
        self._n_steps += 1
        self._n_tokens += 1 + record.accepted
        if not record.is_prompt:
            self._recent.append(record)
        self._note_demands(record)
        now = self._clock()
        if self._recent and now - self._shown_at >= (FRAME_SECONDS if self.on_terminal else LINE_SECONDS):
            self._shown_at = now
            self._show()

    def _note_demands(self, record: StepRecord) -> None:
        routing = self.llm.last_routing() if self.llm is not None else None
        if self.llm is None or routing is None:
            return
        if self._heat is None:
            self._heat = heatmap.Heat(self.llm.experts.n_blocks, self.llm.experts.n_expert)
        if routing.shape[1] == record.tokens:  # a prompt in several batches leaves only the last
            self._heat.add(routing)

    def _show(self) -> None:
        if not self.on_terminal:
            figures = ", ".join(text for _, text in self._figures())
            self._write(f"step {self._n_steps}: {figures}\n")
            return
        size = os.get_terminal_size(self._stream.fileno())
        frame = self.frame(size.columns or 80, size.lines or 24)  # 0 where the terminal does not know
        self._write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in frame[:-1]) + f"{frame[-1]}\x1b[K\x1b[J")

    # --- what is shown ---------------------------------------------------------------------------------

    def frame(self, width: int, height: int) -> list[str]:
        """At most height lines of at most width columns."""
        head = f"edge-speq  {self._name}  step {self._n_steps}, {self._n_tokens} tokens"
        lines = [head, *(f"{name:8} {text}" for name, text in self._figures())]
        lines = [line[:width] for line in lines]
        lines += self._map(width, height - len(lines) - TEXT_LINES - 2)
        return [*lines, "", *_tail(self._text, width, TEXT_LINES)][: max(1, height)]

    def _map(self, width: int, height: int) -> list[str]:
        states = self.llm.residency() if self.llm is not None else None
        if states is None or self._heat is None or height < 1:
            return []
        shape: dict[str, Any] = {"height": height, "width": width}
        rows = heatmap.rows(states, self._heat.share, plain=self._plain, coloured=self._coloured, **shape)
        return ["", *rows]

    def _figures(self) -> list[tuple[str, str]]:
        """Of the last steps."""
        recent = list(self._recent)
        seconds = sum(step.seconds for step in recent)
        drafted, accepted = sum(step.drafted for step in recent), sum(step.accepted for step in recent)
        speed = (accepted + len(recent)) / seconds if seconds else 0.0
        k = drafted / len(recent) if recent else 0.0
        rate = f", {100 * accepted / drafted:.0f} % accepted" if drafted else ""
        figures = [("speed", f"{speed:.1f} tok/s"), ("draft", f"K {k:.1f}{rate}")]
        if any(step.hits is not None for step in recent):
            figures += self._slots(recent, seconds)
        return figures

    def _slots(self, recent: list[StepRecord], seconds: float) -> list[tuple[str, str]]:
        hits, misses = sum(step.hits or 0 for step in recent), sum(step.misses or 0 for step in recent)
        on_cpu = sum(step.cpu_computed or 0 for step in recent)
        n_bytes = sum(step.bytes_fetched for step in recent)
        stalled = sum(step.stall_ms for step in recent) / 1e3
        served = f"{100 * hits / (hits + misses):.1f} % hits" if hits + misses else "no demands"
        if on_cpu:
            served += f", {on_cpu / len(recent):.1f} a step on the CPU"
        rate = n_bytes / seconds if seconds else 0.0
        use = f" ({100 * rate / self._link:.0f} % of {self._link / 1e9:.1f})" if self._link else ""
        waits = f", stalled {100 * stalled / seconds:.0f} % of the time" if seconds else ""
        return [("experts", served), ("link", f"{rate / 1e9:.2f} GB/s{use}{waits}")]

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _tail(text: str, width: int, n: int) -> list[str]:
    """The last n lines of a text, wrapped; nothing in them moves the cursor."""
    lines: list[str] = []
    for line in text.split("\n")[-n:]:
        clean = "".join(c if c.isprintable() else " " for c in line)
        lines += [clean[i : i + width] for i in range(0, len(clean), width)] or [""]
    return lines[-n:]


def _can_write(stream: TextIO, text: str) -> bool:
    encoding = getattr(stream, "encoding", None) or "ascii"
    try:
        codecs.encode(text, encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
