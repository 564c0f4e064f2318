"""Cache policies, replayed: all presets with a twin, and what to keep without a draft.

`presets`: twins at Q4_K_M and Q2_K are recorded once over 16 held-out prompts of four classes and replayed under every
preset, over a virtual link of 12.5 GB/s and blocks that compute half as long as an expert travels. `keep`: misses of
rules for what to keep, relative to LRU's, one token a step.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.tables import NONE, Row, fraction, lines, markdown, percent
from benchmarks.twins import CASES, LINK, TWINS, make_twin, record
from edge_speq import _native
from edge_speq import texts as prompts
from edge_speq.gguf import bundled as demo
from edge_speq.policies import registry as presets
from edge_speq.policies.context import PolicyContext
from edge_speq.policies.registry import PRESETS
from edge_speq.simulate import report
from edge_speq.simulate.replay import Replay
from edge_speq.trace.reader import Trace
from edge_speq.trace.step import Step

NAMES = [name for name in PRESETS if name != "learned"]  # it has its own entry
N_TEXTS, N_TOKENS = 4, 64  # of each class, of each text
BY_CLASS = ("waits", "waits-keep")  # whose classes are stored, too
LEFT_OUT = ("trace", "link_bytes_per_s", "bound_fraction", "kept_pairs")
KEPT = ("lru", "lfru", "auto")
SHORT, TURNS = 20, 5  # tokens of a text, and how often each comes


# --- all presets ---------------------------------------------------------------------------------------------


def preset_rows(target: Path, kind: str, folder: Path) -> list[Row]:
    twin = folder / f"{kind}.gguf"
    make_twin(target, twin, kind)
    chosen, rows = prompts.bundled(N_TEXTS).chosen, list[Row]()
    traces = {k: record(target, twin, k, folder / f"{kind}-{k}.npz", chosen, N_TOKENS) for _, k in CASES}
    for share, k in CASES:
        made = report.simulate([traces[k]], report.SimulateOptions(NAMES, [fraction(share)], LINK, by_class=True))
        rows += [row | {"share": share, "twin": kind} for row in made]
    return [row for row in rows if row["domain"] == "all" or row["policy"] in BY_CLASS]


def stored(rows: Sequence[Any]) -> str:
    short = json.loads(report.as_json(rows))
    return lines([{k: v for k, v in row.items() if k not in LEFT_OUT and v not in (None, False)} for row in short])


def preset_table(found: list[Row]) -> str:
    whole = [row for row in found if row["domain"] == "all"]
    return "\n\n".join(gap_table(whole, "twin", kind, f"{kind} twin", NAMES) for kind in TWINS)


def gap_table(rows: Sequence[Row], key: str, kind: str, title: str, names: Sequence[str]) -> str:
    """Share of the gap from LRU to Belady that is closed, in misses and in bytes; stalls relative to LRU's. Stored rows
    leave out what is zero."""
    body = []
    for name in [name for name in names if any(row["policy"] == name and row[key] == kind for row in rows)]:
        cells, lossy = [], ""
        for share, k in CASES:
            mine = {row["policy"]: row for row in rows if (row["share"], row["k"], row[key]) == (share, k, kind)}
            row, lossy = mine[name], " (lossy)" if mine[name].get("lossy") else ""
            cells.append(gap_cell(row, mine["lru"]))
        body.append([f"{name}{lossy}", *cells])
    return markdown((title, *(f"{share}, K = {k}" for share, k in CASES)), body)


def gap_cell(row: Row, lru: Row) -> str:
    gaps = f"{percent(row.get('miss_gap', 0))} / {percent(row.get('read_gap', 0))}"
    return f"{gaps}, {row.get('stall_ms', 0) / lru['stall_ms']:.2f}"


def foresight_table(found: list[Row]) -> str:
    body = []
    for kind, k in itertools.product(TWINS, sorted({k for _, k in CASES})):
        row = next(r for r in found if (r["twin"], r["k"], r["policy"], r["domain"]) == (kind, k, "waits", "all"))
        f = row["foresight"]
        verified = f"{f['verified_precision']:.2f}, {f['verified_recall']:.2f}" if k >= 3 else NONE
        kept = f"{f['kept_precision']:.2f}, {f['kept_recall']:.2f}"
        body.append([kind, str(k), f"{row['acceptance']:.2f}", f"{f['same_set']:.2f}", kept, verified])
    headings = (
        "twin", "draft tokens", "acceptance", "same set of experts", "precision, recall on the text",
        "on what was verified",
    )  # fmt: skip
    return markdown(headings, body)


def class_table(found: list[Row]) -> str:
    """Bytes' gap by class, of the first two cases, with a Q4_K_M twin."""
    domains = list(dict.fromkeys(row["domain"] for row in found if row["domain"] != "all"))
    body = []
    for policy, (share, k) in itertools.product(BY_CLASS, CASES[:2]):
        key = (policy, share, k, "Q4_K_M")
        mine = {r["domain"]: r for r in found if (r["policy"], r["share"], r["k"], r["twin"]) == key}
        body.append([f"{policy}, {share}, K = {k}", *(percent(mine[d].get("read_gap", 0)) for d in domains)])
    return markdown(("policy", *domains), body)


