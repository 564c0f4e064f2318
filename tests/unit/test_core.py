from __future__ import annotations

import pytest

from edge_speq.core import ExpertCounters, Speculation
from edge_speq.errors import EdgeError
from edge_speq.units import parse_bytes, parse_rate, parse_share


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", 6 << 30),
        ("500MB", 500_000_000),
        ("1.5kib", 1536),
        ("123B", 123),
        (77 << 20, 77 << 20),
        ("32G", 32 << 30),
        ("12.5 GB", 12_500_000_000),
        ("-1MB", None),
        ("6Gi", None),
        ("", None),
    ],
)
def test_parse_bytes(text: str | int, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(EdgeError, match="not a size") as error:
            parse_bytes(text)
        assert error.value.usage
    else:
        assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("value", "hint"),
    [("8192", "8192MiB or 8GiB"), (8192, "8192MiB or 8GiB"), ("6", "6GiB"), ("48640448", "48640448B")],
)
def test_a_size_without_a_unit_is_refused_with_the_right_spelling(value: str | int, hint: str) -> None:
    with pytest.raises(EdgeError, match=r"vram_budget=.*: give a unit, ") as error:
        parse_bytes(value, "vram_budget")
    assert hint in error.value.message and error.value.usage


@pytest.mark.parametrize("text", ["12.5GB/s", "12.5 GB/s", "12.5GB / s", "12.5GB"])
def test_parse_rate(text: str) -> None:
    assert parse_rate(text) == 12_500_000_000


@pytest.mark.parametrize(("text", "message"), [("12.5", "give a unit"), ("0GB/s", "speed of"), ("fast", "speed")])
def test_what_is_no_rate(text: str, message: str) -> None:
    with pytest.raises(EdgeError, match=message):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("1/4", 0.25), ("0.5", 0.5), (1, 1.0), ("0", None), ("3/2", None), ("x", None)]
)
def test_parse_share(text: str | float, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(EdgeError, match="not a share"):
            parse_share(text)
    else:
        assert parse_share(text) == expected


def test_ratios_follow_the_glossary() -> None:
    assert ExpertCounters(hits=3, misses=1).hit_rate == 0.75
    assert ExpertCounters(hits=0, misses=0).hit_rate is None
    assert ExpertCounters(hits=None, misses=None).hit_rate is None
    speculation = Speculation(steps=10, drafted=40, accepted=30)
    assert (speculation.acceptance, speculation.mean_draft_tokens) == (0.75, 4.0)
