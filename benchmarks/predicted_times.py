"""How well the simulator predicts step times.

A run under lru says what the machine costs, other runs are predicted. Missing experts are fetched, as the simulator has
it. Every run records its steps; its prediction is the replay of those steps under its policy and slots, with costs
fitted to the first run of its draft length. The error is that of the milliseconds of all narrow steps, drafting
included, without the first step of each text, whose draft reads the prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.tables import Spread, markdown
from edge_speq import system, texts, trace
from edge_speq.bench.recorder import Recorder
from edge_speq.policies.context import PolicyContext
from edge_speq.simulate import costs
from edge_speq.simulate.costs import StepCosts
from edge_speq.simulate.replay import Replay
from edge_speq.units import parse_rate

Steps = list[trace.Step]
FITTED = "lru", "1/4"
NEEDS_DRAFT = ("twin", "waits")


def recorded(options: argparse.Namespace, policy: str, share: str, k: int) -> tuple[Steps, PolicyContext]:
    drafting: dict[str, Any] = {"draft": options.draft} if k else {}
    model = Recorder(
        options.model,
        policy=policy,
        resident=share,
        draft_tokens=k,
        on_miss="fetch",
        throttle_link=options.link,
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
        plan = model.llm.plan
        link = parse_rate(options.link) if options.link else 1
        known = (model.llm.experts, plan.slots, plan.max_draft_tokens, link)
        return steps, PolicyContext(*known, 0.0, 0.0, has_twin=k > 0)


class Fit:
    """Costs of the machine, fitted to a run under lru."""

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
        timed = [step for step in steps if not step.is_prompt]
        counted = [i > 0 and step.passage == timed[i - 1].passage for i, step in enumerate(timed)]
        seen = [step.step_ms + step.draft_ms for step in timed]
        return sum(itertools.compress(predicted, counted)) / sum(itertools.compress(seen, counted)) - 1


def table(found: dict[str, Any]) -> str:
    rows, shares = found["rows"], list(dict.fromkeys(row["resident"] for row in found["rows"]))
    body = [
        [str(k), f"`{policy}`", *(_cell(row["errors"]) for row in rows if (row["k"], row["policy"]) == (k, policy))]
        for k, policy in dict.fromkeys((row["k"], row["policy"]) for row in rows)
    ]
    return markdown(("draft tokens", "policy", *shares), body)


def _cell(errors: list[float]) -> str:
    spread = Spread.of(errors)
    median = f"{100 * spread.median:+.1f} %"
    return median if len(errors) == 1 else f"{median} [{100 * spread.least:+.1f}, {100 * spread.greatest:+.1f}]"


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    rows, fits = dict[tuple[int, str, str], list[float]](), dict[int, Fit]()
    for _ in range(options.rounds):
        for k in (0, options.k) if options.draft else (0,):
            if k not in fits:
                fits[k] = Fit(*recorded(options, *FITTED, k))
            for policy, share in itertools.product(options.policies, options.shares):
                if k or policy not in NEEDS_DRAFT:
                    error = fits[k].error(policy, *recorded(options, policy, share, k))
                    rows.setdefault((k, policy, share), []).append(round(error, 4))
                    print(f"{k} draft tokens, {policy}, {share}: {100 * error:+.1f} %", file=sys.stderr, flush=True)
    stored = [
        {"k": k, "policy": policy, "resident": share, "errors": errors} for (k, policy, share), errors in rows.items()
    ]
    fitted = {str(k): dataclasses.asdict(fit.costs) | {"link_bytes_per_s": fit.link} for k, fit in fits.items()}
    run = {"model": Path(options.model).name, "link": options.link, "threads": options.threads}
    options.out.write_text(store.whole(run | {"fitted": fitted, "rows": stored}), encoding="utf-8")
    return 0


def parser() -> Any:
    made = store.parser(__doc__)
    made.add_argument("model")
    made.add_argument("--draft", help="a twin, for runs of --k drafted tokens; without one none is drafted")
    made.add_argument("--k", type=int, default=2)
    made.add_argument("--link", help="emulated: 12.5GB/s; the machine's own by default")
    made.add_argument("--threads", type=int, default=system.usable_cpus())
    made.add_argument("--policies", type=store.names, default=["lru", "lfru", "twin", "waits"])
    made.add_argument("--shares", type=store.names, default=["1/4", "1/2", "3/4"])
    made.add_argument("-n", "--n-tokens", type=int, default=32)
    made.add_argument("-r", "--rounds", type=int, default=3)
    return made


if __name__ == "__main__":
    sys.exit(main())
