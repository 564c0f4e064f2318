"""Options with which measurements load one model under several policies."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import store
from benchmarks.tables import arm_name
from edge_speq.cli.bench import emulation
from edge_speq.core import OWN_POLICIES


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--policy", type=store.names, default=["auto", "lru"], help="policies with slots (auto,lru)")
    parser.add_argument("--on-miss", type=store.names, default=["auto"], help="auto, fetch, hybrid: as in bench (auto)")
    parser.add_argument("--resident", default="1/4")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--emulate", help="link=12.5GB/s,threads=6")


def options_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return keywords of EdgeLlama, by policy and way to serve misses."""
    emulated = emulation(arguments.emulate)
    common: dict[str, Any] = {"n_ctx": 1024, "resident": arguments.resident, "throttle_link": emulated.get("link")}
    common |= {"draft": None, "draft_tokens": 0}
    threads = int(emulated["threads"]) if "threads" in emulated else arguments.threads
    if threads:
        common |= dict.fromkeys(("n_threads", "n_threads_batch"), threads)
    return {
        arm_name(policy, on_miss): common | {"policy": policy, "on_miss": on_miss}
        for policy in arguments.policy
        for on_miss in (arguments.on_miss if policy in OWN_POLICIES else ["auto"])
    }
