"""Values as people write and read them: sizes, rates, shares, draft tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from edge_speq.core import POLICIES
from edge_speq.errors import EdgeError

_UNITS = {"": 1, "B": 1}


_UNITS |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}


_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}


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


def parse_bytes(text: str | int) -> int:
    """Bytes of "6GiB", "500MB" or 123. Raises EdgeError for anything else or for a negative number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(text), re.IGNORECASE)
    units = {name.lower(): size for name, size in _UNITS.items()}
    if not match or match[2].lower() not in units:
        raise EdgeError(f"{text!r} is not a size in bytes", "write it like 6GiB or 500MB", usage=True)
    return int(float(match[1]) * units[match[2].lower()])


def parse_rate(text: str | int) -> int:
    """Bytes per second of "12.5GB/s" or 12500000000. Raises EdgeError for anything else and for nothing."""
    rate = parse_bytes(str(text).removesuffix("/s"))
    if rate <= 0:
        raise EdgeError(f"{text!r} is not the speed of a link", "write it like 12.5GB/s", usage=True)
    return rate


def parse_share(text: str | float) -> float:
    """A share of the expert bytes, in (0, 1], of "1/4", "0.25" or 0.25. Raises EdgeError otherwise."""
    try:
        share = float(Fraction(str(text)))
    except (ValueError, ZeroDivisionError):
        share = -1.0
    if not 0.0 < share <= 1.0:
        raise EdgeError(f"resident={text!r} is not a share between 0 and 1", "write it like 1/4 or 0.25", usage=True)
    return share


def parse_speculation(value: int | str) -> int | None:
    """Draft tokens a step, None for "auto". Raises EdgeError for anything but 0 to 64."""
    if value == "auto":
        return None
    try:
        k = int(value)
    except (TypeError, ValueError):
        k = -1
    if not 0 <= k <= 64:
        raise EdgeError(f"speculation={value!r} is not a number of draft tokens", "give 0 to 64, or auto", usage=True)
    return k


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises EdgeError unless value is one of choices."""
    if value not in choices:
        raise EdgeError(f"{name}={value!r} is not known", f"choose one of {', '.join(choices)}", usage=True)


def parse_policy(value: str, choices: Sequence[str] = POLICIES) -> str:
    """The name of a policy. Raises EdgeError for another one."""
    require_choice("policy", value, choices)
    return value
