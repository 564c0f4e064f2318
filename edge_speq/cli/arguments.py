"""Command-line options that several commands share, made from LoadRequest's table, and loading with them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edge_speq.cli import progress
from edge_speq.core import OWN_POLICIES, PUBLISHED_POLICIES, SLOT_POLICIES
from edge_speq.errors import EdgeError
from edge_speq.gguf import bundled
from edge_speq.planning.load_request import DEFAULTS, OPTIONS, Option

if TYPE_CHECKING:
    from edge_speq.engine.llama import EdgeLlama

DEMO_RESIDENT = "1/2"
DEMO_SEED = 7
DEFAULT_CONTEXT = 4096
CONTEXT_STEP = 256  # llama_context pads n_ctx to this many cells

PLACEMENT = ("draft", "resident", "vram_budget", "draft_tokens", "policy", "on_miss", "next_layer_prefetch")
TRANSFERS = ("throttle_link", "deterministic")
LEARNED = ("predictor", "latency_limit_ms")

# policies for bench and simulate only: published systems, and the oracle
FOR_COMPARISON = (*(name for name in PUBLISHED_POLICIES if name != "lru"), "oracle")
RUN_POLICIES = ("auto", "cpu-moe", "all")
OTHER_POLICIES = tuple(name for name in (*OWN_POLICIES, "lru") if name not in (*RUN_POLICIES, *FOR_COMPARISON))


def add_model(p: argparse.ArgumentParser, *, compares: bool = False) -> None:
    """Add MODEL and the options of its load. `compares`: also accept the policies of published systems."""
    add_model_file(p)
    for name in PLACEMENT:
        add_option(p, name, **({} if name != "policy" or compares else {"type": run_policy}))
    p.add_argument(
        "-c",
        "--ctx-size",
        metavar="N",
        type=at_least(1, "tokens of context"),
        help=f"tokens of context (the model's, at most {DEFAULT_CONTEXT})",
    )
    p.add_argument(
        "--mmap",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="map the file, or read it into memory (default: the faster one, if there is memory for it)",
    )
    p.add_argument("-t", "--threads", metavar="N", type=at_least(1, "threads"), help="CPU threads")


def add_model_file(p: argparse.ArgumentParser, help: str = "a GGUF file (default: the bundled MoE)") -> None:
    """Add MODEL, and -m as another spelling."""
    p.add_argument("model", nargs="?", metavar="MODEL", help=help)
    p.add_argument("-m", "--model", metavar="MODEL", dest="model_option", help=argparse.SUPPRESS)


def add_transfers(p: argparse.ArgumentParser) -> None:
    for name in TRANSFERS:
        add_option(p, name)


def add_profile(p: argparse.ArgumentParser) -> None:
    p.add_argument("--no-profile", action="store_true", help="ignore the stored result of edge-speq tune")
    for name in LEARNED:
        add_option(p, name)


def add_option(p: argparse.ArgumentParser, name: str, **changes: Any) -> None:
    """Add a field of LoadRequest with its spelling and help. `changes`: other keywords of add_argument."""
    option, default = OPTIONS[name], DEFAULTS[name]
    keywords: dict[str, Any] = {"dest": name, "default": default, "help": _help(option, default)}
    if option.is_switch:
        keywords["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
    elif option.choices is not None:
        keywords["choices"] = option.choices
    else:
        keywords |= {"metavar": option.metavar, "type": parser_of(option)}
    p.add_argument(*option.flags, **keywords | changes)


def _help(option: Option, default: Any) -> str:
    return option.help if default is None or option.is_switch else f"{option.help} (default: {default})"


def parser_of(option: Option) -> Callable[[str], Any]:
    """Return the option's parser for the command line. Its errors name the option's flag."""

    def parse(text: str) -> Any:
        try:
            value: str | float = float(text) if option.unit == "milliseconds" else text
            return option.parse(value)
        except ValueError:
            raise EdgeError(f"{option.flag} {text}: not a number", "write it like 40", usage=True) from None
        except EdgeError as error:
            raise EdgeError(
                f"{option.flag} {text}{_after_value(error.message, text)}", error.hint, usage=True
            ) from None

    return parse


def _after_value(message: str, text: str) -> str:
    """Return an error message without its leading `name=value`, which the flag replaces."""
    _, found, rest = message.partition(f"={text!r}")
    return rest if found else f": {message}"


def at_least(least: int, what: str, zero: str = "") -> Callable[[str], int]:
    """Return a parser of whole numbers. It raises EdgeError (usage) below `least`. `zero` says what 0 means."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise EdgeError(
                f"{text} is not a count of {what}", f"give {max(1, least) if zero else least} or more{zero}", usage=True
            )
        return value

    return parse


