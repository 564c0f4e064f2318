"""edge-speq trace: record the routing of generated text, for edge-speq simulate."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_speq.cli import arguments, interrupt
from edge_speq.errors import EdgeError
from edge_speq.units import format_bytes

if TYPE_CHECKING:
    from edge_speq.bench.recorder import Recorder
    from edge_speq.texts import Prompt

LLAMA_CPP_LOG = logging.getLogger("edge_speq.llama_cpp")


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "trace",
        help="record routing for simulate",
        description="Generates text after each prompt and records every step: tokens, expert ids, the draft's routing, "
        "accepted tokens and times. Ctrl-C ends it and keeps the recorded steps.",
    )
    arguments.add_model(p, compares=True)
    p.add_argument(
        "own_prompts",
        nargs="?",
        metavar="PROMPTS",
        help='JSON lines with "prompt" and optionally "domain" (bundled prompts)',
    )
    p.add_argument("-o", "--out", metavar="FILE", type=Path, required=True, help="trace to write, an npz file")
    p.add_argument(
        "--texts",
        metavar="N",
        type=arguments.at_least(1, "texts"),
        default=1,
        help="bundled prompts of each class (%(default)s)",
    )
    p.add_argument(
        "--lookahead",
        metavar="N",
        type=arguments.at_least(0, "tokens"),
        default=0,
        help="tokens that the draft decodes ahead, to record their routing (%(default)s)",
    )
    p.add_argument("--gates", action="store_true", help="also record gate weights, which is slower")
    arguments.add_transfers(p)
    arguments.add_sampling(p, n_predict=64)
    arguments.add_output(p, json="print one JSON object about the trace")
    p.set_defaults(command=trace)


def trace(options: argparse.Namespace) -> int:
    from edge_speq import texts as prompts
    from edge_speq.trace import Writer

    texts = prompts.from_file(Path(options.own_prompts)) if options.own_prompts else prompts.bundled(options.texts)
    _refuse_unwritable(options.out)
    model = _load(options)
    stop = interrupt.Stop()
    try:
        about = [{"id": prompt.id, "domain": prompt.domain} for prompt in texts.chosen]
        with (
            interrupt.handler(lambda *_: _stop(stop, model), at_once=lambda: _hush(model)),
            Writer(options.out, model.meta() | {"prompts": about}) as out,
        ):
            model.sink = out.add
            done = _record(model, texts.chosen, options, stop)
            out.meta |= model.meta() | {"n_passages": done}
            out.complete = not stop.requested
    finally:
        model.close()
        LLAMA_CPP_LOG.setLevel(logging.NOTSET)
    _report(options, out.meta, out.n_steps, complete=not stop.requested)
    return interrupt.EXIT_CODE if stop.requested else 0


def _refuse_unwritable(path: Path) -> None:
    """Raise EdgeError if the trace cannot be written, before the model is loaded."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise EdgeError(f"cannot write {path}", "give a file in a folder that exists", usage=True)


def _load(options: argparse.Namespace) -> Recorder:
    from edge_speq.bench.recorder import Recorder
    from edge_speq.gguf import bundled

    arguments.settle_model(options)
    if options.model is None:  # everything resident: routing does not depend on slots
        options.model = str(bundled.path(bundled.MODEL))
        options.draft = options.draft or str(bundled.path(bundled.DRAFT))
    given = arguments.edge_options(options) | arguments.llama_options(options)
    model = Recorder(options.model, lookahead=options.lookahead, gates=options.gates, **given)
    if not model.has_routing:
        model.close()
        raise EdgeError(f"{options.model} has no routed experts to record", "give a MoE model")
    return model


def _record(model: Recorder, chosen: tuple[Prompt, ...], options: argparse.Namespace, stop: interrupt.Stop) -> int:
    """Record the prompts, and return how many were recorded to their end."""
    for index, prompt in enumerate(chosen):
        if stop.requested:
            return index
        if sys.stderr.isatty():
            print(f"\r\x1b[K{index + 1} of {len(chosen)}: {prompt.id}", end="", file=sys.stderr, flush=True)
        model.begin_passage(index)
        try:
            model.create_completion(
                prompt.text, max_tokens=options.n_predict, temperature=options.temp, seed=options.seed
            )
        except EdgeError:
            if not stop.requested:
                raise
            return index
        finally:
            model.write()
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return len(chosen)


def _stop(stop: interrupt.Stop, model: Recorder) -> None:
    stop()
    _hush(model)


def _hush(model: Recorder) -> None:
    """Cancel the running graph, and hide the errors that llama.cpp logs for it."""
    LLAMA_CPP_LOG.setLevel(logging.CRITICAL)
    model.cancel()


def _report(options: argparse.Namespace, meta: dict[str, Any], n_steps: int, *, complete: bool) -> None:
    if not n_steps:
        print("trace: interrupted before the first step, no file was written", file=sys.stderr)
        return
    n_bytes = options.out.stat().st_size
    if options.json:
        about = {"trace": str(options.out), "steps": n_steps, "bytes": n_bytes, "complete": complete}
        print(json.dumps(about | {"speculation": meta["speculation"], "counters": meta["counters"]}))
        return
    ended = "" if complete else ", interrupted"
    print(f"{options.out}: {n_steps} steps, {format_bytes(n_bytes)}{ended}", file=sys.stderr)
