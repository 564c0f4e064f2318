"""Output of rows as Markdown, CSV, JSON and JSON lines, in llama-bench's formats."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence

from edge_speq.bench.rows import NESTED, Row
from edge_speq.units import format_bytes

Column = tuple[str, Callable[[Row], str], bool]  # heading, cell, aligned to the left


def markdown(rows: Sequence[Row]) -> str:
    """Return a table with the columns of llama-bench and ours, and below it the hardware and settings."""
    if not rows:
        return ""
    emulation = rows[0]["emulation"]
    lines = [f"EMULATED, not this machine's own speeds: {emulation}", ""] if emulation else []
    return "\n".join([*lines, *table(rows, _columns(rows)), "", *_footer(rows)])


def table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    cells = [[cell(row) for row in rows] for _, cell, _ in columns]
    widths = [
        max(3, *(len(text) for text in (heading, *column)))
        for (heading, _, _), column in zip(columns, cells, strict=True)
    ]
    left = [is_left for _, _, is_left in columns]
    rule = [("-" * w if is_left else "-" * (w - 1) + ":") for w, is_left in zip(widths, left, strict=True)]
    body = [[heading for heading, _, _ in columns], rule, *(list(line) for line in zip(*cells, strict=True))]
    return [_line(line, widths, left) for line in body]


def _line(texts: Sequence[str], widths: Sequence[int], left: Sequence[bool]) -> str:
    padded = [t.ljust(w) if is_left else t.rjust(w) for t, w, is_left in zip(texts, widths, left, strict=True)]
    return "| " + " | ".join(padded) + " |"


def _columns(rows: Sequence[Row]) -> list[Column]:
    first = rows[0]
    emulated = f" ({first['emulation']})" if first["emulation"] else ""
    columns: list[Column] = [
        ("model", lambda r: str(r["model_type"]), True),
        ("size", lambda r: format_bytes(r["model_size"]), False),
        ("params", lambda r: _count(r["model_n_params"]), False),
        ("backend", lambda r: str(r["backends"]), True),
        ("threads", lambda r: str(r["n_threads"]), False),
        ("policy", _policy, True),
        ("K", lambda r: str(r["draft_tokens"]), False),
        ("resident", lambda r: _number(r["resident_fraction"], ".2f"), False),
        ("device MiB", lambda r: f"{r['used_bytes'] / 2**20:.1f}{' over' if r['over_budget'] else ''}", False),
        ("test", lambda r: str(r["test"]), False),
        (f"t/s{emulated}", lambda r: f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}", False),
        (f"vs {first['baseline']}", lambda r: _number(r["speedup"], ".2f"), False),
        ("of bound", lambda r: _number(r["bound_fraction"], ".0%"), False),
        ("hits", lambda r: _number(r["hit_rate"], ".1%"), False),
        ("foreseen", lambda r: "/".join(_number(r[f"foresight_{n}"], ".2f") for n in ("precision", "recall")), False),
        ("accepted", lambda r: _number(r["acceptance"], ".1%"), False),
        ("text", lambda r: {True: "equal", False: "DIFFERS"}.get(r["outputs_match"], str(r["outputs_match"])), True),
    ]
    return columns


def _policy(row: Row) -> str:
    """Return the policy, with the way to serve misses where it is not the default."""
    on_miss = "" if row["on_miss"] == "auto" else f", {row['on_miss']}"
    return f"{row['policy']}{on_miss}{' (lossy)' if row['lossy'] else ''}"


def _footer(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    hardware = ", ".join(text for text in (first["cpu_info"], first["gpu_info"], first["gpu_driver"]) if text)
    ram = "" if first["ram_bytes"] is None else f", {format_bytes(first['ram_bytes'])} RAM"
    lines = [
        f"build: {first['build_commit']} (edge_speq {first['edge_speq_version']})",
        f"hardware: {hardware}{ram}",
        f"model: {first['model_filename']}, header and size {first['model_hash'][:16]}",
        f"device budget: {_budgets(rows)}; over: holds more (without a GPU mapped experts are not in the figure)",
    ]
    if first["deterministic"]:
        lines.append("deterministic: stalls are virtual and were added to times of the clock; counters repeat")
    return lines


def _budgets(rows: Sequence[Row]) -> str:
    budgets = {row["resident"]: format_bytes(row["budget_bytes"]) for row in rows}
    if len(budgets) == 1:
        return f"{next(iter(budgets.values()))} for every row"
    return ", ".join(f"{size} at {share}" for share, size in budgets.items())


def as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    fields = _fields(rows)
    text.write(",".join(fields) + "\n" if rows else "")
    writer.writerows([["" if row[name] is None else row[name] for name in fields] for row in rows])
    return text.getvalue().rstrip("\n")


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps(list(rows), indent=2)


def as_jsonl(rows: Sequence[Row]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def _fields(rows: Sequence[Row]) -> list[str]:
    return [name for name in (rows[0] if rows else ()) if name not in NESTED]


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _count(n: int) -> str:
    return f"{n / 1e6:.2f} M" if n < 10**9 else f"{n / 1e9:.2f} B"


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "md": markdown,
    "csv": as_csv,
    "json": as_json,
    "jsonl": as_jsonl,
}
