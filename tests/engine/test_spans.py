"""What the decoding thread did when: Hook.record() and spans()."""

from __future__ import annotations

import time

import numpy as np

from edge_speq import EdgeLlama, _native
from edge_speq.gguf import bundled

DEVICE, DECIDE = _native.SPANS.index("device"), _native.SPANS.index("decide")


def test_spans_follow_one_another_within_the_call_and_stop_at_their_number() -> None:
    model = EdgeLlama(
        str(bundled.path(bundled.MODEL)), resident=0.5, policy="lru", draft_tokens=0, draft=None, n_ctx=128
    )
    try:
        hook, n_blocks = model._hook, model._experts.n_blocks
        assert hook is not None
        model.create_completion("The", max_tokens=2)
        assert len(hook.spans()) == 0  # nothing was asked for
        hook.record(4 * n_blocks + 1)
        began = time.monotonic_ns()
        model.create_completion("The", max_tokens=4)
        ended = time.monotonic_ns()
        spans = hook.spans()
    finally:
        model.close()
    assert len(spans) == 4 * n_blocks + 1  # two of each block of a step, and more steps than there was room for
    assert spans["kind"][:2].tolist() == [DEVICE, DECIDE]
    assert spans["block"][: 2 * n_blocks].tolist() == list(np.repeat(np.arange(n_blocks), 2))
    assert began < spans["begin_ns"][0]
    assert spans["end_ns"][-1] < ended
    assert np.all(spans["begin_ns"] <= spans["end_ns"])
    assert np.all(spans["end_ns"][:-1] <= spans["begin_ns"][1:])
