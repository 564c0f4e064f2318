"""The native hook on one model: routing, slots, prefetches, draft experts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq._native.library import check, llama, load, view
from edge_speq.core import ExpertCounters, Experts, HybridCosts

PREFETCH_REQUEST: npt.DTypeLike = np.dtype(  # edge_prefetch_request: fields and units are the header's
    [("block", np.int32), ("expert", np.int32), ("deadline", np.int32), ("priority", np.float32)]
)
DRAFT_TENSOR: npt.DTypeLike = np.dtype(  # edge_draft_tensor
    [("block", np.int32), ("role", np.int32), ("type", np.int32), ("offset", np.uint64)], align=True
)
SPAN: npt.DTypeLike = np.dtype(  # edge_span
    [("kind", np.int32), ("block", np.int32), ("begin_ns", np.uint64), ("end_ns", np.uint64)], align=True
)
SPANS = ("device", "decide", "cpu", "copies", "next_layer")  # EDGE_SPAN_..., by number
NO_BUDGET = 2**64 - 1  # bytes
PREFILL_TOKENS = 64  # EDGE_PREFILL_TOKENS
_EXPERTS = {"own": 0, "draft": 1, "resident": 2}  # EDGE_EXPERTS_...
_ON_MISS = {"fetch": 0, "hybrid": 1, "auto": 2}  # EDGE_ON_MISS_...


@dataclass(frozen=True, slots=True)
class Transfers:
    """How missing experts are served and how copies travel; edge_hook_params in the header."""

    link_bytes_per_s: int = 0  # throttle; 0: none
    deterministic: bool = False  # transfers take virtual time, so that counters repeat
    block_ns: int = 0  # virtual time in which one block computes
    on_miss: str = "fetch"  # or "hybrid", or "auto"
    n_threads: int = 0  # of the CPU for missing experts; 0: ggml's default
    next_layer_prefetch: bool = False  # prefetch what a block's input predicts for the next one; hybrid and auto only


def slot_floor(experts: Experts, max_width: int) -> int:
    """Return the slots that a group needs for graphs of max_width tokens: all their experts, and one to load into."""
    ffi, lib = load()
    floor = ffi.new("int32_t *")
    check(lib.edge_slot_floor(experts.n_expert, experts.n_expert_used, max_width, floor))
    return int(floor[0])


def fail(fault: str, nth: int) -> None:
    """Make the nth "allocation", "copy" or "routing" read from now on fail, once; 0 disarms. For tests."""
    _, lib = load()
    check(lib.edge_test_fail(getattr(lib, f"EDGE_FAULT_{fault.upper()}"), nth))


class Hook:
    """The native hook on one loaded model. Attach before its context exists, detach after it is freed.

    With `slots` (a count per expert group) experts are served from slots; without, only routing is recorded. Raises
    EdgeError for a dense model, for slots under the floor, and for expert weights outside plain host memory.
    """

    def __init__(
        self,
        model: int,
        experts: Experts,
        max_width: int,
        slots: Sequence[int] = (),
        transfers: Transfers = Transfers(),  # frozen
        *,
        reads_prefill: bool = False,
    ) -> None:
        ffi, lib = load()
        self.experts = experts
        self.max_width = max_width
        self.n_slots = sum(slots)
        self.decoding = False  # a decode has begun, and end_step() has not been called for it
        self._has_slots = bool(slots)
        counts = ffi.new("int32_t[]", list(slots) or [0])
        params = ffi.new("edge_hook_params *", {"max_width": max_width, "n_groups": len(slots), "slots": counts})
        params.link_bytes_per_s, params.block_ns = transfers.link_bytes_per_s, transfers.block_ns
        params.deterministic = transfers.deterministic
        params.next_layer_prefetch, params.reads_prefill = transfers.next_layer_prefetch, reads_prefill
        params.on_miss, params.n_threads = _ON_MISS[transfers.on_miss], transfers.n_threads
        handle = ffi.new("edge_hook **")
        check(lib.edge_hook_attach(llama(model, "llama_model"), params, handle))
        self._handle: Any = handle[0]
        self._ids = ffi.new("int32_t **")
        self._n = ffi.new("int32_t *")
        check(lib.edge_hook_routing(self._handle, self._ids, self._n))
        shape = (experts.n_blocks, max_width, experts.n_expert_used)
        self._routing: npt.NDArray[np.int32] = view(self._ids[0], np.dtype(np.int32), shape)
        self._scores = np.zeros((experts.n_blocks, experts.n_expert), dtype=np.float32)
        if slots:
            scores = ffi.new("float **")
            check(lib.edge_hook_scores(self._handle, scores))
            self._scores = view(scores[0], np.dtype(np.float32), self._scores.shape)
        self._last = ExpertCounters()
        self._views: dict[int, npt.NDArray[np.int32]] = {}  # of the routing, by token count: the same array each time
        self.are_finite: bool | None = None  # whether all scores that the last prefetch() committed were
        self._prefetch, self._from_buffer, self._no_requests = lib.edge_hook_prefetch, ffi.from_buffer, ffi.NULL
        self._prefetch_next_use, self._find_routing = lib.edge_next_use_prefetch, lib.edge_hook_routing
        self._are_finite: Any = ffi.new("bool *")

    def end_step(self) -> None:
        """End a step, after each synchronised decode. Raises EdgeError for what went wrong inside the graph."""
        check(self._end_step())

    def abandon_step(self) -> None:
        """End a step whose end a Ctrl-C skipped, if there is one, and drop its error."""
        if self.decoding:
            self._end_step()

    def _end_step(self) -> int:
        status: int = load()[1].edge_hook_end_step(self._handle)
        self.decoding = False
        return status

    def cancel(self) -> None:
        """End the running decode, or the next one, at its next block. Callable from any thread."""
        if self._handle is not None:
            check(load()[1].edge_hook_cancel(self._handle))

    def routing(self) -> npt.NDArray[np.int32]:
        """Return the expert ids of the last graph, [n_blocks, n_tokens, n_expert_used]; n_tokens is 0 after a graph
        wider than max_width. A view of native memory: the next decode overwrites it."""
        status = self._find_routing(self._handle, self._ids, self._n)
        if status:
            check(status)
        n_tokens = self._n[0]
        view = self._views.get(n_tokens)
        if view is None:
            view = self._views[n_tokens] = self._routing[:, :n_tokens, :]
        return view

    def prefill_routing(self) -> npt.NDArray[np.int32]:
        """Return the expert ids of the last tokens of the last prefill graph, [n_blocks, n_tokens, n_expert_used]; -1
        where a block had no such row. No tokens without reads_prefill. The next call overwrites them."""
        check(load()[1].edge_hook_prefill_routing(self._handle, self._ids, self._n))
        n = self._n[0]
        shape = (self.experts.n_blocks, PREFILL_TOKENS if n else 0, self.experts.n_expert_used)
        if n == 0:
            return np.empty(shape, np.int32)
        return view(self._ids[0], np.dtype(np.int32), shape)[:, PREFILL_TOKENS - n :]

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Expected uses of each expert in the long run, [n_blocks, n_expert]. Native memory: write it between steps;
        the next prefetch() commits it."""
        return self._scores

    def prefetch(self, requests: npt.NDArray[Any], byte_budget: int = NO_BUDGET, margin: float = 0.0) -> int:
        """Replace all prefetch requests by these, [n] of PREFETCH_REQUEST, most urgent first. Prefetches evict only
        experts that score more than margin below them. Return how many requested experts are in no slot."""
        pointer, n = self._no_requests, len(requests)
        if n:
            if requests.dtype is not PREFETCH_REQUEST:
                requests = np.ascontiguousarray(requests, dtype=PREFETCH_REQUEST)
            try:
                pointer = self._from_buffer("edge_prefetch_request[]", requests)
            except ValueError:  # not contiguous
                pointer = self._from_buffer("edge_prefetch_request[]", requests.copy())
        status = self._prefetch(self._handle, pointer, n, byte_budget, margin, self._n, self._are_finite)
        if status:
            check(status)
        self.are_finite = self._are_finite[0]
        return int(self._n[0])

    def prefetch_next_use(
        self, next_use: Any, routing: Any, width: int, now: Any, then: Any, min_share: float, margin: float
    ) -> None:
        """Plan and prefetch by a policy_kernels.NextUseKernel, whose pointers these are: edge_next_use_prefetch."""
        are_finite = self._are_finite
        status = self._prefetch_next_use(
            next_use, self._handle, routing, width, now, then, min_share, margin, self._n, are_finite
        )
        if status:
            check(status)
        self.are_finite = are_finite[0]

    def load_draft_experts(self, path: str, tensors: npt.NDArray[Any]) -> None:
        """Copy draft experts from a file to the compute device; tensors: [n] of DRAFT_TENSOR. Raises EdgeError."""
        ffi, lib = load()
        tensors = np.ascontiguousarray(tensors, dtype=DRAFT_TENSOR)
        pointer = ffi.from_buffer("edge_draft_tensor[]", tensors)
        check(lib.edge_hook_load_draft_experts(self._handle, os.fsencode(path), pointer, len(tensors)))

    def use_experts(self, which: str) -> bool:
        """Select the experts of the next graphs: the model's "own", the "draft" experts or those now "resident".
        Return False, with the own ones selected, if a block has too few of the others."""
        ffi, lib = load()
        ready = ffi.new("bool *")
        check(lib.edge_hook_use_experts(self._handle, _EXPERTS[which], ready))
        return bool(ready[0])

    def use_budget(self, n_experts: int) -> None:
        """Lossy: limit verify steps to n_experts distinct experts per block; 0: no limit."""
        check(load()[1].edge_hook_use_budget(self._handle, n_experts))

    def admit_from_prefill(self, on: bool) -> None:
        """If true, prefill admits its most-used experts into slots and evicts the least used."""
        check(load()[1].edge_hook_admit_from_prefill(self._handle, on))

    def resize(self, slots: Sequence[int]) -> None:
        """Replace the slot counts of all groups, between steps. Raises EdgeError for slots under the floor of one
        token, which changes nothing, and for slots that cannot be allocated: then the CPU computes all experts."""
        ffi, lib = load()
        self.abandon_step()  # its copies may be in flight to slots that are about to be freed
        status = lib.edge_hook_resize(self._handle, ffi.new("int32_t[]", list(slots)), len(slots))
        if status not in (lib.EDGE_ERR_ARGUMENT, lib.EDGE_ERR_BUDGET):
            self.n_slots = sum(slots) if status == lib.EDGE_OK else 0
        check(status)

    def drain(self) -> None:
        """Wait until no prefetch request is outstanding."""
        check(load()[1].edge_hook_drain(self._handle))

    def counters(self) -> ExpertCounters:
        """Return the totals since the hook was attached; the last ones after detach()."""
        ffi, lib = load()
        if self._handle is None or not self._has_slots:
            return self._last
        c = ffi.new("edge_counters *")
        check(lib.edge_hook_counters(self._handle, c))
        return ExpertCounters(
            total=self.experts.total,
            slots=self.n_slots,
            hits=c.hits,
            misses=c.misses,
            late=c.late,
            cpu_computed=c.cpu_computed,
            fetched=c.fetched,
            prefetched=c.prefetched,
            prefetched_used=c.prefetched_used,
            bytes_fetched=c.bytes_fetched,
            bytes_wasted=c.bytes_wasted,
            stall_ms=c.stall_ns / 1e6,
            cpu_ms=c.cpu_ns / 1e6,
            failed=c.failed,
        )

    def costs(self) -> HybridCosts:
        """Return the costs that hybrid execution has measured."""
        ffi, lib = load()
        c = ffi.new("edge_costs *")
        check(lib.edge_hook_costs(self._handle, c))
        rates = c.cpu_bytes_per_s, c.link_bytes_per_s, c.contention, c.device_bytes_per_s
        return HybridCosts(*rates, c.next_layer_precision, bool(c.fetches_some))

    def record(self, n: int) -> None:
        """Record the next n spans of the decoding thread, between steps; 0 stops recording."""
        check(load()[1].edge_hook_record(self._handle, n))

    def spans(self) -> npt.NDArray[Any]:
        """Return the recorded spans, [n] of SPAN, in the order of their ends, in nanoseconds of time.monotonic_ns()."""
        ffi, lib = load()
        spans = ffi.new("edge_span **")
        check(lib.edge_hook_spans(self._handle, spans, self._n))
        return view(spans[0], np.dtype(SPAN), (self._n[0],)).copy() if self._n[0] else np.empty(0, dtype=SPAN)

    def states(self) -> npt.NDArray[np.uint8]:
        """Return each expert's state, [n_blocks, n_expert]: 0 absent, 1 loading, 2 resident, 3 pinned."""
        ffi, lib = load()
        out = np.zeros((self.experts.n_blocks, self.experts.n_expert), dtype=np.uint8)
        check(lib.edge_hook_states(self._handle, ffi.from_buffer("uint8_t[]", out)))
        return out

    def bytes_held(self) -> int:
        """Return the bytes that the hook holds on the compute device."""
        return self._bytes(load()[1].edge_hook_bytes)

    def slot_bytes(self) -> int:
        """Return the bytes of the slots alone."""
        return self._bytes(load()[1].edge_hook_slot_bytes)

    def _bytes(self, function: Any) -> int:
        n = load()[0].new("uint64_t *")
        check(function(self._handle, n))
        return int(n[0])

    def poison_free_slots(self) -> None:
        """Fill all free slots with NaN patterns. For tests."""
        check(load()[1].edge_hook_poison_free_slots(self._handle))

    def detach(self) -> None:
        """Detach the hook and free its slots. Call after the model's context is freed."""
        if self._handle is not None:
            self.abandon_step()
            self._last = self.counters()
            self._views.clear()
            self._routing, self._scores = self._routing.copy(), self._scores.copy()  # native memory goes away
            load()[1].edge_hook_detach(self._handle)
            self._handle = None
