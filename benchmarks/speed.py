"""Tokens per second, from the rows of `edge-speq bench`.

A ratio compares speeds of the same repetition with the better of `lru` and `cpu-moe`, each at its best draft length and
with the same bytes on the device. Rows whose text differs from the reference by more than near ties get no ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import NONE, Row, Spread, arm_name, markdown, number

BASELINES = ("lru", "cpu-moe")
RENAMED = {"device": "auto, on miss fetch", "hybrid": "auto, on miss hybrid"}  # policies of earlier recordings
SHARES = ("1/8", "1/4", "1/2")
MACHINE = ("gpu_info", "cpu_info", "n_threads", "emulation", "model_filename", "test")
HEADINGS = (
    "in slots", "policy", "draft tokens", "device MB", "tokens/s", "× best baseline", "hit rate", "MB a token",
    "stall, ms a token", "CPU, ms a token", "TTFT, ms", "of bound", "text",
)  # fmt: skip


# --- reading -------------------------------------------------------------------------------------------------


def rows_of(found: Sequence[Row]) -> list[Row]:
    """Return the rows of one file with file names of models, arms as policies, and today's names of keys and arms."""
    return [
        row
        | {"model_filename": Path(row["model_filename"]).name}
        | {"policy": RENAMED.get(row["policy"], arm_name(row["policy"], row.get("on_miss", "auto")))}
        | {"draft_tokens": row.get("draft_tokens", row.get("speculation"))}
        for row in found
    ]


@dataclass(frozen=True, slots=True)
class Match:
    """Rows that compete: one run, one share of experts in slots, one budget."""

    share: str
    rows: tuple[Row, ...]

    @property
    def best_baseline(self) -> Row | None:
        sound = [row for row in self.rows if row["policy"] in BASELINES and row["outputs_match"] is not False]
        return max(sound, key=lambda row: statistics.median(row["samples_ts"]), default=None)

    def ratio(self, row: Row) -> Spread | None:
        """By repetition. None if the texts differ or there is no baseline."""
        best = self.best_baseline
        if best is None or row["outputs_match"] is False:
            return None
        return Spread.of(ours / theirs for ours, theirs in zip(row["samples_ts"], best["samples_ts"], strict=False))


@dataclass(frozen=True, slots=True)
class Group:
    """One table: a machine, an emulation, a model and a test."""

    rows: tuple[Row, ...]
    matches: tuple[Match, ...]


def groups(files: Sequence[Sequence[Row]]) -> list[Group]:
    """Group the rows of all files by table, smaller shares first."""
    found: dict[tuple[Any, ...], list[tuple[int, Row]]] = {}
    for run, rows in enumerate(files):
        for row in rows_of(rows):
            found.setdefault(tuple(row[key] for key in MACHINE), []).append((run, row))
    return [Group(tuple(row for _, row in pairs), tuple(_matches(pairs))) for pairs in found.values()]


def _matches(pairs: Sequence[tuple[int, Row]]) -> list[Match]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for run, row in pairs:
        found.setdefault((run, row.get("resident"), row["budget_bytes"]), []).append(row)
    made = [Match(_share(rows), tuple(rows)) for rows in found.values()]
    return sorted(made, key=lambda match: _fraction(match.rows))


def _share(rows: Sequence[Row]) -> str:
    asked = rows[0].get("resident")
    return str(asked) if asked is not None else f"{_fraction(rows):.2f}"


def _fraction(rows: Sequence[Row]) -> float:
    """Return the smallest share of the policies with slots; 1 without such a policy."""
    return min((row["resident_fraction"] or 0.0 for row in rows if row["placement"] == "slots"), default=1.0)


# --- the table of a run --------------------------------------------------------------------------------------


def report(*files: Sequence[Row]) -> str:
    """A table for each group of rows."""
    return "\n\n".join(_table(group) for group in groups(files))


def _table(group: Group) -> str:
    body = [_cells(match, row) for match in group.matches for row in match.rows]
    columns = [column for column in zip(HEADINGS, *body, strict=True) if set(column[1:]) != {NONE}]
    headings, *rows = zip(*columns, strict=True)
    means = [text for arm in _arms(group) if (text := _mean_text(group, *arm))]
    closing = [f"Geometric mean of the ratios: {'; '.join(means)}."] if means else []
    return "\n\n".join([_caption(group), markdown(headings, rows), *closing])


