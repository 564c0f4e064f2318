"""edge-speq run: text from a model under a budget, and what happened to its experts meanwhile."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from edge_speq import demo, interrupt
from edge_speq.cli import arguments
from edge_speq.core import Stats

if TYPE_CHECKING:
    from edge_speq.llama import EdgeLlama


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "run", help="generate text", description="Without arguments: the bundled demo, half of its experts resident."
    )
    arguments.add_model(p)
    arguments.add_transfers(p)
    p.add_argument("-p", "--prompt", metavar="TEXT", default=demo.PROMPT)
    arguments.add_sampling(p, n_predict=128)
    arguments.add_output(p, json="print one JSON object instead of text and report")
    p.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    arguments.with_demo_defaults(options)
    llm = arguments.load(options)
    try:
        text = generate(llm, options)
        stats = llm.stats()
    finally:
        llm.close()
    if options.json:
        print(json.dumps({"text": text} | stats.to_dict()))
    else:
        print(report(stats), file=sys.stderr)
    return 0


def generate(llm: EdgeLlama, options: argparse.Namespace) -> str:
    parts: list[str] = []
    if not options.json:
        interrupt.last_words(interrupt.NEW_LINE)
        print(options.prompt, end="", flush=True)
    for chunk in llm.create_completion(
        options.prompt,
        max_tokens=options.n_predict,
        temperature=options.temp,
        seed=options.seed,
        stream=True,
    ):
        piece = chunk["choices"][0]["text"]
        parts.append(piece)
        if not options.json:
            print(piece, end="", flush=True)
    if not options.json:
        print(flush=True)
        interrupt.last_words(b"")
    return "".join(parts)


def report(stats: Stats) -> str:
    t, s, e = stats.timing, stats.speculation, stats.experts
    lines = [
        "",
        f"speed      {t.tok_per_s:.1f} tok/s, first token after {1e3 * t.ttft_seconds:.0f} ms "
        f"({t.n_prompt} prompt, {t.n_generated} generated tokens) on {stats.device}",
        f"plan       {stats.plan.reason}",
    ]
    if e.hits is not None and stats.plan.policy == "slots":
        rate = f"{100 * e.hit_rate:.1f} %" if e.hit_rate is not None else "no demands"
        lines += [
            f"experts    {e.hits} hits, {e.misses} misses ({rate} hits; {e.late} late), stalled {e.stall_ms:.0f} ms",
            *([f"cpu        {e.cpu_computed} misses computed in {e.cpu_ms:.0f} ms"] if e.cpu_computed else []),
            f"transfers  {_mib(e.bytes_fetched)} fetched: {e.fetched} on demand, {e.prefetched} prefetched "
            f"({stats.foresight}) of which {e.prefetched_used} used; {_mib(e.bytes_wasted)} wasted",
        ]
    if s.drafted:
        lines.append(
            f"draft      {s.accepted} of {s.drafted} draft tokens accepted ({100 * s.acceptance:.1f} %), "
            f"{s.k_mean:.1f} drafted a step"
        )
    budget = f" of {_mib(stats.plan.budget_bytes)}" if stats.plan.budget_bytes is not None else ""
    lines.append(f"memory     {_mib(stats.used_bytes)}{budget} on the compute device, mapped files not counted")
    return "\n".join(lines)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
