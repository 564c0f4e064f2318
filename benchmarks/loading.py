"""Options with which measurements load one model under several policies."""

from __future__ import annotations

import argparse
from typing import Any

from edge_speq.bench.policies import COMPUTES
from edge_speq.cli.bench import emulation


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--policy", default="auto,lru", help="policies with slots; device and hybrid are auto's")
    parser.add_argument("--resident", default="1/4")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--emulate", help="link=12.5GB/s,threads=6")


def options_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Keywords of EdgeLlama by policy."""
    emulated = emulation(arguments.emulate)
    common: dict[str, Any] = {"n_ctx": 1024, "resident": arguments.resident, "link": emulated.get("link")}
    common |= {"draft": None, "speculation": 0}
    threads = int(emulated["threads"]) if "threads" in emulated else arguments.threads
    if threads:
        common |= dict.fromkeys(("n_threads", "n_threads_batch"), threads)
    chosen = {
        name: {"policy": "auto", "compute": name} if name in COMPUTES else {"policy": name}
        for name in arguments.policy.split(",")
    }
    return {name: policy | common for name, policy in chosen.items()}
