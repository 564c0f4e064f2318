"""Live view of slots, link and draft on stderr: full screen on a terminal, otherwise one line per second."""

from __future__ import annotations

import codecs
import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from edge_speq.cli import heatmap, interrupt
from edge_speq.cli.console import console, is_terminal
from edge_speq.engine.step_records import StepRecord

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

    from edge_speq.engine.llama import EdgeLlama

RESTORE = "\x1b[0m\x1b[?25h\x1b[?1049l"  # resets colours, cursor and screen after an interrupt
FRAME_SECONDS, LINE_SECONDS = 0.1, 1.0
WINDOW = 32  # recent steps over which figures are computed
TEXT_LINES = 4


class View:
    """Shows a model at work.

    Pass `step` as on_step, call `text` with each piece of text, and set `llm` once the model is loaded.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        name: str,
        link_bytes_per_s: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.llm: EdgeLlama | None = None
        self.on_terminal = is_terminal(stream)
        self._stream, self._name, self._clock = stream, name, clock
        self._link = link_bytes_per_s
        self._plain = not _can_write(stream, heatmap.FILLED + heatmap.LOADING)
        self._recent: collections.deque[StepRecord] = collections.deque(maxlen=WINDOW)
        self._heat: heatmap.Heat | None = None
        self._text = ""
        self._n_steps = self._n_tokens = 0
        self._shown_at = -1e9
        self._live: Live | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the view while the block runs. A terminal's screen is restored also after an exception or Ctrl-C."""
        if not self.on_terminal:
            yield
            self._show()
            return
        from rich.live import Live
        from rich.text import Text

        interrupt.last_words(RESTORE.encode())
        live = Live(
            Text(),
            console=console(self._stream),
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,  # stdout is data
            redirect_stderr=False,
        )
        try:
            with live:
                self._live = live
                yield
        finally:
            self._live = None
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
        if self._live is None:
            self._stream.write(f"step {self._n_steps}: {', '.join(text for _, text in self._figures())}\n")
            self._stream.flush()
            return
        from rich.console import Group

        size = self._live.console.size
        self._live.update(Group(*self.frame(size.width, size.height)), refresh=True)

    # --- contents ---------------------------------------------------------------------------------

    def frame(self, width: int, height: int) -> list[Text]:
        """Return at most height lines of at most width columns."""
        from rich.text import Text

        head = f"edge-speq  {self._name}  step {self._n_steps}, {self._n_tokens} tokens"
        lines = [head, *(f"{name:8} {text}" for name, text in self._figures())]
        rows = self._map(width, height - len(lines) - TEXT_LINES - 2)
        cut = [Text(line[:width]) for line in lines]
        return [*cut, *rows, Text(), *map(Text, _tail(self._text, width, TEXT_LINES))][: max(1, height)]

    def _map(self, width: int, height: int) -> list[Text]:
        from rich.text import Text

        states = self.llm.residency() if self.llm is not None else None
        if states is None or self._heat is None or height < 1:
            return []
        return [Text(), *heatmap.rows(states, self._heat.share, height=height, width=width, plain=self._plain)]

    def _figures(self) -> list[tuple[str, str]]:
        """Return names and figures of the recent steps."""
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
            served += f", {on_cpu / len(recent):.1f} per step on the CPU"
        rate = n_bytes / seconds if seconds else 0.0
        use = f" ({100 * rate / self._link:.0f} % of {self._link / 1e9:.1f})" if self._link else ""
        waits = f", stalled {100 * stalled / seconds:.0f} % of the time" if seconds else ""
        return [
            ("experts", served),
            ("link", f"{rate / 1e9:.2f} GB/s{use}{waits}"),
        ]


def _tail(text: str, width: int, n: int) -> list[str]:
    """Return the last n lines of a text, wrapped and without control characters."""
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
