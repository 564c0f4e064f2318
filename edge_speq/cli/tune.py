"""edge-speq tune: find the fastest options for a model on this machine, and store them for later runs.

With --learn it trains a predictor of experts on traces instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_speq.cli import arguments
from edge_speq.cli.console import table
from edge_speq.cli.progress import Line
from edge_speq.errors import EdgeError
from edge_speq.units import format_rate

if TYPE_CHECKING:
    from edge_speq.planning.profile import TuneProfile
    from edge_speq.policies.learned.network_file import Weights
    from edge_speq.trace import Trace

SECONDS = 150.0


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="find the fastest options for a model",
        description="Measures steps, draft tokens, misses and threads on this machine. Predicts the fastest draft "
        "length, on-miss mode and number of threads, checks them against the defaults, and stores a profile that run, "
        "chat and serve use. With --learn it instead trains a predictor of experts on traces (needs torch), for "
        "--predictor of run, chat, serve, bench and simulate.",
    )
    arguments.add_model_file(p)
    p.add_argument(
        "--draft",
        metavar="D[,D...]",
        action="append",
        help="draft file, self or ngram; from a list like none,self,draft.gguf the fastest is chosen, for runs without "
        "--draft",
    )
    p.add_argument("--resident", metavar="SHARE", help="share of the expert bytes that slots may hold: 1/4, 0.25")
    p.add_argument(
        "--vram-budget", "--vram", metavar="SIZE", help="limit for everything on the compute device: 6GiB, auto"
    )
    p.add_argument(
        "-c",
        "--ctx-size",
        metavar="N",
        type=arguments.at_least(1, "tokens"),
        help="context (the model's, at most 4096)",
    )
    p.add_argument("--mmap", action=argparse.BooleanOptionalAction, help="map the file, or read it into memory")
    p.add_argument("--seconds", metavar="S", type=float, default=SECONDS, help="time limit (%(default)g)")
    p.add_argument("--dry-run", action="store_true", help="do not store the profile")
    p.add_argument("--learn", metavar="TRACE", nargs="+", help="train a predictor on files of edge-speq trace")
    p.add_argument("-o", "--out", metavar="FILE", type=Path, help="predictor that --learn writes, an npz file")
    p.add_argument("--seed", metavar="S", type=int, default=1, help="seed of --learn (%(default)s)")
    arguments.add_output(p, json="print one JSON object")
    p.set_defaults(command=tune, policy="auto", threads=None)


def tune(options: argparse.Namespace) -> int:
    arguments.settle_model(options)
    if options.learn is not None or options.out is not None:
        return learn(options)
    from edge_speq.planning import profile as profiles
    from edge_speq.tune import choose_draft
    from edge_speq.tune.tuner import TuneOptions, Tuner

    if options.seconds <= 0:
        raise EdgeError("--seconds must be more than 0", f"write it like --seconds {SECONDS:g}", usage=True)
    several = choose_draft.names(options.draft or [])
    chooses = several == [choose_draft.NONE] or len(several) > 1
    options.draft = None if not several else ",".join(several) if chooses else several[0]
    arguments.with_demo_defaults(options)
    bounds = {"resident": options.resident, "vram_budget": options.vram_budget}
    request = TuneOptions(options.model, options.draft, bounds, arguments.llama_options(options), options.seconds)
    with Line(name="tune", quiet=options.json) as line:
        found = choose_draft.Choice(request, several, line.say).run() if chooses else Tuner(request, line.say).run()
    path = None if options.dry_run else profiles.store(found)
    summary = {"profile": None if path is None else str(path), **dataclasses.asdict(found)}
    print(json.dumps(summary) if options.json else report(found))
    if path is not None and not options.json:
        where = " with this MODEL and without --draft" if chooses else ""
        print(f"stored     {path}: run, chat and serve{where} use it (--no-profile ignores it)", file=sys.stderr)
    return 0


def learn(options: argparse.Namespace) -> int:
    if options.learn is None or options.out is None:
        raise EdgeError("--learn TRACE and -o FILE go together", "give both", usage=True)
    is_other = (
        options.out.exists() and not options.out.is_file()
    )  # a folder, or a device file that a rename would replace
    if is_other or not options.out.absolute().parent.is_dir():
        raise EdgeError(f"cannot write {options.out}", "give a file in a folder that exists", usage=True)
    from edge_speq import trace
    from edge_speq.policies.learned import network_file
    from edge_speq.tune.learned import train_network as training

    traces = [trace.read(path) for path in options.learn]
    if options.model is not None:
        _require_model(options.model, traces)
    with Line(name="tune", quiet=options.json) as line:
        made = training.learn(traces, seed=options.seed, say=line.say)
    network_file.write(made, options.out)
    print(json.dumps({"foresight": str(options.out), **made.meta}) if options.json else learned(made))
    if not options.json:
        print(f"stored     {options.out}: --predictor {options.out} uses it", file=sys.stderr)
    return 0


def _require_model(model: str, traces: list[Trace]) -> None:
    from edge_speq.gguf.model import check_model, hyperparameter

    file = check_model(model)
    n_expert = hyperparameter(file, "expert_count")
    for found in traces:
        if found.experts.n_expert != n_expert:
            raise EdgeError(
                f"{found.path} is of a model with {found.experts.n_expert} experts, {model} has {n_expert}",
                "record this one: edge-speq trace MODEL",
                usage=True,
            )


def learned(made: Weights) -> str:
    """Return what a predictor was trained on and its precision and recall, as lines."""
    held, meta = made.meta["held_out"], made.meta
    knows = "tokens alone" if made.draft is None else "tokens and the draft's routing"
    return "\n".join(
        [
            f"learned    from {meta['steps']} steps, {meta['tokens']} known tokens; inputs: {knows}",
            f"held out   {held['steps']} steps: experts of the coming step, precision {held['precision']:.2f}, "
            f"recall {held['recall']:.2f}",
        ]
    )


def report(found: TuneProfile) -> str:
    """Return costs, candidates, measurements and the choice, as lines."""
    costs, results = found.found["costs"], found.found
    widths = ", ".join(f"{ms:.2f} of {width}" for width, ms in costs["base_ms"].items())
    lines = [f"steps      {widths} tokens, in ms without stalls, plus {costs['overhead_ms']:.2f} ms per token"]
    if costs["k_max"]:
        accepted = ", ".join(f"{100 * share:.0f} %" for share in costs["accepted"])
        lines.append(
            f"draft      {costs['draft_ms']:.2f} ms per token; first 1, 2, ... accepted in {accepted} of the steps"
        )
    if costs["link_bytes_per_s"]:
        lines.append(f"link       {format_rate(costs['link_bytes_per_s'])} on demand")
    if costs["hybrid"]:
        hybrid = costs["hybrid"]
        lines.append(
            f"hybrid     {1e3 * hybrid['miss_ms']:.0f} us per miss, {hybrid['miss_ratio']:.2f} times as many misses"
        )
    threads = ", ".join(f"{sum(ms.values()):.2f} ms with {n}" for n, ms in costs["threads_ms"].items())
    lines.append(f"threads    {threads}")
    for candidate in results["candidates"][:3]:
        lines.append(f"predicted  {candidate['predicted_tok_per_s']:.1f} tok/s: {_candidate(candidate)}")
    lines += [_checked(one) for one in results["checked"] if one["tok_per_s"]]
    if "drafts" in results:
        lines += _drafts(results["drafts"])
    lines += [f"left out   {text}" for text in results["skipped"]]
    return "\n".join([*lines, f"chosen     {_named(found.chosen)}"])


def _candidate(candidate: dict[str, Any]) -> str:
    share = "" if candidate["resident"] is None else f", {100 * candidate['resident']:.0f} % of the experts in slots"
    return f"K {candidate['draft_tokens']}, on miss {candidate['on_miss']}{share}"


def _checked(one: dict[str, Any]) -> str:
    error = one["prediction_error"]
    note = "the defaults, without a profile" if error is None else f"predicted {100 * error:+.0f} %"
    return f"measured   {one['tok_per_s']:.1f} tok/s: {_named(one['chosen'])} ({note})"


def _drafts(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of the drafts that fit: size, acceptance, prediction quality, and the fastest run with each."""
    heads = ("draft", "MiB", "slots", "K", "accepted", "tokens", "precision", "recall", "predicted", "runs K", "hits")
    cells = [(*heads, "tok/s"), *(_cells(row) for row in rows if row["left_out"] is None)]
    return [f"{'' if i else 'drafts':10} {line}" for i, line in enumerate(table(cells))]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def text(name: str, form: str) -> str:
        return "-" if row[name] is None else format(row[name], form)

    size, k = f"{row['draft_bytes'] / 2**20:.1f}", str(row["parameters"]["draft_tokens"])
    guessed = (
        text("acceptance", ".0%"),
        text("tokens_per_step", ".2f"),
        text("precision", ".2f"),
        text("recall", ".2f"),
    )
    measured = (text("predicted_tok_per_s", ".0f"), k, text("hit_rate", ".0%"), text("tok_per_s", ".0f"))
    return row["draft"], size, text("resident", ".0%"), text("k", "d"), *guessed, *measured


def _named(chosen: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in chosen.items())
