"""Every option of a model's load, declared once: its name, default, unit, parser, help text and command-line spelling.

`EdgeLlama`, `Session`, the commands, the server, bench, tune's profiles and docs/reference/options.md read this table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_speq.core import ON_MISS, OWN_POLICIES, POLICIES, PUBLISHED_POLICIES
from edge_speq.errors import EdgeError, did_you_mean
from edge_speq.units import parse_bytes, parse_draft_tokens, parse_rate, parse_share, require_choice

if TYPE_CHECKING:
    from edge_speq.planning.shared_budget import Budget

READS_PREDICTOR = ("auto", "learned")  # policies that use a file of `edge-speq tune --learn`
READS_TRACE = ("oracle",)


@dataclass(frozen=True, slots=True)
class Option:
    """Spelling, parser and help text of one field of LoadRequest. Without a `flag` the command line lacks it."""

    help: str
    parse: Callable[[Any], Any]
    flag: str | None = None
    aliases: tuple[str, ...] = ()
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    unit: str = ""
    accepts: str = ""  # type annotation for callers, if the parser accepts more types than it returns
    is_switch: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        return () if self.flag is None else (self.flag, *self.aliases)


def _option(default: Any, help: str, parse: Callable[[Any], Any] = lambda value: value, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(help, parse, **more)})


def _optional(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


def parse_budget(value: Any) -> Any:
    """Return a size in bytes; return None, "auto" and a shared Budget unchanged. Raises EdgeError for other values."""
    if value is None or value == "auto" or hasattr(value, "admit"):
        return value
    return parse_bytes(value, "vram_budget")


def parse_flag(name: str) -> Callable[[Any], bool]:
    """Return a parser that accepts True and False only. It raises EdgeError for other values, such as the text "no"."""

    def parse(value: Any) -> bool:
        if not isinstance(value, bool):
            raise EdgeError(f"{name}={value!r} is neither True nor False", "give one of them", usage=True)
        return value

    return parse


def parse_n_keep(value: Any) -> int:
    """Return a number of tokens, or -1 for the whole prompt. Raises EdgeError for other values."""
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise EdgeError(f"n_keep={value!r} is not a number of tokens", "give 0 or more, or -1", usage=True)
    return value


def parse_milliseconds(value: Any) -> float:
    """Return a positive number of milliseconds. Raises EdgeError for other values."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise EdgeError(f"latency_limit_ms={value!r} is not a time", "give milliseconds, more than 0", usage=True)
    return float(value)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Checked options of one model load. Sizes are parsed to bytes, rates to bytes per second, shares to 0..1.

    Raises EdgeError (usage) for a value that cannot be parsed and for options that exclude each other.
    """

    model: str
    draft: str | Path | None = _option(
        None,
        "source of draft tokens and expert predictions: a GGUF file with the same vocabulary, a file of convert draft "
        "--experts-only, self (the model with its slots), or ngram (repeats earlier text)",
        flag="--draft",
        metavar="DRAFT",
    )
    draft_model: Any = _option(None, "a llama_cpp.llama_speculative.LlamaDraftModel object in place of draft")
    resident: float | None = _option(
        None,
        "share of the routed-expert bytes that slots may hold, such as 1/4 or 0.25",
        _optional(parse_share),
        flag="--resident",
        metavar="SHARE",
        unit="share",
        accepts="float | str | None",
    )
    vram_budget: int | str | Budget | None = _option(
        None,
        "limit for everything on the compute device (weights, KV cache, draft, buffers, slots): a size such as 6GiB, "
        "auto (free memory less 512 MiB), or in Python a shared Budget",
        parse_budget,
        flag="--vram-budget",
        aliases=("--vram",),
        metavar="SIZE",
        unit="bytes",
    )
    draft_tokens: int | str = _option(
        "auto",
        "draft tokens per step: 0 to 64, or auto (the number that measures fastest)",
        parse_draft_tokens,
        flag="--draft-tokens",
        metavar="K",
        unit="tokens",
    )
    policy: str = _option(
        "auto",
        "which experts stay on the device: auto (all if they fit, otherwise slots), cpu-moe (none), all; for "
        "comparison also those of docs/reference/policies.md",
        lambda value: require_choice("policy", value, POLICIES),
        flag="--policy",
        metavar="POLICY",
    )
    on_miss: str = _option(
        "auto",
        "how to serve an expert that is not in a slot: fetch it to the device, hybrid (the CPU computes some while "
        "others are fetched), auto (the faster one)",
        lambda value: require_choice("on_miss", value, ON_MISS),
        flag="--on-miss",
        choices=ON_MISS,
    )
    next_layer_prefetch: bool | None = _option(
        None,
        "prefetch the experts that a block's input predicts for the next block; on by default on a GPU unless on_miss "
        "is fetch",
        _optional(parse_flag("next_layer_prefetch")),
        flag="--next-layer-prefetch",
        is_switch=True,
    )
    context_shift: bool = _option(
        False,
        "when the context is full, discard half of it and continue instead of ending the text",
        parse_flag("context_shift"),
    )
    n_keep: int = _option(
        0, "tokens at the front that a context shift keeps, -1 for the prompt", parse_n_keep, unit="tokens"
    )
    throttle_link: int | None = _option(
        None,
        "limit transfers to this rate, such as 12.5GB/s, to emulate another machine",
        _optional(lambda value: parse_rate(value, "throttle_link")),
        flag="--throttle-link",
        metavar="RATE",
        unit="bytes per second",
        accepts="int | str | None",
    )
    deterministic: bool = _option(
        False,
        "use virtual transfer times and ignore the clock, so that text and counters repeat for a seed",
        parse_flag("deterministic"),
        flag="--deterministic",
        is_switch=True,
    )
    profile: str | Path | None = _option(
        None,
        'result of `edge-speq tune` for options left at their defaults: "auto" (the stored one for this model, draft '
        "and device) or a path",
    )
    predictor: str | Path | None = _option(
        None,
        "file written by `edge-speq tune --learn`, for policies auto and learned (experimental)",
        flag="--predictor",
        metavar="FILE",
    )
    trace: str | Path | None = _option(
        None, "file written by `edge-speq trace` for the same text, for policy oracle", flag="--trace", metavar="FILE"
    )
    latency_limit_ms: float | None = _option(
        None,
        "target for the longest time of one step (drafting and verifying), with draft_tokens auto",
        _optional(parse_milliseconds),
        flag="--latency-limit",
        metavar="MS",
        unit="milliseconds",
    )

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.parse(getattr(self, name)))
        if self.policy in ("all", "cpu-moe") and self.resident is not None:
            raise EdgeError(f"resident does not apply to policy {self.policy}", "leave one of them out", usage=True)
        self._require_one("draft", "draft_model")
        self._require_one("predictor", "trace")
        if self.draft_model is not None and not callable(self.draft_model):
            raise EdgeError("draft_model is not a LlamaDraftModel", "for a GGUF file use draft=", usage=True)
        self._require_reader("predictor", READS_PREDICTOR)
        self._require_reader("trace", READS_TRACE)
        if self.policy in READS_TRACE and self.trace is None:
            message = f"policy {self.policy} needs a trace of the same text"
            raise EdgeError(message, "record one: edge-speq trace", usage=True)
        if self.policy == "learned" and self.predictor is None:
            raise EdgeError("policy learned needs a predictor", "train one: edge-speq tune --learn", usage=True)
        self._require_possible_on_miss()

    def _require_one(self, first: str, second: str) -> None:
        if getattr(self, first) is not None and getattr(self, second) is not None:
            raise EdgeError(f"{first} and {second} are both given", "leave one of them out", usage=True)

    def _require_reader(self, name: str, policies: tuple[str, ...]) -> None:
        if getattr(self, name) is not None and self.policy not in policies:
            raise EdgeError(
                f"policy {self.policy} does not use a {name}", f"use policy {' or '.join(policies)}", usage=True
            )

    def _require_possible_on_miss(self) -> None:
        """Refuse on_miss values that a published system does not have: all fetch, except MoE-SpAc (CPU only)."""
        if self.policy == "moe-spac":
            if self.on_miss == "fetch":
                raise EdgeError("moe-spac computes missing experts on the CPU", "leave on_miss out", usage=True)
        elif self.policy in PUBLISHED_POLICIES and (self.on_miss == "hybrid" or self.next_layer_prefetch):
            raise EdgeError(
                f"policy {self.policy} fetches every miss: it has no hybrid execution and no next-layer prefetch",
                f"use policy {' or '.join(OWN_POLICIES[:2])}, or on_miss=fetch",
                usage=True,
            )
        if self.on_miss == "fetch" and self.next_layer_prefetch:
            raise EdgeError(
                "next_layer_prefetch uses the link while the CPU computes misses, which on_miss=fetch never does",
                "use on_miss=hybrid or auto",
                usage=True,
            )

    def replace(self, **changes: Any) -> LoadRequest:
        """Return the same request with other values, checked again."""
        return dataclasses.replace(self, **changes)

    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, as keyword arguments of EdgeLlama."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) != DEFAULTS[name]}


OPTIONS: Mapping[str, Option] = {
    f.name: f.metadata["option"] for f in dataclasses.fields(LoadRequest) if "option" in f.metadata
}
DEFAULTS: Mapping[str, Any] = {f.name: f.default for f in dataclasses.fields(LoadRequest) if "option" in f.metadata}


def split_options(options: Mapping[str, Any], also: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two dicts: the options of LoadRequest and those of llama_cpp.Llama. `also` names the caller's own options.

    Raises EdgeError for an unknown option; the hint names the nearest known one.
    """
    from edge_speq.planning.load_options import LLAMA_OPTIONS

    ours = {name: value for name, value in options.items() if name in OPTIONS}
    theirs = {name: value for name, value in options.items() if name in LLAMA_OPTIONS and name not in OPTIONS}
    for name in options:
        if name not in ours and name not in theirs and name not in also:
            raise unknown_option(name, (*OPTIONS, *LLAMA_OPTIONS, *also))
    return ours, theirs


def unknown_option(name: str, known: tuple[str, ...]) -> EdgeError:
    """Return the error for an unknown option, with the nearest known one as its hint."""
    hint = did_you_mean(name, known, "docs/reference/options.md lists them")
    return EdgeError(f"{name} is not an option", hint, usage=True)
