from __future__ import annotations

import pytest

from edge_speq.core import ExpertCounters, Speculation
from edge_speq.errors import EdgeError
from edge_speq.units import parse_bytes, parse_share


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6GiB", 6 << 30), ("500MB", 500_000_000), ("1.5kib", 1536), ("123", 123), (77, 77), ("2G", None), ("-1MB", None)],
)
def test_parse_bytes(text: str | int, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(EdgeError, match="not a size") as error:
            parse_bytes(text)
        assert error.value.usage
    else:
        assert parse_bytes(text) == expected


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
