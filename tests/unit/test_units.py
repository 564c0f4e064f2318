"""Sizes and rates as they are shown."""

from __future__ import annotations

import pytest

from edge_speq.units import format_bytes, format_rate


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 30) - 1, "1.00 GiB"),  # never 1024.0 MiB
        (7 << 29, "3.50 GiB"),
        (5 << 40, "5120.00 GiB"),
    ],
)
def test_sizes_are_binary(n_bytes: int, shown: str) -> None:
    assert format_bytes(n_bytes) == shown


def test_rates_are_decimal() -> None:
    shown = [format_rate(rate) for rate in (0, 999, 1500, 5e8, 999.96e6, 12.5e9)]
    assert shown == ["0 B/s", "999 B/s", "1.5 kB/s", "500.0 MB/s", "1.00 GB/s", "12.50 GB/s"]
