"""Draws stored benchmarks: docs/images/*.svg. Needs matplotlib (pip install 'edge-speq[plot]').

    python tools/bench_plot.py speed docs/measurements/FILE.json... -o docs/images/speed.svg   # of edge-speq bench
    python tools/bench_plot.py layers RECORD.json -o docs/images/layers.svg                    # of tools/step_record.py
    python tools/bench_plot.py timeline RECORD.json --policy auto --steps 6 -o docs/images/timeline.svg

speed: tokens per second against the resident share, a picture for each machine and test: medians with the least and the
greatest of the repetitions, the best draft length of each policy, and dashed the bound of its steps. What wrote another
text is left out. layers: share of the demanded experts that lay in slots when the step began. timeline: when decodes
and drafts ran, by the clock; what lies within a decode (waiting, CPU, bytes over the link) is known as a sum of the
step only, so it is drawn from the step's start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_report import Group, Row, Spread, groups, read

from edge_speq.core import EdgeError, parse_share

COLOURS = {"auto": "tab:blue", "device": "tab:cyan", "hybrid": "tab:purple", "lfru": "tab:green", "lru": "tab:orange",
           "cpu-moe": "tab:red", "all": "tab:gray"}  # fmt: skip
LANES = ("host", "draft", "GPU or CPU kernels", "waiting for experts", "CPU experts", "link")


def pyplot() -> Any:
    """Raises EdgeError without matplotlib."""
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise EdgeError("plots need matplotlib", "pip install 'edge-speq[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "edge-speq"  # the same file for the same figures
    from matplotlib import pyplot as made  # type: ignore[import-not-found,unused-ignore]

    return made


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, bbox_inches="tight")
    print(path)


# --- speed ---------------------------------------------------------------------------------------------------


def best_rows(group: Group) -> dict[str, list[tuple[float, Row]]]:
    """Of each policy the fastest draft length at each share, by share; rows of another text are left out."""
    found: dict[str, dict[float, Row]] = {}
    for match in group.matches:
        share = parse_share(match.share)
        for row in (row for row in match.rows if row["outputs_match"] is not False):
            rows = found.setdefault(row["policy"], {})
            if share not in rows or _median(row) > _median(rows[share]):
                rows[share] = row
    return {policy: sorted(rows.items(), key=lambda item: item[0]) for policy, rows in found.items()}


def _median(row: Row) -> float:
    return float(statistics.median(row["samples_ts"]))


def speed(files: Sequence[Path], out: Path) -> None:
    drawn = [group for group in groups([read(path) for path in files]) if group.rows[0]["n_gen"]]
    figure, axes = pyplot().subplots(1, len(drawn), figsize=(5.5 * len(drawn), 4.2), squeeze=False)
    for axis, group in zip(axes[0], drawn, strict=True):
        for policy, points in best_rows(group).items():
            _draw_policy(axis, policy, points)
        first = group.rows[0]
        where = first["gpu_info"] or first["cpu_info"]
        emulated = f"\nEMULATED {first['emulation']}" if first["emulation"] else ""
        axis.set(xlabel="resident share of the experts", ylabel="tokens per second", ylim=(0, None))
        axis.set_title(f"{first['model_filename']}, {first['test']}\n{where}{emulated}", fontsize="small")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    save(figure, out)


def _draw_policy(axis: Any, policy: str, points: Sequence[tuple[float, Row]]) -> None:
    shares = [share for share, _ in points]
    spreads = [Spread.of(row["samples_ts"]) for _, row in points]
    medians = [s.median for s in spreads]
    errors = [[s.median - s.least for s in spreads], [s.greatest - s.median for s in spreads]]
    style = {"color": COLOURS.get(policy)}
    axis.errorbar(shares, medians, yerr=errors, marker="o", capsize=3, label=policy, **style)
    bounds = [(share, row["bound_ts"]) for share, row in points if row["bound_ts"]]
    if bounds:
        axis.plot(
            *zip(*bounds, strict=True), linestyle="--", marker="_", alpha=0.6, label=f"bound of {policy}", **style
        )


# --- records -------------------------------------------------------------------------------------------------


def layers(record: dict[str, Any], out: Path) -> None:
    runs = record["runs"]
    figure, axis = pyplot().subplots(figsize=(max(5.0, 0.25 * len(runs[0]["found"])), 3.6))
    for run in runs:
        found = [f / d if d else float("nan") for f, d in zip(run["found"], run["demanded"], strict=True)]
        label = f"{run['policy']} (hit rate {run['hit_rate']:.2f})"
        axis.plot(range(len(found)), found, marker="o", label=label, color=COLOURS.get(run["policy"]))
    axis.set(xlabel="layer", ylabel="in slots when the step began", ylim=(0, 1))
    axis.set_title(_title(record), fontsize="small")
    axis.legend(fontsize="x-small")
    axis.grid(alpha=0.3)
    save(figure, out)


def lanes(run: dict[str, Any], n_steps: int) -> dict[str, list[tuple[float, float]]]:
    """(begin, milliseconds) of what ran, for the first steps."""
    steps = run["steps"][:n_steps]
    last = steps[-1]["end"]
    drafts = [(begin, end - begin) for begin, end in run["drafts"] if end <= last]
    link = run["link_bytes_per_s"]
    sums = {name: [(s["begin"], s[key]) for s in steps] for name, key in ((LANES[3], "stall_ms"), (LANES[4], "cpu_ms"))}
    gaps = [(a["end"], b["begin"]) for a, b in itertools.pairwise(steps)]
    host = [(begin, end - begin - sum(ms for at, ms in drafts if begin <= at < end)) for begin, end in gaps]
    return {
        LANES[0]: host,
        LANES[1]: drafts,
        LANES[2]: [(s["begin"] + s["stall_ms"], s["end"] - s["begin"] - s["stall_ms"]) for s in steps],
        **sums,
        LANES[5]: [(s["begin"], 1e3 * s["bytes_fetched"] / link) for s in steps] if link else [],
    }


def timeline(record: dict[str, Any], policy: str, n_steps: int, out: Path) -> None:
    if record["deterministic"]:
        raise EdgeError("virtual stalls have no place on the clock", "record without --deterministic", usage=True)
    runs = [run for run in record["runs"] if run["policy"] == policy]
    if not runs or not runs[0]["steps"]:
        raise EdgeError(
            f"no steps of policy {policy!r} are recorded", "see --policy of tools/step_record.py", usage=True
        )
    figure, axis = pyplot().subplots(figsize=(10, 2.8))
    colours = ("tab:gray", "tab:cyan", "tab:green", "tab:red", "tab:purple", "tab:orange")
    for i, (bars, colour) in enumerate(zip(lanes(runs[0], n_steps).values(), colours, strict=True)):
        axis.broken_barh(bars, (i - 0.35, 0.7), color=colour)
    for step in runs[0]["steps"][:n_steps]:
        axis.axvline(step["begin"], color="black", alpha=0.25, linewidth=0.8)
    axis.set_yticks(range(len(LANES)), LANES)
    axis.invert_yaxis()
    axis.set_xlabel("ms; within a step the lanes are sums, drawn from its start (vertical lines), not an order")
    axis.set_title(f"{policy}, {_title(record)}", fontsize="small")
    save(figure, out)


def _title(record: dict[str, Any]) -> str:
    emulated = f", EMULATED {record['emulation']}" if record["emulation"] else ""
    virtual = ", virtual transfers" if record["deterministic"] else ""
    where = record["gpu_info"] or record["cpu_info"]
    return f"{record['model']}, {record['resident']} of the experts in slots, {where}{emulated}{virtual}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name in ("speed", "layers", "timeline"):
        kind = kinds.add_parser(name)
        kind.add_argument("files", nargs="+" if name == "speed" else 1, type=Path)
        kind.add_argument("-o", "--out", type=Path, required=True)
        if name == "timeline":
            kind.add_argument("--policy", default="auto")
            kind.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    try:
        if options.kind == "speed":
            speed(options.files, options.out)
            return
        record = json.loads(options.files[0].read_text(encoding="utf-8"))
        if options.kind == "layers":
            layers(record, options.out)
        else:
            timeline(record, options.policy, options.steps, options.out)
    except EdgeError as error:
        raise SystemExit(f"error: {error.message}\nhint: {error.hint}") from error


if __name__ == "__main__":
    main()
