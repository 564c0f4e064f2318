"""edge-speq bench: compare the speed of policies, with llama-bench's tests."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_speq import system
from edge_speq.cli import arguments, interrupt
from edge_speq.cli.progress import Line
from edge_speq.core import ON_MISS, POLICIES
from edge_speq.errors import EdgeError
from edge_speq.gguf import bundled
from edge_speq.planning.load_request import OPTIONS, READS_PREDICTOR, READS_TRACE
from edge_speq.units import parse_rate, require_choice

if TYPE_CHECKING:
    from edge_speq.bench.arms import BenchSettings
    from edge_speq.bench.runner import Series

LLAMA_CPP_LOG = logging.getLogger("edge_speq.llama_cpp")
DEFAULT_POLICIES = "auto,lru,cpu-moe,all"
DEFAULT_ON_MISS = "auto,fetch"
FORMATS = ("md", "csv", "json", "jsonl")
LOAD_MODES = ("auto", "mmap", "none")
RANGES = "Lists (1,2) and ranges (0-512+128, 1-64*2) make a matrix"


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure policies against each other",
        description=f"Compares policies with equal bytes on the compute device, with llama-bench's tests. {RANGES}.",
    )
    arguments.add_model_file(p)
    arguments.add_option(p, "draft")
    _add_tests(p)
    _add_competitors(p)
    p.add_argument(
        "-o", "--output", choices=FORMATS, default="md", help="format on stdout (%(default)s); jsonl after each share"
    )
    p.add_argument("--json", action="store_const", const="json", dest="output", help="the same as -o json")
    p.add_argument("-v", "--verbose", action="store_true", help="show the log")
    p.set_defaults(command=bench)


def _add_tests(p: argparse.ArgumentParser) -> None:
    p.add_argument("-p", "--n-prompt", metavar="N", action="append", help="tokens of prompt tests (512; 0: none)")
    p.add_argument("-n", "--n-gen", metavar="N", action="append", help="tokens of generation tests (128; 0: none)")
    p.add_argument("-pg", metavar="P,N", action="append", help="tests that read P tokens and generate N")
    p.add_argument("-d", "--n-depth", metavar="D", action="append", help="tokens in the context before the test (0)")
    repetitions = arguments.at_least(1, "repetitions")
    p.add_argument(
        "-r", "--repetitions", metavar="R", type=repetitions, default=5, help="repetitions of each test (%(default)s)"
    )
    p.add_argument("--no-warmup", action="store_true", help="do not run an uncounted round first")
    p.add_argument("-t", "--threads", metavar="T", action="append", help="CPU threads")
    p.add_argument("--prompts", metavar="FILE", help='own texts: JSON lines with "prompt" and optionally "domain"')
    texts = arguments.at_least(1, "texts")
    p.add_argument("--texts", metavar="N", type=texts, default=1, help="bundled texts of each class (%(default)s)")


def _add_competitors(p: argparse.ArgumentParser) -> None:
    p.add_argument("--policy", metavar="LIST", help=f"policies to compare: {', '.join(POLICIES)} ({DEFAULT_POLICIES})")
    p.add_argument(
        "--on-miss",
        metavar="LIST",
        help=f"ways to serve misses: {', '.join(ON_MISS)} ({DEFAULT_ON_MISS}; auto if --policy is given)",
    )
    arguments.add_option(p, "next_layer_prefetch")
    arguments.add_option(p, "predictor")
    arguments.add_option(p, "trace")
    p.add_argument("--draft-tokens", metavar="LIST", default="auto", help="draft tokens per step (%(default)s)")
    p.add_argument("--resident", metavar="LIST", help="shares of the expert bytes in slots, one after the other (1/4)")
    arguments.add_option(p, "vram_budget")
    p.add_argument("--baseline", metavar="POLICY", help="policy that speed-ups refer to (cpu-moe if it is listed)")
    p.add_argument(
        "-lm", "--load-mode", choices=LOAD_MODES, default="auto", help="loading of cpu-moe and all; auto tries both"
    )
    p.add_argument("--emulate", metavar="WHAT", help="emulate another machine: link=12.5GB/s,threads=6")
    arguments.add_transfers(p)


def bench(options: argparse.Namespace) -> int:
    chosen, shares = settings(options), _shares(options.resident)
    from edge_speq.bench.output import FORMATS
    from edge_speq.bench.runner import Series

    line, made = Line(name="bench"), list[Any]()
    series = Series(chosen, shares, _timed(line))
    try:
        with interrupt.handler(lambda *_: _stop(series), at_once=lambda: _stop_at_once(series)):
            for rows in _finished(series):
                made += rows
                if options.output == "jsonl" and rows:
                    line.erase()
                    print(FORMATS["jsonl"](rows), flush=True)
    finally:
        line.erase()
        LLAMA_CPP_LOG.setLevel(logging.NOTSET)
    if made and options.output != "jsonl":
        print(FORMATS[options.output](made))
    return interrupt.EXIT_CODE if series.stopped else 0


def _finished(series: Series) -> Iterator[list[Any]]:
    """Yield the rows of each share."""
    from edge_speq.bench import rows

    memory = system.memory()
    for job, results in series.run():
        hardware = rows.machine(system.cpu_model(), None if memory is None else memory[0])
        yield rows.rows(results, job, hardware)


def _stop(job: Series) -> None:
    """End the rounds at the first Ctrl-C, and the command at the second."""
    if job.interrupted:
        raise KeyboardInterrupt
    job.interrupted = True
    _stop_at_once(job)


def _stop_at_once(job: Series) -> None:
    """Stop the running graph. Called in another thread while the main one decodes; llama.cpp's messages are dropped."""
    LLAMA_CPP_LOG.setLevel(logging.CRITICAL)
    job.stop()