def _caption(group: Group) -> str:
    first = group.rows[0]
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
    n_tokens = row["n_gen"] * row["n_texts"] * len(row["samples_ts"])  # events are those of generated tokens
    over = " (over budget)" if row["over_budget"] else ""
    layers = f", {row['n_cpu_moe']} layers on the CPU" if row["n_cpu_moe"] else ""
    return [
        match.share,
        f"{row['policy']}{layers}{over}",
        str(row["draft_tokens"]),
        f"{row['used_bytes'] / 1e6:.1f}",
        _speed(row),
        _ratio(match, row),
        number(row["hit_rate"], 2),
        number(_each(row["bytes_fetched"], n_tokens), 2, 1e6),
        number(_each(row["stall_ms"], n_tokens), 2),
        number(_each(row.get("cpu_ms"), n_tokens), 2),
        number(row["ttft_ms"], 0),
        number(row["bound_fraction"], 2),
        {True: "equal", False: "DIFFERS"}.get(row["outputs_match"], str(row["outputs_match"])),
    ]


def _speed(row: Row) -> str:
    speed = Spread.of(row["samples_ts"])
    return speed.text(1 if speed.median < 100 else 0)


def _ratio(match: Match, row: Row) -> str:
    ratio = match.ratio(row)
    if ratio is None:
        return "texts differ" if row["outputs_match"] is False else NONE
    return "1" if row is match.best_baseline else ratio.text(2)


def _each(total: float | None, n: int) -> float | None:
    return None if total is None or not n else total / n


def _arms(group: Group) -> list[tuple[str, str]]:
    """Policies with slots that are no baselines, at each draft length."""
    arms = dict.fromkeys((row["policy"], row["draft_tokens"]) for row in group.rows)
    return [arm for arm in arms if arm[0] not in (*BASELINES, "all")]


def ratios(group: Group, policy: str, draft_tokens: str) -> dict[str, Spread | None]:
    """Of one arm, by share."""
    return {
        match.share: match.ratio(row)
        for match in group.matches
        for row in match.rows
        if (row["policy"], row["draft_tokens"]) == (policy, draft_tokens)
    }


def geometric_mean(found: dict[str, Spread | None]) -> float | None:
    """Of the medians; None if a share has no ratio."""
    medians = [ratio.median for ratio in found.values() if ratio is not None]
    return math.exp(statistics.fmean(map(math.log, medians))) if len(medians) == len(found) else None


def _mean_text(group: Group, policy: str, draft_tokens: str) -> str:
    found, name = ratios(group, policy, draft_tokens), f"{policy}, {draft_tokens} draft tokens"
    if len(found) < 2:
        return ""
    mean = geometric_mean(found)
    if mean is None:
        return f"{name}: none, as some ratios are missing"
    least = min(ratio.median for ratio in found.values() if ratio is not None)
    return f"{name}: {mean:.2f} (minimum {least:.2f}) over {', '.join(found)}"


# --- several runs side by side -------------------------------------------------------------------------------


def _auto(rows: Sequence[Row]) -> dict[str, Spread | None]:
    (group,) = groups([rows])
    return ratios(group, "auto", "0")


def _pooled(rows: Sequence[Row], share: str, policy: str, *, cut: bool) -> list[float]:
    """Tokens per second of all rounds, of Mixtral's shape whole or cut."""
    return [
        speed
        for row in rows_of(rows)
        if (row["resident"], row["policy"]) == (share, policy) and is_cut(row) == cut
        for speed in row["samples_ts"]
    ]


def is_cut(row: Row) -> bool:
    """Return true if a row is of the file whose experts are cut in four."""
    return row["model_filename"] in ("parts4.gguf", "mixtral-cut.gguf")


def cut_ratio(rows: Sequence[Row], share: str) -> Spread | None:
    """`auto` on the cut file to the best baseline on the whole one, by repetition."""
    ours = _pooled(rows, share, "auto", cut=True)
    theirs = [found for policy in BASELINES if (found := _pooled(rows, share, policy, cut=False))]
    if not ours or not theirs:
        return None
    return Spread.of(a / b for a, b in zip(ours, max(theirs, key=statistics.median), strict=False))


def readme(tales: list[Row], qwen3: list[Row], mixtral: list[Row], cut: list[Row]) -> str:
    named: dict[str, Callable[[str], Spread | None]] = {
        "bundled model, inflated to 9.5 GB": _auto(tales).get,
        "Qwen3-30B-A3B's shape": _auto(qwen3).get,
        "Mixtral-8x7B's shape": _auto(mixtral).get,
        "Mixtral-8x7B's shape, experts cut in four": lambda share: cut_ratio(cut, share),
    }
    rows = [[name, *(_text(of(share)) for share in SHARES)] for name, of in named.items()]
    return markdown(("model", *(f"{share} of the experts in slots" for share in SHARES)), rows)


