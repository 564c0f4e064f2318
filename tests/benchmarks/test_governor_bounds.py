"""What is stored of the draft length control, replayed, keeps its bounds."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import governor
from benchmarks.registry import RESULTS, read

ROWS = read(RESULTS / "governor_replayed.json")


@pytest.mark.parametrize("domain", ["prose", "code", "chat", "textbook"])
def test_what_is_stored_keeps_the_bounds(domain: str) -> None:
    assert len(ROWS) == 4 * len(list(governor.cells()))
    of_best, of_none = (
        np.array([row[name] for row in ROWS if row["domain"] == domain]) for name in ("of_best", "of_none")
    )
    assert np.median(of_best) >= governor.MEDIAN_OF_BEST
    assert np.mean(of_best >= governor.MOST_OF_BEST) >= governor.SHARE_OF_CASES
    assert of_best.min() >= governor.LEAST_OF_BEST
    assert of_none.min() >= governor.LEAST_OF_NONE