def _timed(line: Line) -> Callable[[str], None]:
    """Return a function that prints a message with the seconds since the start."""
    started = time.monotonic()
    return lambda text: line.say(f"{time.monotonic() - started:.1f} s: {text}")


# --- options ---------------------------------------------------------------------------------------------


def settings(options: argparse.Namespace) -> BenchSettings:
    """Return the checked options. Raises EdgeError (usage) for invalid ones."""
    from edge_speq.bench.arms import BenchSettings

    arguments.settle_model(options)
    emulated = emulation(options.emulate)
    model, draft = _models(options)
    policies = _list(options.policy or DEFAULT_POLICIES, "policy")
    on_miss = options.on_miss or (DEFAULT_ON_MISS if options.policy is None else "auto")
    drafts = dict.fromkeys(OPTIONS["draft_tokens"].parse(k) for k in _list(options.draft_tokens, "draft_tokens"))
    if options.throttle_link is not None and "link" in emulated:
        raise EdgeError("--throttle-link and --emulate link are both given", "leave one of them out", usage=True)
    link = parse_rate(emulated["link"], "--emulate link") if "link" in emulated else options.throttle_link
    return BenchSettings(
        model=model,
        draft=draft,
        policies=tuple(policies),
        draft_tokens=tuple(drafts) if draft else (0,),
        threads=_threads(options, emulated),
        cases=tuple(_cases(options)),
        texts=_texts(options),
        repetitions=options.repetitions,
        resident=_shares(options.resident)[0],
        vram_budget=options.vram_budget,
        baseline=_baseline(options.baseline, policies),
        throttle_link=link,
        on_miss=tuple(_list(on_miss, "on_miss")),
        next_layer_prefetch=options.next_layer_prefetch,
        deterministic=options.deterministic,
        emulation=",".join(f"{key}={value}" for key, value in emulated.items()) or None,
        load_mode=options.load_mode,
        warm_up=not options.no_warmup,
        predictor=_read_by(options.predictor, "--predictor", policies, READS_PREDICTOR),
        trace=_read_by(options.trace, "--trace", policies, READS_TRACE),
    )


def _list(text: str, name: str) -> list[str]:
    """Return the values of a comma-separated list, each checked with the option's parser."""
    from edge_speq.bench import matrix

    return matrix.choices(text, arguments.parser_of(OPTIONS[name]))


def _read_by(path: str | None, flag: str, policies: list[str], readers: tuple[str, ...]) -> str | None:
    """Return the path, after reading the file once, before models are loaded.

    Raises EdgeError if no policy reads the file, if it is invalid, or if a policy needs a file and there is no path.
    """
    from edge_speq.policies import oracle
    from edge_speq.policies.learned import network_file

    reading = [policy for policy in policies if policy in readers]
    if path is not None and not reading:
        raise EdgeError(f"no policy reads {flag} {path}", f"add {readers[0]} to --policy", usage=True)
    load = oracle.load_for_policy if readers == READS_TRACE else network_file.load_for_policy
    for policy in reading[-1:] if path is not None else reading:
        load(path, policy)
    return path


def emulation(text: str | None) -> dict[str, str]:
    """Return {"link": "12.5GB/s", "threads": "6"} for "link=12.5GB/s,threads=6". Raises EdgeError for other keys."""
    found: dict[str, str] = {}
    for part in text.split(",") if text else ():
        key, _, value = part.strip().partition("=")
        if key == "link":
            parse_rate(value, "--emulate link")
        elif key != "threads" or not value.isdecimal() or int(value) < 1:
            raise EdgeError(f"--emulate {part!r} is not known", "write it like link=12.5GB/s,threads=6", usage=True)
        found[key] = value
    return found


def _models(options: argparse.Namespace) -> tuple[str, str | None]:
    from edge_speq.drafting import spec
    from edge_speq.gguf import model as gguf_model

    if options.model is None:
        draft = options.draft or str(bundled.path(bundled.DRAFT))
        options.model = str(bundled.path(bundled.MODEL))
    else:
        draft = options.draft
    spec.read(draft, gguf_model.check_model(options.model))
    return options.model, draft


def _cases(options: argparse.Namespace) -> list[Any]:
    from edge_speq.bench import matrix

    return matrix.cases(
        _numbers(options.n_prompt or ["512"], "-p"),
        _numbers(options.n_gen or ["128"], "-n"),
        [matrix.pair(text, "-pg") for text in options.pg or []],
        _numbers(options.n_depth or ["0"], "-d"),
    )


def _numbers(texts: list[str], option: str) -> list[int]:
    from edge_speq.bench import matrix

    return [number for text in texts for number in matrix.numbers(text, option)]


def _threads(options: argparse.Namespace, emulated: dict[str, str]) -> tuple[int | None, ...]:
    if options.threads and "threads" in emulated:
        raise EdgeError("-t and --emulate threads are both given", "leave one of them out", usage=True)
    found = _numbers(options.threads or ([emulated["threads"]] if "threads" in emulated else []), "-t")
    if 0 in found:
        raise EdgeError("-t 0 is not a number of threads", "give at least 1", usage=True)
    return tuple(found) or (None,)


def _texts(options: argparse.Namespace) -> Any:
    from edge_speq import texts as prompts

    return prompts.from_file(Path(options.prompts)) if options.prompts else prompts.bundled(options.texts)


def _shares(text: str | None) -> list[str | None]:
    return [None] if text is None else [*_list(text, "resident")]


def _baseline(name: str | None, policies: list[str]) -> str:
    if name is not None:
        require_choice("baseline", name, policies)
    return name or ("cpu-moe" if "cpu-moe" in policies else policies[0])
