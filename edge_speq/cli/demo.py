"""edge-speq demo: the bundled MoE on a simulated laptop, with three ways to choose the experts on the device.

The model really runs; only time is simulated, so that counters repeat exactly. The virtual link is slowed down until a
transfer of an expert takes as long as one of Qwen3-30B-A3B over 12.5 GB/s, so that the milliseconds are realistic.
Simulated time is simulate.costs.StepCosts.step_ms with the laptop of PolicyContext.nominal:

    ms = n_blocks * block_ms * steps + draft_ms * decoded + stall_ms

    block_ms    half of the transfer time of an expert, as in EdgeLlama(deterministic=True)
    draft_ms    n_blocks * block_ms: a draft token costs as much as a token of the model
    decoded     tokens that the draft computed: K + 1 in a step of K draft tokens, the last one for its routing only
    stall_ms    stalls of the virtual clock (native/src/virtual_clock.h)

The virtual clock stops while the draft runs, so transfers that would overlap with the draft count as stalls.

In deterministic mode the draft decodes ahead for the routing of 2 K + 2 tokens, since drafting takes no virtual time.
Here drafting costs draft_ms, so the draft decodes one token ahead, the engine's initial value with a real clock.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_speq.cli import arguments, interrupt
from edge_speq.cli.console import table
from edge_speq.core import Stats
from edge_speq.errors import EdgeError
from edge_speq.gguf import bundled

if TYPE_CHECKING:
    from edge_speq.engine.step_records import StepRecord

RESIDENT = "1/4"
DRAFT_TOKENS = 1  # fixed, because `auto` depends on measured step times
N_TOKENS = 96
AHEAD = 1  # tokens that the draft decodes ahead: the initial value of engine.draft_length.lookahead_depth
TWIN_BITS = 2  # bits of convert.bundled_twin.TWIN_TYPE
N_CTX = 512
SEED = 7
TEMPERATURE = 0.0
REFERENCE = "Qwen3-30B-A3B at Q4_K"
REFERENCE_EXPERT = 3 * 2048 * 768 * 9 // 16  # bytes: gate, up and down at 4.5 bits a weight
NEXT = "edge-speq run your.gguf --vram-budget 6GiB"


@dataclass(frozen=True, slots=True)
class DemoArm:
    name: str
    policy: str
    drafts: bool


ARMS = (DemoArm("lru", "lru", False), DemoArm("auto", "auto", False), DemoArm("auto+draft", "auto", True))


@dataclass(frozen=True, slots=True)
class SimulatedLaptop:
    """The simulated machine. The transfer of an expert of the bundled model takes transfer_ms."""

    n_blocks: int
    bytes_per_s: int  # rate of the virtual link
    block_ms: float

    @property
    def transfer_ms(self) -> float:
        return 2 * self.block_ms

    @property
    def token_ms(self) -> float:
        """Return the compute time of a token in ms, equal for the model and its draft."""
        return self.n_blocks * self.block_ms


@dataclass(frozen=True, slots=True)
class SimulatedTime:
    """Parts of the simulated time, in ms."""

    steps: int
    decoded: int  # tokens that the draft computed
    compute_ms: float
    draft_ms: float
    stall_ms: float

    @property
    def ms(self) -> float:
        return self.compute_ms + self.draft_ms + self.stall_ms


@dataclass(frozen=True, slots=True)
class DemoResult:
    arm: DemoArm
    text: str
    stats: Stats
    simulated: SimulatedTime

    @property
    def tok_per_s(self) -> float:
        """Return the simulated speed. The first token is not counted: its prompt has no simulated time."""
        return 1e3 * self.stats.timing.n_decoded / self.simulated.ms if self.simulated.ms else 0.0

    def to_dict(self) -> dict[str, Any]:
        parts = dataclasses.asdict(self.simulated)
        own = {"arm": self.arm.name, "simulated_tok_per_s": self.tok_per_s, "simulated": parts, "text": self.text}
        return own | self.stats.to_dict()


def add_parser(commands: Any) -> None:
    p: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="compare three policies on the bundled model",
        description="Generates one text three times with the bundled model, with a quarter of its experts in slots and "
        "the simulated link of a laptop. Shows hits, misses, transfers and stalls with LRU, with policy auto, and with "
        "a draft whose routing predicts experts. The first run makes the draft's experts (12 MB, cache folder).",
    )
    arguments.add_output(p, json="print one JSON object per row instead of text and table")
    p.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    machine = laptop(bundled.path(bundled.MODEL))
    shows = not options.json
    if shows:
        print(f"{headline(machine)}\n", flush=True)
    results: list[DemoResult] = []
    for arm in ARMS:
        results.append(_run(arm, machine, shows=shows and not results))
        if options.json:
            print(json.dumps(results[-1].to_dict()), flush=True)
    if shows:
        print(report(results))
    for other in results[1:]:
        if other.text != results[0].text:
            raise EdgeError(
                f"{other.arm.name} wrote another text than {results[0].arm.name}; policies must not change texts",
                "report it with the output of: edge-speq doctor --json",
            )
    return 0


def laptop(model: Path) -> SimulatedLaptop:
    """Return the machine on which the transfer of an expert of the first block takes as long as one of REFERENCE."""
    from edge_speq.engine.llama import LAPTOP_LINK
    from edge_speq.gguf import model as gguf_model

    file = gguf_model.check_model(model)
    found = [(int(match[1]), t) for name, t in file.tensors.items() if (match := gguf_model.EXPERTS.fullmatch(name))]
    blocks = {block for block, _ in found}
    expert_bytes = sum(tensor.n_bytes // tensor.ne[2] for block, tensor in found if block == min(blocks))
    rate = LAPTOP_LINK * expert_bytes // REFERENCE_EXPERT
    return SimulatedLaptop(len(blocks), rate, int(5e8 * expert_bytes / rate) / 1e6)


def simulate(machine: SimulatedLaptop, steps: Sequence[StepRecord], stall_ms: float) -> SimulatedTime:
    """Return the parts of the simulated time of verify steps; records of prompts are left out."""
    timed = [step for step in steps if not step.is_prompt]
    decoded = sum(step.drafted + AHEAD for step in timed if step.drafted)
    return SimulatedTime(len(timed), decoded, len(timed) * machine.token_ms, decoded * machine.token_ms, stall_ms)


def _run(arm: DemoArm, machine: SimulatedLaptop, *, shows: bool) -> DemoResult:
    from edge_speq.convert import bundled_twin
    from edge_speq.engine.llama import EdgeLlama

    steps: list[StepRecord] = []
    with contextlib.ExitStack() as stack:
        draft = stack.enter_context(bundled_twin.twin(_tell_making)) if arm.drafts else None
        llm = EdgeLlama(
            str(bundled.path(bundled.MODEL)),
            draft=draft,
            resident=RESIDENT,
            draft_tokens=DRAFT_TOKENS if arm.drafts else 0,
            policy=arm.policy,
            throttle_link=machine.bytes_per_s,
            deterministic=True,
            on_step=steps.append,
            n_ctx=N_CTX,
        )
        stack.callback(llm.close)
        llm.limit_lookahead(AHEAD)  # in virtual time decoding ahead is free, but the formula charges it
        text = _write(llm, shows=shows)
        stats = llm.stats()
    return DemoResult(arm, text, stats, simulate(machine, steps, stats.experts.stall_ms))


def _tell_making() -> None:
    print("making the draft's experts (only once, takes some seconds)", file=sys.stderr, flush=True)


def _write(llm: Any, *, shows: bool) -> str:
    parts = []
    if shows:
        interrupt.last_words(interrupt.NEW_LINE)
        print(bundled.PROMPT, end="", flush=True)
    for chunk in llm.create_completion(
        bundled.PROMPT, max_tokens=N_TOKENS, temperature=TEMPERATURE, seed=SEED, stream=True
    ):
        parts.append(chunk["choices"][0]["text"])
        if shows:
            print(parts[-1], end="", flush=True)
    if shows:
        print("\n", flush=True)
        interrupt.last_words(b"")
    return "".join(parts)


# --- output ----------------------------------------------------------------------------------------------


def headline(machine: SimulatedLaptop) -> str:
    return (
        f"Simulated laptop: {RESIDENT} of the experts in slots. An expert takes {machine.transfer_ms:.2f} ms on the "
        f"link, as one of\n{REFERENCE} does over 12.5 GB/s; a layer computes for {machine.block_ms:.2f} ms. "
        "The text is computed for real."
    )


def report(results: Sequence[DemoResult]) -> str:
    lines = table([COLUMNS, *(_row(result) for result in results)])
    same = all(result.text == results[0].text for result in results)
    verdict = "All three wrote the same text." if same else "The texts DIFFER."
    return "\n".join([*lines, "", *_meanings(*results), "", verdict, f"Next, with your own model: {NEXT}"])


COLUMNS = ("policy", "hits", "misses", "moved", "stall", "accepted", "prefetched, used", "simulated speed")


def _row(result: DemoResult) -> list[str]:
    e, s = result.stats.experts, result.stats.speculation
    return [
        result.arm.name,
        f"{e.hits} ({100 * (e.hit_rate or 0.0):.0f} %)",
        f"{e.misses}",
        f"{e.bytes_fetched / 1e6:.0f} MB",
        f"{e.stall_ms:.0f} ms",
        f"{s.accepted} of {s.drafted}" if s.drafted else "-",
        f"{e.prefetched}, {e.prefetched_used}" if e.prefetched else "-",
        f"{result.tok_per_s:.0f} tok/s",
    ]


def _meanings(lru: DemoResult, auto: DemoResult, drafted: DemoResult) -> list[str]:
    """Return what each row means."""
    own = drafted.simulated
    copy = drafted.stats.used_bytes - auto.stats.used_bytes
    stall = _change(auto.simulated.stall_ms, own.stall_ms, "more", "less")
    gain = _change(auto.tok_per_s, drafted.tok_per_s, "faster", "slower")
    return [
        f"{lru.arm.name:10}  keeps the experts used last and fetches a missing one when a step needs it.",
        f"{auto.arm.name:10}  also counts how often steps need each expert: {_fewer(lru, auto)} misses.",
        f"{drafted.arm.name:10}  a {TWIN_BITS}-bit copy of the experts ({copy / 1e6:.0f} MB more on the device) drafts "
        f"{DRAFT_TOKENS} token a step. Its routing says",
        f"{'':10}  which experts come next: {_fewer(auto, drafted)} misses and {stall} stall than auto. A step of two "
        "tokens counts a",
        f"{'':10}  shared expert once, so hits are fewer too. Drafting {own.decoded} tokens took {own.draft_ms:.0f} "
        f"simulated ms: {gain} than auto.",
    ]


def _fewer(before: DemoResult, after: DemoResult) -> str:
    return _change(before.stats.experts.misses or 0, after.stats.experts.misses or 0, "more", "fewer")


def _change(before: float, after: float, more: str, less: str) -> str:
    share = after / before - 1 if before else 0.0
    return f"{abs(100 * share):.0f} % {more if share > 0 else less}"
