"""Writes the tables of `edge-speq bench` results into docs/performance.md, or checks that they are there.

    python tools/bench_report.py            # writes what stands between the markers
    python tools/bench_report.py --check    # exit code 1 where it is not what the files say
    python tools/bench_report.py --print docs/measurements/FILE.json

Between `<!-- bench: FILE... -->` and `<!-- /bench -->` stand the rows of those files of docs/measurements (-o json or
jsonl), a table for each machine, emulation, model and test. Speeds and ratios are medians over the repetitions with the
least and the greatest. A ratio is that of two speeds of the same repetition, to the best of lru and cpu-moe at the same
bytes in the same run, each at its best draft length; where texts differ by more than near ties there is none.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PERFORMANCE, MEASUREMENTS = DOCS / "performance.md", DOCS / "measurements"
SECTION = re.compile(r"(<!-- bench: ([^>]*?) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
BASELINES = ("lru", "cpu-moe")
MACHINE = ("gpu_info", "cpu_info", "n_threads", "emulation", "model_filename", "test")
NONE = "–"
HEADINGS = (
    "resident", "policy", "K", "device MB", "t/s", "× best baseline", "hits", "MB a token", "stall, ms a token",
    "CPU, ms a token", "TTFT, ms", "of bound", "text",
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some repetitions, the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} [{self.least:.{digits}f}, {self.greatest:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Match:
    """Rows that compete: one run, one share of resident experts, one budget."""

    share: str
    rows: tuple[Row, ...]

    @property
    def best_baseline(self) -> Row | None:
        sound = [row for row in self.rows if row["policy"] in BASELINES and row["outputs_match"] is not False]
        return max(sound, key=lambda row: statistics.median(row["samples_ts"]), default=None)

    def ratio(self, row: Row) -> Spread | None:
        """Repetition by repetition; None where the texts differ or nothing is there to compare with."""
        best = self.best_baseline
        if best is None or row["outputs_match"] is False:
            return None
        return Spread.of(ours / theirs for ours, theirs in zip(row["samples_ts"], best["samples_ts"], strict=False))


@dataclass(frozen=True, slots=True)
class Group:
    """One table: a machine, an emulation, a model and a test."""

    rows: tuple[Row, ...]
    matches: tuple[Match, ...]


# --- reading -------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """Rows of a file of -o json or -o jsonl."""
    text = path.read_text(encoding="utf-8")
    rows: list[Row] = json.loads(text) if text.lstrip().startswith("[") else [*map(json.loads, text.splitlines())]
    return [row | {"model_filename": Path(row["model_filename"]).name} for row in rows]


def groups(files: Sequence[Sequence[Row]]) -> list[Group]:
    """The rows of each file, those that share a table together, smaller shares first."""
    found: dict[tuple[Any, ...], list[tuple[int, Row]]] = {}
    for run, rows in enumerate(files):
        for row in rows:
            found.setdefault(tuple(row[key] for key in MACHINE), []).append((run, row))
    return [Group(tuple(row for _, row in entries), tuple(_matches(entries))) for entries in found.values()]


def _matches(entries: Sequence[tuple[int, Row]]) -> list[Match]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for run, row in entries:
        found.setdefault((run, row.get("resident"), row["budget_bytes"]), []).append(row)
    made = [Match(_share(rows), tuple(rows)) for rows in found.values()]
    return sorted(made, key=lambda match: _fraction(match.rows))


def _share(rows: Sequence[Row]) -> str:
    asked = rows[0].get("resident")
    return str(asked) if asked is not None else f"{_fraction(rows):.2f}"


def _fraction(rows: Sequence[Row]) -> float:
    """Of the policies with slots; 1 where there is none."""
    return min((row["resident_fraction"] or 0.0 for row in rows if row["placement"] == "slots"), default=1.0)


# --- tables --------------------------------------------------------------------------------------------------


def report(files: Sequence[Sequence[Row]]) -> str:
    """What stands between the markers."""
    return "\n".join(_table(group) for group in groups(files))


def _table(group: Group) -> str:
    first = group.rows[0]
    body = [_cells(match, row) for match in group.matches for row in match.rows]
    columns = [column for column in zip(HEADINGS, *body, strict=True) if set(column[1:]) != {NONE}]
    table = [f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True)]
    table.insert(1, "|" + "---|" * len(columns))
    means = _means(group)
    closing = [f"Geometric means of ratios: {'; '.join(means)}.", ""] if means else []
    return "\n".join([_caption(first, group), "", *table, "", *closing])


def _caption(first: Row, group: Group) -> str:
    emulated = f", **emulated** {first['emulation']}" if first["emulation"] else ""
    hardware = ", ".join(text for text in (first["gpu_info"], first["cpu_info"]) if text)
    counts = sorted({len(row["samples_ts"]) for row in group.rows})
    repetitions = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    drafts = sorted({row["draft"] for row in group.rows if row["draft"]})
    draft = f", draft {', '.join(drafts)}" if drafts else ""
    return (
        f"**{first['model_filename']}** ({first['model_type']}, {first['model_size'] / 1e9:.2f} GB{draft}), "
        f"{first['test']}: {hardware}, {first['n_threads']} CPU threads{emulated}; {repetitions} repetitions of "
        f"{first['n_texts']} texts, {first['test_time'][:10]}, llama.cpp {first['build_commit']}."
    )


def _cells(match: Match, row: Row) -> list[str]:
    speed = Spread.of(row["samples_ts"])
    n_tokens = row["n_gen"] * row["n_texts"] * len(row["samples_ts"])  # events are those of generated tokens
    over = " (over budget)" if row["over_budget"] else ""
    layers = f", {row['n_cpu_moe']} layers on the CPU" if row["n_cpu_moe"] else ""
    return [
        match.share,
        f"{row['policy']}{layers}{over}",
        str(row["speculation"]),
        f"{row['used_bytes'] / 1e6:.1f}",
        speed.text(1 if speed.median < 100 else 0),
        _ratio(match, row),
        _number(row["hit_rate"], 2),
        _number(_each(row["bytes_fetched"], n_tokens), 2, 1e6),
        _number(_each(row["stall_ms"], n_tokens), 2),
        _number(_each(row.get("cpu_ms"), n_tokens), 2),
        _number(row["ttft_ms"], 0),
        _number(row["bound_fraction"], 2),
        {True: "equal", False: "DIFFERS"}.get(row["outputs_match"], str(row["outputs_match"])),
    ]


def _ratio(match: Match, row: Row) -> str:
    ratio = match.ratio(row)
    if ratio is None:
        return "texts differ" if row["outputs_match"] is False else NONE
    return "1" if row is match.best_baseline else ratio.text(2)


def _each(total: float | None, n: int) -> float | None:
    return None if total is None or not n else total / n


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    return NONE if value is None else f"{value / unit:.{digits}f}"


def _means(group: Group) -> list[str]:
    """Of each policy with slots that is no baseline and was measured at several shares."""
    arms = dict.fromkeys((r["policy"], r["speculation"]) for r in group.rows)
    return [text for arm in arms if arm[0] not in (*BASELINES, "all") and (text := _mean(group, *arm))]


def _mean(group: Group, policy: str, speculation: str) -> str:
    own = (policy, speculation)
    found = [
        (match, row) for match in group.matches for row in match.rows if (row["policy"], row["speculation"]) == own
    ]
    shares, name = list(dict.fromkeys(match.share for match, _ in found)), f"{policy}, K = {speculation}"
    if len(shares) < 2:
        return ""
    ratios = [ratio.median for match, row in found if (ratio := match.ratio(row)) is not None]
    if len(ratios) < len(found):
        return f"{name}: none, as some ratios are missing"
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    return f"{name}: {mean:.2f} (least {min(ratios):.2f}) over {', '.join(shares)}"


# --- the document --------------------------------------------------------------------------------------------


def generated(text: str, folder: Path = MEASUREMENTS) -> str:
    """A document with what its markers ask for."""

    def section(match: re.Match[str]) -> str:
        return match[1] + report([read(folder / name) for name in match[2].split()]) + match[4]

    return SECTION.sub(section, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where something would")
    parser.add_argument("--print", nargs="+", type=Path, metavar="FILE", help="only print the tables of these files")
    options = parser.parse_args()
    if options.print:
        print(report([read(path) for path in options.print]))
        return 0
    text = PERFORMANCE.read_text(encoding="utf-8")
    wanted = generated(text)
    if options.check:
        if wanted != text:
            print(f"{PERFORMANCE} is not what is stored: run tools/bench_report.py", file=sys.stderr)
        return int(wanted != text)
    if wanted != text:
        PERFORMANCE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