def _text(ratio: Spread | None) -> str:
    return NONE if ratio is None else ratio.text(2)


def summary(*files: list[Row]) -> str:
    """Geometric means; files are those of the laptop and of the own link in turn."""
    models = ("bundled model, inflated", "Qwen3-30B-A3B's shape", "Mixtral-8x7B's shape")
    rows, every = [], list[list[float]]([[], []])
    for name, *pair in zip(models, files[::2], files[1::2], strict=True):
        found = [_auto(file) for file in pair]
        for known, of_share in zip(every, found, strict=True):
            known += [ratio.median for ratio in of_share.values() if ratio is not None]
        rows.append([name, *(_mean_cell(of_share) for of_share in found)])
    rows.append(["all three", *(f"{statistics.geometric_mean(known):.2f}" for known in every)])
    return markdown(("model", "emulated laptop", "own link"), rows)


def _mean_cell(found: dict[str, Spread | None]) -> str:
    mean, each = geometric_mean(found), [found[share] for share in SHARES]
    return f"{number(mean, 2)} ({', '.join(NONE if ratio is None else f'{ratio.median:.2f}' for ratio in each)})"


def earlier(*files: list[Row]) -> str:
    rows = []
    for file in files:
        (group,) = groups([file])
        first, found = group.rows[0], ratios(group, "auto", "0")
        where = first["emulation"] or f"own link, {first['n_threads']} threads"
        each = [_text(found.get(share)) for share in SHARES]
        rows.append([first["test_time"][:16].replace("T", " "), first["model_filename"], where, first["test"], *each])
    rows.sort(key=lambda row: row[0])
    return markdown(("measured", "model", "machine", "test", *SHARES), rows)


def cut(laptop: list[Row], own: list[Row]) -> str:
    columns = [(file, share) for file in (own, laptop) for share in ("1/4", "1/2")]
    arms = (("`auto`, cut in four", "auto", True), *((f"`{p}`, whole", p, False) for p in ("auto", *BASELINES)))
    rows = []
    for name, policy, is_of_cut in arms:
        found = [_pooled(file, share, policy, cut=is_of_cut) for file, share in columns]
        rows.append([name, *(Spread.of(speeds).text(1) if speeds else NONE for speeds in found)])
    rows.append(["cut, × the best baseline", *(_text(cut_ratio(*column)) for column in columns)])
    return markdown(("", "own link, 1/4", "own link, 1/2", "emulated laptop, 1/4", "emulated laptop, 1/2"), rows)


def where_time_goes(laptop: list[Row], own: list[Row]) -> str:
    rows = []
    for where, file, policies in (("emulated laptop", laptop, ("auto",)), ("own link", own, ("auto", "lru"))):
        (group,) = groups([file])
        for policy in policies:
            rows += [[where, policy, *_parts(match, policy)] for match in group.matches]
    headings = ("total", "CPU experts", "stalls", "everything resident", "rest")
    return markdown(("machine", "policy", "in slots", *headings), rows)


def _parts(match: Match, policy: str) -> Iterator[str]:
    row = next(row for row in match.rows if row["policy"] == policy)
    every = next(row for row in match.rows if row["policy"] == "all")
    n_tokens = row["n_gen"] * row["n_texts"] * len(row["samples_ts"])
    total, resident = (1e3 / statistics.median(r["samples_ts"]) for r in (row, every))
    cpu, stall = row["cpu_ms"] / n_tokens, row["stall_ms"] / n_tokens
    yield match.share
    yield from (f"{ms:.1f}" for ms in (total, cpu, stall, resident, total - cpu - stall - resident))


def by_draft_tokens(found: list[Row]) -> str:
    """Arms by draft length: tokens per second and hit rate."""
    names = {
        "auto": "`auto`", "lfru": "no foresight (`lfru`)", "auto, on miss fetch": "no hybrid execution (`fetch`)",
        "lru": "none of them (`lru`)",
    }  # fmt: skip
    rows, body = rows_of(found), []
    for policy, name in names.items():
        mine = {row["draft_tokens"]: row for row in rows if row["policy"] == policy}
        if mine:
            body.append([name, *(f"{_speed(mine[k])}, {number(mine[k]['hit_rate'], 2)}" for k in ("auto", "2", "0"))])
    return markdown(("", "draft tokens auto", "2", "0"), body)
