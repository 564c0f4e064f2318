"""How well the simulator predicts step times: a run under lru says what the machine costs, others are predicted.

    python tools/predicted_times.py MODEL [--draft TWIN] --link 12.5GB/s --threads 6 -o FILE

Missing experts are fetched (compute="device"), as the simulator has it. Every run records what it does, and what is
predicted of it is the replay of those steps under its policy and slots, with costs fitted to the first run of its draft
length. Printed is the error of each round in milliseconds of all narrow steps, drafting included, but for the first
step of a text, whose draft reads the prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from edge_speq import system, texts, trace
from edge_speq.bench.recorder import Recorder
from edge_speq.policies.context import PolicyContext
from edge_speq.simulate import costs
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.replay import Replay
from edge_speq.units import parse_rate

Steps = list[trace.Step]
FITTED = "lru", "1/4"


def recorded(options: argparse.Namespace, policy: str, share: str, k: int) -> tuple[Steps, PolicyContext]:
    drafting: dict[str, Any] = {"draft": options.draft} if k else {}
    model = Recorder(
        options.model,
        policy=policy,
        resident=share,
        speculation=k,
        compute="device",
        link=options.link,
        n_ctx=1024,
        n_threads=options.threads,
        **drafting,
    )
    steps: Steps = []
    model.sink = steps.append
    with contextlib.closing(model):
        for index, prompt in enumerate(texts.bundled().chosen):
            model.begin_passage(index)
            model.create_completion(prompt.text, max_tokens=options.n_tokens, temperature=0.0)
        model.write()
        plan = model._plan
        link = parse_rate(options.link) if options.link else 1
        return steps, PolicyContext(model._experts, plan.slots, plan.max_draft_tokens, link, 0.0, 0.0, has_twin=k > 0)


def narrow(steps: Steps) -> Steps:
    return [step for step in steps if not step.is_prompt]


def later(steps: Steps) -> list[bool]:
    """Of narrow steps, which are not the first of their text."""
    return [i > 0 and step.passage == steps[i - 1].passage for i, step in enumerate(steps)]


class Fit:
    """What a run under lru says of the machine."""

    def __init__(self, steps: Steps, made: PolicyContext) -> None:
        self.costs = StepCosts.fit(steps)
        found = costs.link_of(steps, Replay("lru", made).run(steps).step_bytes)
        if found is None:
            raise SystemExit("nothing was fetched: give a larger model or a smaller share")
        self.link = round(found)

    def error(self, policy: str, steps: Steps, made: PolicyContext) -> float:
        """Of the prediction, relative."""
        block_ms = costs.block_ms(self.costs, made.k_max + 1, made.experts.n_blocks)
        made = dataclasses.replace(made, link_bytes_per_s=self.link, block_ms=block_ms, draft_ms=self.costs.draft_ms)
        predicted = Replay(policy, made, self.costs, drafts=True).run(steps).step_ms
        timed = narrow(steps)
        counted = later(timed)
        measured = [step.step_ms + step.draft_ms for step in timed]
        return sum(itertools.compress(predicted, counted)) / sum(itertools.compress(measured, counted)) - 1


def table(found: dict[str, Any]) -> str:
    """Errors of the runs, the median with the least and the greatest where there are several."""
    rows, shares = found["rows"], list(dict.fromkeys(row["resident"] for row in found["rows"]))
    lines = [f"| K | policy | {' | '.join(shares)} |", "|---" * (2 + len(shares)) + "|"]
    for k, policy in dict.fromkeys((row["k"], row["policy"]) for row in rows):
        cells = [_cell(r["errors"]) for r in rows if (r["k"], r["policy"]) == (k, policy)]
        lines.append(f"| {k} | `{policy}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(errors: list[float]) -> str:
    median = f"{100 * statistics.median(errors):+.1f} %"
    return median if len(errors) == 1 else f"{median} [{100 * min(errors):+.1f}, {100 * max(errors):+.1f}]"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft", help="a twin, for runs of --k drafted tokens; without one none is drafted")
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--link", help="emulated: 12.5GB/s; the link as it is when left out")
    parser.add_argument("--threads", type=int, default=system.usable_cpus())
    parser.add_argument("--policies", default="lru,lfru,twin,waits")
    parser.add_argument("--shares", default="1/4,1/2,3/4")
    parser.add_argument("-n", "--n-tokens", type=int, default=32)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args(argv)
    rows: dict[tuple[int, str, str], list[float]] = {}
    fits: dict[int, Fit] = {}
    for _ in range(options.rounds):
        for k in (0, options.k) if options.draft else (0,):
            if k not in fits:
                fits[k] = Fit(*recorded(options, *FITTED, k))
            for policy in options.policies.split(","):
                if not k and policy in ("twin", "waits"):
                    continue
                for share in options.shares.split(","):
                    steps, made = recorded(options, policy, share, k)
                    error = fits[k].error(policy, steps, made)
                    rows.setdefault((k, policy, share), []).append(error)
                    print(f"K {k} {policy} {share}: {100 * error:+.1f} %", flush=True)
    stored = [
        {"k": k, "policy": policy, "resident": share, "errors": [round(error, 4) for error in errors]}
        for (k, policy, share), errors in rows.items()
    ]
    fitted = {str(k): dataclasses.asdict(fit.costs) | {"link_bytes_per_s": fit.link} for k, fit in fits.items()}
    run = {"model": Path(options.model).name, "link": options.link, "threads": options.threads}
    found = {**run, "fitted": fitted, "rows": stored}
    print(f"\n{table(found)}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