# --- what to keep --------------------------------------------------------------------------------------------


def keep_rows(model: Path, folder: Path) -> Iterator[Row]:
    found = record(model, None, 0, folder / "keep.npz", prompts.bundled(N_TEXTS).chosen, N_TOKENS)
    for name, steps in _texts(found).items():
        for share in ("1/8", "1/4", "1/2"):
            counted = {policy: _misses(found, steps, fraction(share), policy) for policy in KEPT}
            yield {"model": model.name, "texts": name, "share": share, "misses": counted}


def _texts(recorded: Trace) -> dict[str, list[Step]]:
    """All texts as recorded, and the first tokens of four of them in turn."""
    of_each = [list(steps) for _, steps in itertools.groupby(recorded.steps, key=lambda step: step.passage)]
    four = [of_each[i * len(of_each) // 4][:SHORT] for i in range(4)]
    return {"long": list(recorded.steps), "short": list(itertools.chain.from_iterable(four * TURNS))}


def _misses(recorded: Trace, steps: Sequence[Step], share: float, policy: str) -> int:
    experts = recorded.experts
    slots = tuple(max(int(share * group.n_experts), experts.n_expert_used + 1) for group in experts.groups)
    setting = PolicyContext.nominal(experts, slots, 0, LINK, has_twin=False)
    counted = Replay(presets.make(policy, setting), setting).run(steps).counters.misses
    assert counted is not None
    return counted


def keep_table(found: list[Row]) -> str:
    body = [
        [row["model"], row["texts"], row["share"], *(f"{row['misses'][p] / row['misses']['lru']:.3f}" for p in KEPT)]
        for row in found
    ]
    return markdown(("model", "texts", "in slots", *KEPT), body)


# --- command -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    _native.load_backends()
    models = options.models or [demo.path(demo.MODEL)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.what == "presets":
            cells: list[Any] = [(kind, lambda kind=kind: preset_rows(models[0], kind, folder)) for kind in TWINS]
            store.measured(options.out, _plain(cells), lambda found: stored(list(itertools.chain(*found))))
        else:
            rows = [row for n, model in enumerate(models) for row in _kept(model, folder / str(n))]
            options.out.write_text(lines(rows), encoding="utf-8")
    return 0


def _kept(model: Path, folder: Path) -> list[Row]:
    folder.mkdir()
    return list(keep_rows(model, folder))


def _plain(cells: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Rows as JSON has them, so that they can be stored between cells."""
    return [(key, lambda measure=measure: json.loads(report.as_json(measure()))) for key, measure in cells]


def parser() -> Any:
    made = store.parser(__doc__)
    made.add_argument("what", choices=("presets", "keep"))
    made.add_argument("models", type=Path, nargs="*", help="MoE files (the bundled model)")
    return made


if __name__ == "__main__":
    sys.exit(main())
