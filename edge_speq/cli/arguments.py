"""The options that several commands share, and the model that they describe."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from edge_speq.cli import progress
from edge_speq.core import COMPUTES, POLICIES, SLOT_POLICIES
from edge_speq.gguf import bundled as demo
from edge_speq.units import parse_policy

if TYPE_CHECKING:
    from edge_speq.engine.llama import EdgeLlama

DEMO_RESIDENT = "1/2"
DEMO_SEED = 7
DEFAULT_CONTEXT = 4096
CONTEXT_STEP = 256  # llama_context pads n_ctx to this many cells


def add_model(p: argparse.ArgumentParser) -> None:
    """What a model is, where it may go and how it computes."""
    p.add_argument("model", nargs="?", metavar="MODEL", help="a GGUF file; the bundled MoE when left out")
    p.add_argument("--draft", metavar="D", help="a draft GGUF, a twin's experts alone, self or ngram")
    p.add_argument("--resident", metavar="SHARE", help="share of the expert bytes that slots may hold: 1/4, 0.25")
    p.add_argument("--vram-budget", "--vram", metavar="SIZE", help="ceiling for everything on the device: 6GiB, auto")
    p.add_argument("--speculation", metavar="K", default="auto", help="draft tokens per step, or auto (%(default)s)")
    p.add_argument(
        "--policy", metavar="P", type=parse_policy, default="auto", help=f"{', '.join(POLICIES)} (%(default)s)"
    )
    p.add_argument("--compute", choices=COMPUTES, default="auto", help="where missing experts run (%(default)s)")
    p.add_argument("-c", "--ctx-size", metavar="N", type=int, help=f"context (the model's, at most {DEFAULT_CONTEXT})")
    p.add_argument(
        "--mmap",
        action=argparse.BooleanOptionalAction,
        help="map the file, or read it into memory; left out, what is faster where there is memory for it",
    )
    p.add_argument("-t", "--threads", metavar="N", type=int, help="CPU threads")


def add_transfers(p: argparse.ArgumentParser) -> None:
    p.add_argument("--link", metavar="RATE", help="slow transfers down to this, as on another machine: 12.5GB/s")
    p.add_argument(
        "--deterministic", action="store_true", help="transfers take virtual time: counters repeat for a seed"
    )


def add_profile(p: argparse.ArgumentParser) -> None:
    p.add_argument("--no-profile", action="store_true", help="ignore what edge-speq tune found for this model")
    p.add_argument("--foresight", metavar="FILE", help="of tune --learn, for auto and learned; of trace, for oracle")
    p.add_argument(
        "--latency-limit",
        metavar="MS",
        dest="latency_limit_ms",
        type=float,
        help="most milliseconds for drafting and verifying a step, with --speculation auto",
    )


def add_sampling(p: argparse.ArgumentParser, n_predict: int) -> None:
    p.add_argument(
        "-n",
        "--n-predict",
        metavar="N",
        type=int,
        default=n_predict,
        help="most tokens, 0 for as many as fit (%(default)s)",
    )
    p.add_argument("--seed", metavar="S", type=int, help=f"of the sampler (the demo's is {DEMO_SEED})")
    p.add_argument("--temp", metavar="T", type=float, default=0.8, help="temperature, 0 is greedy (%(default)s)")


def add_output(p: argparse.ArgumentParser, json: str) -> None:
    p.add_argument("--json", action="store_true", help=json)
    p.add_argument("-v", "--verbose", action="store_true", help="show the log")


def with_demo_defaults(arguments: argparse.Namespace) -> None:
    """Without a model: the bundled pair, half of the experts resident unless the arguments bound them."""
    if arguments.model is not None:
        return
    arguments.model = str(demo.path(demo.MODEL))
    arguments.draft = arguments.draft or str(demo.path(demo.DRAFT))
    if getattr(arguments, "seed", DEMO_SEED) is None:
        arguments.seed = DEMO_SEED
    if arguments.resident is None and arguments.vram_budget is None and arguments.policy in SLOT_POLICIES:
        arguments.resident = DEMO_RESIDENT


def edge_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that EdgeLlama adds to those of llama_cpp.Llama, the rarer ones where they were given."""
    names = ["draft", "resident", "vram_budget", "speculation", "policy", "compute"]
    names += [name for name in ("foresight", "latency_limit_ms") if getattr(arguments, name, None) is not None]
    return {name: getattr(arguments, name) for name in names}


def llama_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of llama_cpp.Llama itself."""
    from edge_speq.runtime.loading import trained_context

    n_ctx = arguments.ctx_size or min(trained_context(arguments.model), DEFAULT_CONTEXT)
    # llama.cpp makes that many cells and llama_cpp.Llama would leave the last ones unused
    options: dict[str, Any] = {"n_ctx": -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP}
    if arguments.mmap is not None:
        options["use_mmap"] = arguments.mmap
    if arguments.threads:
        options |= {"n_threads": arguments.threads, "n_threads_batch": arguments.threads}
    return options


def profile(arguments: argparse.Namespace) -> str | None:
    """EdgeLlama's argument of that name."""
    return None if getattr(arguments, "no_profile", True) else "auto"


def load(arguments: argparse.Namespace, **more: Any) -> EdgeLlama:
    """The model, with a line of progress on a terminal when that takes a while. more: EdgeLlama's."""
    from edge_speq.engine.llama import EdgeLlama

    class Watched(EdgeLlama):
        def _configure(self, model_params: Any, context_params: Any) -> None:
            super()._configure(model_params, context_params)
            self._progress = progress.attach(model_params, line)

    options = edge_options(arguments) | llama_options(arguments)
    options |= {"link": arguments.link, "deterministic": arguments.deterministic, "profile": profile(arguments)}
    options |= more
    if arguments.json or not sys.stderr.isatty():
        return EdgeLlama(arguments.model, **options)
    with progress.Line(sys.stderr) as line:
        return Watched(arguments.model, **options)
