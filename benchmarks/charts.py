"""The pictures of docs/images, drawn from benchmarks/results. Drawing needs matplotlib.

Each SVG ends with a digest of the results that it shows, so that a picture of other results is found without drawing.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.registry import RESULTS, ROOT, read
from benchmarks.speed import Group, groups
from benchmarks.tables import Row, Spread
from edge_speq import system
from edge_speq.errors import EdgeError
from edge_speq.units import parse_share

COLOURS = {"auto": "tab:blue", "auto, on miss fetch": "tab:cyan", "auto, on miss hybrid": "tab:purple",
           "lfru": "tab:green", "lru": "tab:orange", "cpu-moe": "tab:red", "all": "tab:gray"}  # fmt: skip
LANES = {"kernels": "tab:blue", "copies to slots": "tab:orange", "CPU experts": "tab:red",
         "waits for the device": "tab:gray", "waits for copies": "tab:brown", "decides": "tab:purple",
         "looks ahead": "tab:green"}  # fmt: skip
SPANS = {"cpu": "CPU experts", "device": "waits for the device", "copies": "waits for copies", "decide": "decides",
         "ahead": "looks ahead"}  # fmt: skip
N_BLOCKS = 5  # that a timeline shows
Bar = tuple[float, float]  # begin and length in milliseconds


@dataclass(frozen=True, slots=True)
class Picture:
    files: tuple[str, ...]  # in benchmarks/results
    draw: Callable[..., Any]  # the content of the files → a figure

    def digest(self) -> str:
        found = hashlib.sha256()
        for name in self.files:
            found.update((RESULTS / name).read_bytes())
        return found.hexdigest()[:16]

    def mark(self) -> str:
        return f"<!-- benchmarks: {' '.join(self.files)}: {self.digest()} -->"


def pyplot() -> Any:
    """Raise EdgeError without matplotlib."""
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise EdgeError("plots need matplotlib", system.install_hint("plot")) from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "edge-speq"  # the same file for the same figures
    from matplotlib import pyplot as made  # type: ignore[import-not-found,unused-ignore]

    return made


def save(figure: Any, path: Path, mark: str = "") -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, bbox_inches="tight")
    if mark:
        path.write_text(f"{path.read_text(encoding='utf-8')}{mark}\n", encoding="utf-8")


def outdated(root: Path = ROOT) -> list[str]:
    """Pictures that are missing or show other results."""
    found = []
    for name, picture in PICTURES.items():
        path = root / "docs" / "images" / name
        if not path.exists() or picture.mark() not in path.read_text(encoding="utf-8"):
            found.append(f"docs/images/{name}")
    return found


def draw_outdated(root: Path = ROOT) -> list[str]:
    """Draw them. Return what is left without matplotlib."""
    for path in outdated(root):
        picture = PICTURES[Path(path).name]
        try:
            figure = picture.draw(*(read(RESULTS / name) for name in picture.files))
        except EdgeError as error:
            return [f"{path} is not drawn: {error.message}: {error.hint}"]
        save(figure, root / path, picture.mark())
        print(path)
    return []


# --- speed ---------------------------------------------------------------------------------------------------


def best_rows(group: Group) -> dict[str, list[tuple[float, Row]]]:
    """The fastest draft length of each policy, by share; rows of another text are left out."""
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


def speed(*files: list[Row]) -> Any:
    """Tokens per second by share, a panel for each machine and test: medians with minimum and maximum. `all`, which is
    over budget, is left out."""
    drawn = [group for group in groups(files) if group.rows[0]["n_gen"]]
    figure, axes = pyplot().subplots(1, len(drawn), figsize=(5.5 * len(drawn), 4.2), squeeze=False)
    for axis, group in zip(axes[0], drawn, strict=True):
        found = {policy: points for policy, points in best_rows(group).items() if policy != "all"}
        for policy, points in found.items():
            _draw_policy(axis, policy, points)
        axis.set_xticks([parse_share(match.share) for match in group.matches], [m.share for m in group.matches])
        first = group.rows[0]
        where = first["gpu_info"] or first["cpu_info"]
        emulated = f"\nEMULATED {first['emulation']}" if first["emulation"] else ""
        axis.set(xlabel="share of the experts in slots", ylabel="tokens per second", ylim=(0, None))
        axis.set_title(f"{first['model_filename']}, {first['test']}\n{where}{emulated}", fontsize="small")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    return figure


def _draw_policy(axis: Any, policy: str, points: Sequence[tuple[float, Row]]) -> None:
    shares = [share for share, _ in points]
    spreads = [Spread.of(row["samples_ts"]) for _, row in points]
    medians = [s.median for s in spreads]
    errors = [[s.median - s.least for s in spreads], [s.greatest - s.median for s in spreads]]
    axis.errorbar(shares, medians, yerr=errors, marker="o", capsize=3, label=policy, color=COLOURS.get(policy))


# --- hits by layer -------------------------------------------------------------------------------------------


def layers(record: dict[str, Any]) -> Any:
    """Share of the demanded experts that were in slots when a step began, by layer."""
    runs = record["runs"]
    figure, axis = pyplot().subplots(figsize=(max(5.0, 0.25 * len(runs[0]["found"])), 3.6))
    for run in runs:
        found = [f / d if d else float("nan") for f, d in zip(run["found"], run["demanded"], strict=True)]
        label = f"{run['policy']} (hit rate {run['hit_rate']:.2f})"
        axis.plot(range(len(found)), found, marker="o", label=label, color=COLOURS.get(run["policy"]))
    axis.set(xlabel="layer", ylabel="in slots when the step began", ylim=(0, 1))
    where = record["gpu_info"] or record["cpu_info"]
    axis.set_title(f"{record['model']}, {record['resident']} of the experts in slots, {where}", fontsize="small")
    axis.legend(fontsize="x-small")
    axis.grid(alpha=0.3)
    return figure


# --- timelines -----------------------------------------------------------------------------------------------


def boundaries(run: dict[str, Any]) -> dict[int, float]:
    """Return when each of N_BLOCKS blocks in the middle of the last step began, and the next one, in milliseconds."""
    began, ended = run["steps"][-1]
    begins = {block: begin for kind, block, begin, _ in run["spans"] if kind == "device" and began <= begin < ended}
    if not begins:
        raise EdgeError("the last step has no blocks", "record again: python -m benchmarks run timeline_laptop")
    least, most = min(begins), max(begins)
    first = least + max(0, most - least + 1 - N_BLOCKS) // 2
    begins[most + 1] = ended
    return {block: begin for block, begin in sorted(begins.items()) if first <= block <= first + N_BLOCKS}


def lanes(run: dict[str, Any], begin: float, end: float) -> dict[str, list[Bar]]:
    """Return the bars between begin and end, cut there, counted from begin."""
    spans: dict[str, list[Bar]] = {name: [] for name in LANES}
    spans["kernels"] = run["kernels"]
    spans["copies to slots"] = [(began, ended) for began, ended, _ in run["copies"]]
    for kind, _, began, ended in run["spans"]:
        spans[SPANS[kind]].append((began, ended))
    return {
        name: [(max(b, begin) - begin, min(e, end) - max(b, begin)) for b, e in found if b < end and e > begin]
        for name, found in spans.items()
    }


def timeline(record: dict[str, Any]) -> Any:
    """Draw the device, the link and the decoding thread in some blocks of a step; a panel for each policy.

    A block begins where the thread begins to wait for its routing, so its prefetches are drawn in the blocks before.
    """
    runs = record["policies"]
    shown = [boundaries(run) for run in runs.values()]
    figure, axes = pyplot().subplots(
        len(runs), 1, figsize=(11, 0.6 + 2.6 * len(runs)), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (policy, run), begins in zip(axes[:, 0], runs.items(), shown, strict=True):
        _draw_run(axis, run, begins)
        axis.set_title(policy, loc="left", fontsize="medium", fontweight="bold")
    axes[-1, 0].set_xlabel(f"ms since block {min(shown[0])} began")
    figure.suptitle(_timeline_title(record, next(iter(runs.values()))), fontsize="small")
    return figure


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
    return f"{title}, EMULATED link={run['link']}\nBars of copies show the real link; the emulated one is waited for."


PICTURES = {
    "speed.svg": Picture(("speed_tales_laptop.json", "speed_qwen3_laptop.json", "speed_mixtral_laptop.json"), speed),
    "layers.svg": Picture(("layers.json",), layers),
    "timeline_laptop.svg": Picture(("timeline_laptop.json",), timeline),
    "timeline_link.svg": Picture(("timeline_link.json",), timeline),
}
