"""Plot of a replay: read gap between LRU and Belady that each policy closes, and speed, by resident share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_speq.errors import EdgeError
from edge_speq.system import install_hint


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG, PDF or SVG file, by its suffix. Raises EdgeError without matplotlib or if it cannot be written."""
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise EdgeError("--plot needs matplotlib", install_hint("plot")) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    traces = list(dict.fromkeys(row["trace"] for row in rows))
    figure, axes = pyplot.subplots(2, len(traces), figsize=(5 * len(traces) + 2, 7), squeeze=False, sharex="col")
    names = dict.fromkeys(row["policy"] for row in rows)
    colours = {name: pyplot.get_cmap("tab20")(i) for i, name in enumerate(names)}
    for column, trace in enumerate(traces):
        mine = [row for row in rows if row["trace"] == trace and row["domain"] == "all" and row["policy"] != "belady"]
        for name in dict.fromkeys(row["policy"] for row in mine):
            points = sorted(
                (r["resident"], _number(r["read_gap"]), r["tok_per_s"]) for r in mine if r["policy"] == name
            )
            shares = [point[0] for point in points]
            style = {"marker": "o", "label": name, "color": colours.get(name)}
            axes[0][column].plot(shares, [point[1] for point in points], **style)
            axes[1][column].plot(shares, [point[2] for point in points], **style)
        axes[0][column].set(title=trace, ylabel="read gap LRU to Belady, closed", ylim=(-0.5, 1.2))
        axes[1][column].set(xlabel="resident share of the experts", ylabel="tokens per second, predicted", yscale="log")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize="small", loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 1.5 / figure.get_figwidth(), 1))
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise EdgeError(f"cannot write {path}: {error}", "give a file that ends in .png, .pdf or .svg") from error
    finally:
        pyplot.close(figure)


def _number(value: float | None) -> float:
    """Return NaN, which draws no point, if LRU and Belady read the same bytes."""
    return float("nan") if value is None else value
