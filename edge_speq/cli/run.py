"""edge-speq run: text from a model under a budget, and what happened to its experts meanwhile."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from edge_speq import demo
from edge_speq.core import COMPUTES, POLICIES, Stats

if TYPE_CHECKING:
    from edge_speq.llama import EdgeLlama

DEMO_RESIDENT = "1/2"
DEMO_SEED = 7
DEFAULT_CONTEXT = 4096


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "run", help="generate text", description="Without arguments: the bundled demo, half of its experts resident."
    )
    p.add_argument("model", nargs="?", metavar="MODEL", help="a GGUF file; the bundled MoE when left out")
    p.add_argument("--draft", metavar="D", help="a draft GGUF with the model's vocabulary")
    p.add_argument("--resident", metavar="SHARE", help="share of the expert bytes that slots may hold: 1/4, 0.25")
    p.add_argument("--vram-budget", metavar="SIZE", help="ceiling for everything on the device: 6GiB, auto")
    p.add_argument("-p", "--prompt", metavar="TEXT", default=demo.PROMPT)
    p.add_argument(
        "-n", "--n-predict", metavar="N", type=int, default=128, help="most tokens, 0 for as many as fit (%(default)s)"
    )
    p.add_argument("--seed", metavar="S", type=int, help=f"of the sampler (the demo's is {DEMO_SEED})")
    p.add_argument("--temp", metavar="T", type=float, default=0.8, help="temperature, 0 is greedy (%(default)s)")
    p.add_argument("--speculation", metavar="K", default="auto", help="draft tokens per step, or auto (%(default)s)")
    p.add_argument("--policy", choices=POLICIES, default="auto", help="what serves the experts (%(default)s)")
    p.add_argument("--compute", choices=COMPUTES, default="auto", help="where missing experts run (%(default)s)")
    p.add_argument("-c", "--ctx-size", metavar="N", type=int, help=f"context (the model's, at most {DEFAULT_CONTEXT})")
    p.add_argument("--no-mmap", action="store_true", help="read the model into memory: faster fetches on a GPU")
    p.add_argument("-t", "--threads", metavar="N", type=int, help="CPU threads")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text and report")
    p.add_argument("-v", "--verbose", action="store_true", help="show the log")
    p.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    with_demo_defaults(arguments)
    llm = load(arguments)
    try:
        text = generate(llm, arguments)
        stats = llm.stats()
    finally:
        llm.close()
    if arguments.json:
        print(json.dumps({"text": text} | stats.to_dict()))
    else:
        print(report(stats), file=sys.stderr)
    return 0


def with_demo_defaults(arguments: argparse.Namespace) -> None:
    """Without a model: the bundled pair, half of the experts resident unless the arguments bound them."""
    if arguments.model is not None:
        return
    arguments.model = str(demo.path(demo.MODEL))
    arguments.draft = arguments.draft or str(demo.path(demo.DRAFT))
    if arguments.seed is None:
        arguments.seed = DEMO_SEED
    if arguments.resident is None and arguments.vram_budget is None and arguments.policy in ("auto", "lru"):
        arguments.resident = DEMO_RESIDENT


def load(arguments: argparse.Namespace) -> EdgeLlama:
    from edge_speq.engine import trained_context
    from edge_speq.llama import EdgeLlama

    n_ctx = arguments.ctx_size or min(trained_context(arguments.model), DEFAULT_CONTEXT)
    options: dict[str, Any] = {"n_ctx": n_ctx}
    if arguments.no_mmap:
        options["use_mmap"] = False
    if arguments.threads:
        options |= {"n_threads": arguments.threads, "n_threads_batch": arguments.threads}
    return EdgeLlama(
        arguments.model,
        draft=arguments.draft,
        resident=arguments.resident,
        vram_budget=arguments.vram_budget,
        speculation=arguments.speculation,
        policy=arguments.policy,
        compute=arguments.compute,
        **options,
    )


def generate(llm: EdgeLlama, arguments: argparse.Namespace) -> str:
    parts: list[str] = []
    if not arguments.json:
        print(arguments.prompt, end="", flush=True)
    for chunk in llm.create_completion(
        arguments.prompt,
        max_tokens=arguments.n_predict,
        temperature=arguments.temp,
        seed=arguments.seed,
        stream=True,
    ):
        piece = chunk["choices"][0]["text"]
        parts.append(piece)
        if not arguments.json:
            print(piece, end="", flush=True)
    if not arguments.json:
        print(flush=True)
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
