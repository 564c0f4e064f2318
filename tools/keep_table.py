"""Misses of rules for which experts to keep, relative to LRU's, over traces without a draft: docs/presets.md.

    edge-speq trace MODEL -n 64 --texts 4 -c 512 -o TRACE.npz
    python tools/keep_table.py TRACE.npz ...

"long" replays the texts as they were recorded, "short" the first tokens of four of them in turn, several times over.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_speq import trace
from edge_speq.errors import EdgeError
from edge_speq.policies import registry as policies
from edge_speq.policies.context import PolicyContext
from edge_speq.simulate.replay import Replay
from edge_speq.trace.reader import Trace
from edge_speq.trace.step import Step

POLICIES = ("lru", "lfru", "auto")
SHARES = (1 / 8, 1 / 4, 1 / 2)
SHORT, TURNS = 20, 5  # tokens of a text, and how often each comes


def misses(recorded: Trace, steps: Sequence[Step], share: float, policy: str) -> int:
    experts = recorded.experts
    slots = tuple(max(int(share * group.n_experts), experts.n_expert_used + 1) for group in experts.groups)
    setting = PolicyContext.nominal(experts, slots, 0, 12_500_000_000, has_twin=False)
    counted = Replay(policies.make(policy, setting), setting).run(steps).counters.misses
    assert counted is not None
    return counted


def texts(recorded: Trace) -> dict[str, list[Step]]:
    of_each = [list(steps) for _, steps in itertools.groupby(recorded.steps, key=lambda step: step.passage)]
    four = [of_each[i * len(of_each) // 4][:SHORT] for i in range(4)]
    return {"long": list(recorded.steps), "short": list(itertools.chain.from_iterable(four * TURNS))}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    options = parser.parse_args(argv)
    print(f"| trace | texts | resident | {' | '.join(POLICIES)} |")
    print("|---" * (3 + len(POLICIES)) + "|")
    try:
        for path in options.traces:
            recorded = trace.read(path)
            for name, steps in texts(recorded).items():
                for share in SHARES:
                    seen = [misses(recorded, steps, share, policy) for policy in POLICIES]
                    cells = " | ".join(f"{n / seen[0]:.3f}" for n in seen)
                    print(f"| {path.stem} | {name} | 1/{1 / share:.0f} | {cells} |")
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
