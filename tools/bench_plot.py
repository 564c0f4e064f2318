"""Draws what was measured: docs/images/*.svg. Needs matplotlib: pip install matplotlib

    python tools/bench_plot.py speed docs/measurements/FILE.json... -o docs/images/speed.svg   # of edge-speq bench
    python tools/bench_plot.py layers RECORD.json -o docs/images/layers.svg                    # of tools/step_record.py
    python tools/bench_plot.py timeline TIMELINE.json --policy auto,lru --blocks 10:16 -o docs/images/timeline.svg

speed: tokens per second against the resident share, a picture for each machine and test: medians with the least and the
greatest of the repetitions, the best draft length of each policy, and dashed the bound of its steps. What wrote another
text is left out. layers: share of the demanded experts that lay in slots when the step began. timeline, of
tools/step_timeline.py: what the device, the link and the decoding thread did by the clock while the last recorded step
was in the given blocks, both ends included; the first step has the profiler's own start in it. A block begins where the
thread begins to wait for its routing, so what is prefetched for it is drawn in the blocks before.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_report import Group, Row, Spread, groups, read

from edge_speq.errors import EdgeError
from edge_speq.system import install_hint
from edge_speq.units import parse_share

COLOURS = {"auto": "tab:blue", "device": "tab:cyan", "hybrid": "tab:purple", "lfru": "tab:green", "lru": "tab:orange",
           "cpu-moe": "tab:red", "all": "tab:gray"}  # fmt: skip
LANES = {"kernels": "tab:blue", "copies to slots": "tab:orange", "CPU experts": "tab:red",
         "waits for the device": "tab:gray", "waits for copies": "tab:brown", "decides": "tab:purple",
         "looks ahead": "tab:green"}  # fmt: skip
SPANS = {"cpu": "CPU experts", "device": "waits for the device", "copies": "waits for copies", "decide": "decides",
         "ahead": "looks ahead"}  # fmt: skip
N_BLOCKS = 5  # that are drawn unless told
Bar = tuple[float, float]  # begin and length in milliseconds


def pyplot() -> Any:
    """Raises EdgeError without matplotlib."""
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise EdgeError("plots need matplotlib", install_hint("plot")) from error
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


def _title(record: dict[str, Any]) -> str:
    emulated = f", EMULATED {record['emulation']}" if record["emulation"] else ""
    virtual = ", virtual transfers" if record["deterministic"] else ""
    where = record["gpu_info"] or record["cpu_info"]
    return f"{record['model']}, {record['resident']} of the experts in slots, {where}{emulated}{virtual}"


# --- timelines -----------------------------------------------------------------------------------------------


def boundaries(run: dict[str, Any], blocks: tuple[int, int] | None = None) -> dict[int, float]:
    """When the last step's blocks began, in milliseconds of the recording: of those from the first to the last of
    blocks, or of some from the middle, and of the one behind, which at the step's end is the step's end.

    Raises EdgeError where blocks are not in the recording.
    """
    began, ended = run["steps"][-1]
    begins = {block: begin for kind, block, begin, _ in run["spans"] if kind == "device" and began <= begin < ended}
    if not begins:
        raise EdgeError("the last step has no blocks", "record again with tools/step_timeline.py")
    least, most = min(begins), max(begins)
    if blocks is None:
        first = least + max(0, most - least + 1 - N_BLOCKS) // 2
        blocks = first, min(most, first + N_BLOCKS - 1)
    if not least <= blocks[0] <= blocks[1] <= most:
        raise EdgeError(f"there are no blocks {blocks[0]}:{blocks[1]}", f"choose from {least}:{most}", usage=True)
    begins[most + 1] = ended
    return {block: begin for block, begin in sorted(begins.items()) if blocks[0] <= block <= blocks[1] + 1}


def lanes(run: dict[str, Any], begin: float, end: float) -> dict[str, list[Bar]]:
    """What lies between begin and end, cut there, counted from begin."""
    spans: dict[str, list[Bar]] = {name: [] for name in LANES}
    spans["kernels"] = run["kernels"]
    spans["copies to slots"] = [(began, ended) for began, ended, _ in run["copies"]]
    for kind, _, began, ended in run["spans"]:
        spans[SPANS[kind]].append((began, ended))
    return {
        name: [(max(b, begin) - begin, min(e, end) - max(b, begin)) for b, e in found if b < end and e > begin]
        for name, found in spans.items()
    }


def timeline(record: dict[str, Any], policies: Sequence[str], blocks: tuple[int, int] | None, out: Path) -> None:
    """A panel for each policy, all on one scale."""
    missing = [policy for policy in policies if policy not in record["policies"]]
    if missing:
        hint = f"recorded are {', '.join(record['policies'])}; see --policy of tools/step_timeline.py"
        raise EdgeError(f"policy {missing[0]!r} is not recorded", hint, usage=True)
    runs = [record["policies"][policy] for policy in policies]
    shown = [boundaries(run, blocks) for run in runs]
    figure, axes = pyplot().subplots(
        len(runs), 1, figsize=(11, 0.6 + 2.6 * len(runs)), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, policy, run, begins in zip(axes[:, 0], policies, runs, shown, strict=True):
        _draw_run(axis, run, begins)
        axis.set_title(policy, loc="left", fontsize="medium", fontweight="bold")
    axes[-1, 0].set_xlabel(f"ms since block {min(shown[0])} began")
    figure.suptitle(_timeline_title(record, runs[0]), fontsize="small")
    save(figure, out)


def _draw_run(axis: Any, run: dict[str, Any], begins: dict[int, float]) -> None:
    (first, zero), *_, (last, end) = begins.items()
    for i, (name, bars) in enumerate(lanes(run, zero, end).items()):
        axis.broken_barh(bars, (i - 0.38, 0.76), color=LANES[name], linewidth=0)
    for begin in begins.values():
        axis.axvline(begin - zero, color="black", alpha=0.4, linewidth=0.6)
    axis.set_yticks(range(len(LANES)), LANES)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.2)
    top = axis.secondary_xaxis("top")
    top.set_xticks([begins[block] - zero for block in range(first, last)], range(first, last))
    top.tick_params(labelsize="small")
    top.set_xlabel("block", fontsize="small", loc="left")


def _timeline_title(record: dict[str, Any], run: dict[str, Any]) -> str:
    title = (
        f"{record['model']}, {record['resident']} of the experts in slots, {run['device']}, {run['threads']} threads"
    )
    if not run["link"]:
        return title
    waits = "bars of copies are as long as the real link took; that the emulated one takes longer is waited for"
    return f"{title}, EMULATED link={run['link']}\n{waits}"


# --- command -------------------------------------------------------------------------------------------------


def _blocks(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    return int(first), int(last or first)


def _read(path: Path, key: str, tool: str) -> dict[str, Any]:
    record = json.loads(path.read_text(encoding="utf-8"))
    if key not in record:
        raise EdgeError(f"{path} is no record of {tool}", f"make one: {tool} --help", usage=True)
    return dict(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name in ("speed", "layers", "timeline"):
        kind = kinds.add_parser(name)
        kind.add_argument("files", nargs="+" if name == "speed" else 1, type=Path)
        kind.add_argument("-o", "--out", type=Path, required=True)
        if name == "timeline":
            kind.add_argument("--policy", default="auto", help="auto,lru: a panel each (%(default)s)")
            kind.add_argument("--blocks", type=_blocks, metavar="FIRST:LAST", help="default: some from the middle")
    options = parser.parse_args()
    try:
        if options.kind == "speed":
            speed(options.files, options.out)
        elif options.kind == "layers":
            layers(_read(options.files[0], "runs", "tools/step_record.py"), options.out)
        else:
            recorded = _read(options.files[0], "policies", "tools/step_timeline.py")
            timeline(recorded, options.policy.split(","), options.blocks, options.out)
    except EdgeError as error:
        raise SystemExit(f"error: {error.message}\nhint: {error.hint}") from error


if __name__ == "__main__":
    main()
