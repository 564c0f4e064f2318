"""Values as people write and read them: sizes, rates, shares, draft tokens. Bytes and rates need a unit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from edge_speq.errors import EdgeError

LEAST_BYTES = 1 << 20  # an int below it is a number of MiB or GiB that lacks its unit

_UNITS = {"b": 1}
_UNITS |= {f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}
_UNITS |= {f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}
_UNITS |= {p: 1024 ** (i + 1) for i, p in enumerate("kmgt")}  # 32G, as llama.cpp and Docker read it


def format_bytes(n_bytes: float) -> str:
    """Return a size in binary units, as memory is counted: "999 B", "1.5 KiB", "2.0 MiB", "3.50 GiB"."""
    return _scaled(n_bytes, 1024, ("B", "KiB", "MiB", "GiB"))


def format_rate(bytes_per_s: float) -> str:
    """Return a rate in decimal units, as links are sold: "500.0 MB/s", "12.50 GB/s"."""
    return _scaled(bytes_per_s, 1000, ("B/s", "kB/s", "MB/s", "GB/s"))


def _scaled(value: float, step: int, names: tuple[str, str, str, str]) -> str:
    for name, digits in zip(names[:3], (0, 1, 1), strict=True):
        if float(f"{value:.{digits}f}") < step:  # as it is shown: never "1024.0 MiB"
            return f"{value:.{digits}f} {name}"
        value /= step
    return f"{value:.2f} {names[3]}"


def parse_bytes(value: str | int, name: str = "") -> int:
    """Return the bytes of "6GiB", "500MB", "32G" or an int of bytes. `name` is the option that the error names.

    Raises EdgeError (usage) for a number without a unit and for anything that is not a size.
    """
    what = f"{name}={value!r}" if name else repr(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= LEAST_BYTES:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", str(value), re.IGNORECASE)
    if match and not match[2]:
        raise EdgeError(f"{what}: give a unit, {_with_units(match[1])}", usage=True)
    if not match or match[2].lower() not in _UNITS:
        raise EdgeError(f"{what} is not a size in bytes", "write it like 6GiB or 500MB", usage=True)
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _with_units(number: str) -> str:
    gib = float(number) / 1024
    if gib >= 1024:
        return f"{number}B or {float(number) / 2**20:.0f}MiB"
    return f"{number}MiB or {gib:g}GiB" if gib >= 1 else f"{number}GiB or {number}MiB"


def parse_rate(value: str | int, name: str = "") -> int:
    """Return the bytes per second of "12.5GB/s", "12.5 GB/s", "12.5GB" or an int. `name` is the option's.

    Raises EdgeError (usage) for a number without a unit, for 0, and for anything that is not a rate.
    """
    what = f"{name}={value!r}" if name else repr(value)
    try:
        text = re.sub(r"\s*/\s*s(ec)?\s*$", "", value) if isinstance(value, str) else value
        rate = parse_bytes(text, name)
    except EdgeError as error:
        if "give a unit" in error.message:
            raise EdgeError(f"{what}: give a unit, {value}GB/s or {value}MB/s", usage=True) from None
        rate = 0
    if rate <= 0:
        raise EdgeError(f"{what} is not the speed of a link", "write it like 12.5GB/s", usage=True)
    return rate


def parse_share(value: str | float) -> float:
    """Return a share of the expert bytes, in (0, 1], of "1/4", "0.25" or 0.25. Raises EdgeError otherwise."""
    try:
        share = float(Fraction(str(value)))
    except (ValueError, ZeroDivisionError):
        share = -1.0
    if not 0.0 < share <= 1.0:
        raise EdgeError(f"resident={value!r} is not a share between 0 and 1", "write it like 1/4 or 0.25", usage=True)
    return share


def parse_draft_tokens(value: int | str) -> int | str:
    """Return draft tokens per step, 0 to 64, or "auto". Raises EdgeError for anything else."""
    if value == "auto":
        return "auto"
    try:
        k = int(value)
    except (TypeError, ValueError):
        k = -1
    if not 0 <= k <= 64:
        raise EdgeError(f"draft_tokens={value!r} is not a number of draft tokens", "give 0 to 64, or auto", usage=True)
    return k


def require_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return the value. Raises EdgeError (usage) unless it is one of the choices."""
    if value not in choices:
        raise EdgeError(f"{name}={value!r} is not known", f"choose one of {', '.join(choices)}", usage=True)
    return value
