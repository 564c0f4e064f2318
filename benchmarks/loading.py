"""Options with which measurements load one model under several policies."""

from __future__ import annotations

import argparse
from typing import Any

from edge_speq.cli.bench import emulation


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument(
        "--policy",
        default="auto,lru",
        help="policies with slots; auto+fetch and auto+hybrid say how auto serves misses",
    )
    parser.add_argument("--resident", default="1/4")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--emulate", help="link=12.5GB/s,threads=6")


def options_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Keywords of EdgeLlama by policy."""
    emulated = emulation(arguments.emulate)
    common: dict[str, Any] = {"n_ctx": 1024, "resident": arguments.resident, "throttle_link": emulated.get("link")}
    common |= {"draft": None, "draft_tokens": 0}
    threads = int(emulated["threads"]) if "threads" in emulated else arguments.threads
    if threads:
        common |= dict.fromkeys(("n_threads", "n_threads_batch"), threads)
    return {name: _policy(name) | common for name in arguments.policy.split(",")}


def _policy(name: str) -> dict[str, str]:
    policy, _, on_miss = name.partition("+")
    return {"policy": policy} | ({"on_miss": on_miss} if on_miss else {})
