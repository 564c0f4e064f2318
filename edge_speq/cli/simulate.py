"""edge-speq simulate: replay recorded routing under policies, with a virtual clock and link."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from edge_speq.errors import EdgeError
from edge_speq.units import parse_rate, parse_share

DEFAULT_POLICIES = "lru,lfru,auto"
FORMATS = ("md", "csv", "json")


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "simulate",
        help="replay a trace under policies",
        description="Replays files of edge-speq trace under policies, with a virtual clock and link. Needs no model.",
    )
    p.add_argument("traces", nargs="+", metavar="TRACE", help="files of edge-speq trace")
    p.add_argument("--policy", metavar="P,...", default=DEFAULT_POLICIES, help="policies, or all (%(default)s)")
    p.add_argument(
        "--resident", metavar="SHARE,...", default="1/8,1/4,1/2", help="shares of the experts in slots (%(default)s)"
    )
    p.add_argument("--link-bandwidth", metavar="RATE", default="12.5GB/s", help="rate of transfers (%(default)s)")
    p.add_argument(
        "--block-ms", metavar="MS", type=float, help="compute time of a block (half of the transfer time of an expert)"
    )
    p.add_argument("--draft-ms", metavar="MS", type=float, help="time of a draft token (the compute time of a step)")
    p.add_argument("--cpu-ms", metavar="MS", type=float, help="time of an expert on the CPU (reading it at 60 GB/s)")
    p.add_argument(
        "--govern", action="store_true", help="let policies choose draft lengths, and let drafting take time"
    )
    p.add_argument("--by-class", action="store_true", help="also print rows for each class of prompts")
    p.add_argument("--format", choices=FORMATS, default="md", help="format on stdout (%(default)s)")
    p.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")
    p.add_argument("--csv", action="store_const", const="csv", dest="format", help="the same as --format csv")
    p.add_argument("--predictor", metavar="FILE", help="file of tune --learn, for policies auto and learned")
    p.add_argument("--plot", metavar="FILE", type=Path, help="also plot to a .png, .pdf or .svg file")
    p.add_argument("-v", "--verbose", action="store_true", help="show the log")
    p.set_defaults(command=simulate)


def simulate(options: argparse.Namespace) -> int:
    from edge_speq import trace
    from edge_speq.policies import registry
    from edge_speq.policies.learned import network_file
    from edge_speq.simulate import report

    for name in ("block_ms", "draft_ms", "cpu_ms"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1e9:
            raise EdgeError(f"--{name.replace('_', '-')} {value} is not a time", "give milliseconds", usage=True)
    learned = None if options.predictor is None else network_file.read(options.predictor)
    policies = registry.names(options.policy)
    if options.policy == "all" and learned is None:
        policies = [name for name in policies if name != "learned"]
    request = report.SimulateOptions(
        policies=policies,
        shares=[parse_share(share.strip()) for share in options.resident.split(",")],
        link_bytes_per_s=parse_rate(options.link_bandwidth, "--link-bandwidth"),
        block_ms=options.block_ms,
        draft_ms=options.draft_ms,
        cpu_ms=options.cpu_ms,
        governed=options.govern,
        by_class=options.by_class,
        foresight=learned,
    )
    traces = [trace.read(path) for path in options.traces]
    rows = report.simulate(traces, request, lambda text: print(f"simulate: {text}", file=sys.stderr))
    if options.plot is not None:
        from edge_speq.simulate import plot

        plot.plot(rows, options.plot)
    print(report.FORMATS[options.format](rows))
    return 0