def temperature(text: str) -> float:
    """Return a sampling temperature. Raises EdgeError (usage) unless it is a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise EdgeError(f"{text} is not a temperature", "give 0 or more", usage=True)
    return value


def add_sampling(p: argparse.ArgumentParser, n_predict: int) -> None:
    p.add_argument(
        "-n",
        "--n-predict",
        metavar="N",
        type=at_least(0, "tokens", ", or 0 for as many as fit"),
        default=n_predict,
        help="tokens to generate at most, 0: until the context is full (%(default)s)",
    )
    p.add_argument(
        "--seed", metavar="S", type=at_least(0, "a seed"), help=f"seed of the sampler (bundled model: {DEMO_SEED})"
    )
    p.add_argument("--temp", metavar="T", type=temperature, default=0.8, help="temperature, 0 is greedy (%(default)s)")


def add_output(p: argparse.ArgumentParser, json: str) -> None:
    p.add_argument("--json", action="store_true", help=json)
    p.add_argument("-v", "--verbose", action="store_true", help="show the log")


def settle_model(arguments: argparse.Namespace) -> None:
    """Use the model of -m if MODEL is left out. Raises EdgeError (usage) if both are given."""
    named = getattr(arguments, "model_option", None)
    if named is not None and arguments.model is not None:
        raise EdgeError("MODEL and -m are both given", "leave one of them out", usage=True)
    arguments.model = arguments.model or named
    arguments.model_option = None


def run_policy(policy: str) -> str:
    """Return the policy. Raises EdgeError (usage) for policies of bench and simulate only."""
    if policy in FOR_COMPARISON:
        raise EdgeError(
            f"policy {policy} is only for comparison, in bench and simulate",
            f"use edge-speq bench or simulate with it, or one of {', '.join((*RUN_POLICIES, *OTHER_POLICIES))} here",
            usage=True,
        )
    return str(parser_of(OPTIONS["policy"])(policy))


def with_demo_defaults(arguments: argparse.Namespace) -> None:
    """Without a model, use the bundled model and draft, with half of the experts resident unless there is a bound."""
    settle_model(arguments)
    if arguments.model is not None:
        return
    arguments.model = str(bundled.path(bundled.MODEL))
    arguments.draft = arguments.draft or str(bundled.path(bundled.DRAFT))
    if getattr(arguments, "seed", DEMO_SEED) is None:
        arguments.seed = DEMO_SEED
    if arguments.resident is None and arguments.vram_budget is None and arguments.policy in SLOT_POLICIES:
        arguments.resident = DEMO_RESIDENT


def edge_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that are options of LoadRequest; rare options only if they differ from their defaults."""
    given = {name: getattr(arguments, name) for name in PLACEMENT if hasattr(arguments, name)}
    for name in (*TRANSFERS, *LEARNED):
        value = getattr(arguments, name, None)
        if value is not None and value != DEFAULTS[name]:
            given[name] = value
    if not getattr(arguments, "no_profile", True):
        given["profile"] = "auto"
    return given


def llama_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of llama_cpp.Llama. Warns if the context is longer than the trained one."""
    from edge_speq.runtime.loading import trained_context

    trained = trained_context(arguments.model)
    n_ctx = arguments.ctx_size or min(trained, DEFAULT_CONTEXT)
    if n_ctx > trained:
        print(
            f"warning: -c {n_ctx} is beyond the {trained} tokens that the model was trained for: text will degrade",
            file=sys.stderr,
        )
    # llama.cpp rounds the context up to this many cells, and llama_cpp.Llama would not use the last ones
    options: dict[str, Any] = {"n_ctx": -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP}
    if arguments.mmap is not None:
        options["use_mmap"] = arguments.mmap
    if arguments.threads:
        options |= {"n_threads": arguments.threads, "n_threads_batch": arguments.threads}
    return options


def load(arguments: argparse.Namespace, **more: Any) -> EdgeLlama:
    """Load the model, with a progress line on a terminal. `more`: keywords of EdgeLlama."""
    from edge_speq.engine.llama import EdgeLlama

    options = edge_options(arguments) | llama_options(arguments) | more
    if arguments.json or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return EdgeLlama(arguments.model, **options)
    with progress.Line(sys.stderr) as line:
        return EdgeLlama(arguments.model, progress=line, **options)
