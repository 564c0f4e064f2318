"""edge-speq run: generate text within a memory budget, and report speed and expert events."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from edge_speq.cli import arguments, interrupt
from edge_speq.core import Stats
from edge_speq.errors import EdgeError
from edge_speq.gguf import bundled
from edge_speq.units import format_bytes

if TYPE_CHECKING:
    from edge_speq.cli.live_view import View
    from edge_speq.engine.llama import EdgeLlama
    from edge_speq.engine.step_records import StepRecord


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "run",
        help="generate text",
        description="Generates text. Without arguments: the bundled model, half of its experts resident.",
    )
    arguments.add_model(p)
    arguments.add_transfers(p)
    arguments.add_profile(p)
    p.add_argument("-p", "--prompt", metavar="TEXT", default=bundled.PROMPT)
    arguments.add_sampling(p, n_predict=128)
    p.add_argument("--live", action="store_true", help="show slots, link and draft on stderr while generating")
    p.add_argument("--step-log", metavar="FILE", help="write one JSON object per verify step")
    arguments.add_output(p, json="print one JSON object instead of text and report")
    p.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    arguments.with_demo_defaults(options)
    view = _view(options) if options.live else None
    with _steps_file(options.step_log) as file:

        def on_step(step: StepRecord) -> None:
            if file is not None:
                file.write(json.dumps(dataclasses.asdict(step)) + "\n")
            if view is not None:
                view.step(step)

        llm = arguments.load(options, on_step=on_step if file is not None or view is not None else None)
        try:
            text = _watched(llm, options, view) if view is not None else generate(llm, options)
            stats = llm.stats()
        finally:
            llm.close()
    if options.json:
        print(json.dumps({"text": text} | stats.to_dict()))
    else:
        print(report(stats), file=sys.stderr)
    return 0


def _view(options: argparse.Namespace) -> View:
    from edge_speq.cli.live_view import View

    return View(sys.stderr, name=Path(options.model).name, link_bytes_per_s=options.throttle_link)


@contextlib.contextmanager
def _steps_file(path: str | None) -> Iterator[TextIO | None]:
    """Open the step log, line-buffered, so that an interrupted command leaves whole lines."""
    if path is None:
        yield None
        return
    try:
        file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115  # only opening may fail for this reason
    except OSError as error:
        raise EdgeError(
            f"cannot write {path}: {error.strerror}", "give a file that can be created", usage=True
        ) from error
    with file:
        yield file


def _watched(llm: EdgeLlama, options: argparse.Namespace, view: View) -> str:
    """Generate with the view. If text and view share a terminal, the text is printed after the view."""
    view.llm = llm
    hidden = view.on_terminal and sys.stdout.isatty() and not options.json
    if not hidden:
        with view.shown():
            return generate(llm, options, view)
    with view.shown():
        text = _generate(llm, options, view, shows=False)
    print(options.prompt + text, flush=True)
    return text


def generate(llm: EdgeLlama, options: argparse.Namespace, view: View | None = None) -> str:
    if options.json:
        return _generate(llm, options, view, shows=False)
    if view is None:
        interrupt.last_words(interrupt.NEW_LINE)
    print(options.prompt, end="", flush=True)
    text = _generate(llm, options, view, shows=True)
    print(flush=True)
    if view is None:
        interrupt.last_words(b"")
    return text


def _generate(llm: EdgeLlama, options: argparse.Namespace, view: View | None, *, shows: bool) -> str:
    parts: list[str] = []
    if view is not None:
        view.text(options.prompt)
    for chunk in llm.create_completion(
        options.prompt,
        max_tokens=options.n_predict,
        temperature=options.temp,
        seed=options.seed,
        stream=True,
    ):
        piece = chunk["choices"][0]["text"]
        parts.append(piece)
        if view is not None:
            view.text(piece)
        if shows:
            print(piece, end="", flush=True)
    return "".join(parts)


def report(stats: Stats) -> str:
    """Return speed, plan, expert events, foresight, draft and memory, as lines."""
    t, s, e = stats.timing, stats.speculation, stats.experts
    lines = [
        "",
        f"speed      {t.tok_per_s:.1f} tok/s, first token after {1e3 * t.ttft_seconds:.0f} ms "
        f"({t.n_prompt} prompt, {t.n_generated} generated tokens) on {stats.device}",
        f"plan       {stats.plan.reason}",
        *_profile(stats),
    ]
    if e.hits is not None and stats.plan.placement == "slots":
        rate = f"{100 * e.hit_rate:.1f} %" if e.hit_rate is not None else "no demands"
        lines += [
            f"experts    {e.hits} hits, {e.misses} misses ({rate} hits; {e.late} late), stalled {e.stall_ms:.0f} ms",
            *([f"cpu        {e.cpu_computed} misses computed in {e.cpu_ms:.0f} ms"] if e.cpu_computed else []),
            f"transfers  {format_bytes(e.bytes_fetched)} fetched: {e.fetched} on demand, {e.prefetched} prefetched "
            f"({stats.foresight}) of which {e.prefetched_used} used; {format_bytes(e.bytes_wasted)} wasted",
        ]
    if stats.foreseen is not None:
        f = stats.foreseen
        lines.append(
            f"foresight  {f['lead_tokens']:.1f} tokens ahead, precision {f['precision']:.2f}, recall {f['recall']:.2f}"
        )
    if s.drafted:
        lines.append(
            f"draft      {s.accepted} of {s.drafted} draft tokens accepted ({100 * s.acceptance:.1f} %), "
            f"{s.mean_draft_tokens:.1f} drafted per step"
        )
    budget = f" of {format_bytes(stats.plan.budget_bytes)}" if stats.plan.budget_bytes is not None else ""
    lines.append(f"memory     {format_bytes(stats.used_bytes)}{budget} on the compute device, mapped files not counted")
    return "\n".join(lines)


def _profile(stats: Stats) -> list[str]:
    if stats.profile is None:
        return []
    applied = ", ".join(f"{name}={value}" for name, value in stats.profile["applied"].items())
    return [f"profile    {applied or 'no option was left to fill in'} ({stats.profile['path']})"]
