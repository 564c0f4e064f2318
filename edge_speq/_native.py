"""The C ABI of native/include/edge_speq.h as typed Python.

Pointers to llama.cpp objects cross as the integers that llama_cpp's ctypes bindings hold.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_speq._library import check, llama, load, package, text, view
from edge_speq.core import ExpertCounters, ExpertGroup, Experts, HybridCosts, MemoryUse
from edge_speq.errors import EdgeError
from edge_speq.log import route_llama_cpp_log

log = logging.getLogger("edge_speq")


def llama_cpp_commit() -> str:
    return text(load()[1].edge_llama_cpp_commit())


@functools.cache
def load_backends() -> None:
    """Initialises llama.cpp, once: its log goes to logging, and the ggml backend modules that EDGE_SPEQ_BACKENDS
    names or that lie beside the libraries are added. Raises EdgeError for a named module that does not load."""
    _, lib = load()
    import llama_cpp

    route_llama_cpp_log()
    llama_cpp.llama_backend_init()
    beside = sorted((package() / "lib").glob("*ggml-*.so"))
    named = [Path(p) for p in os.environ.get("EDGE_SPEQ_BACKENDS", "").split(os.pathsep) if p]
    for path in named:
        modules = sorted(path.glob("*ggml-*.so")) if path.is_dir() else [path]
        if not modules or not modules[0].exists():
            raise EdgeError(f"EDGE_SPEQ_BACKENDS names {path}, which holds no ggml backend module")
        for module in modules:
            check(lib.edge_backend_load(str(module).encode()))
    failed = [
        (module.name, text(lib.edge_last_error()))
        for module in beside
        if re.match(r"(lib)?ggml-(base|cpu)\b", module.name) is None and lib.edge_backend_load(str(module).encode())
    ]
    if failed and not compute_device().is_gpu:  # with a GPU it was a backend that is linked in, which is no module
        log.warning("%s does not load, so the CPU computes: %s", *failed[0])


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    description: str
    is_gpu: bool
    is_integrated: bool  # shares the host's memory
    free_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.description})"


def devices() -> list[Device]:
    ffi, lib = load()
    n = ffi.new("int32_t *")
    check(lib.edge_device_count(n))
    found = []
    for i in range(n[0]):
        d = ffi.new("edge_device *")
        check(lib.edge_device_get(i, d))
        kind = bool(d.is_gpu), bool(d.is_integrated)
        found.append(Device(text(d.name), text(d.description), *kind, d.free_bytes, d.total_bytes))
    return found


def compute_device() -> Device:
    """Where slots and dense weights go: the first GPU, else the CPU."""
    found = devices()
    return next((d for d in found if d.is_gpu), next(d for d in found if d.name.startswith("CPU")))


def cpu_buffer_type() -> int:
    ffi, lib = load()
    return int(ffi.cast("uintptr_t", lib.edge_cpu_buffer_type()))


def host_buffer_type() -> int:
    """Page-locked memory of the first GPU, plain memory without one."""
    ffi, lib = load()
    return int(ffi.cast("uintptr_t", lib.edge_host_buffer_type()))


def model_experts(model: int) -> Experts:
    ffi, lib = load()
    e = ffi.new("edge_experts *")
    check(lib.edge_model_experts(llama(model, "llama_model"), e))
    group_of = ffi.new("int32_t[]", max(1, e.n_blocks))
    check(lib.edge_model_block_groups(llama(model, "llama_model"), group_of))
    groups = []
    for index in range(e.n_groups):
        g = ffi.new("edge_group *")
        check(lib.edge_model_group(llama(model, "llama_model"), index, g))
        blocks = tuple(block for block in range(e.n_blocks) if group_of[block] == index)
        groups.append(ExpertGroup(g.n_blocks, g.n_experts, g.expert_bytes, blocks))
    return Experts(e.n_blocks, e.n_expert, e.n_expert_used, tuple(groups))


def vocab_difference(a: int, b: int) -> int | None:
    """The first token that means something else in the other vocabulary, None when they agree."""
    ffi, lib = load()
    token = ffi.new("int32_t *")
    check(lib.edge_vocab_compare(llama(a, "llama_model"), llama(b, "llama_model"), token))
    return None if token[0] < 0 else int(token[0])


def memory_used(ctx: int, on_gpu: bool) -> MemoryUse:
    ffi, lib = load()
    m = ffi.new("edge_memory *")
    check(lib.edge_memory_used(llama(ctx, "llama_context"), on_gpu, m))
    return MemoryUse(m.model_bytes, m.context_bytes, m.compute_bytes)


def fail(fault: str, nth: int) -> None:
    """Makes the nth "allocation", "copy" or "routing" read from now on fail, once; 0 disarms. For tests."""
    _, lib = load()
    check(lib.edge_test_fail(getattr(lib, f"EDGE_FAULT_{fault.upper()}"), nth))


def slot_floor(experts: Experts, max_width: int) -> int:
    """Slots a group needs for graphs of max_width tokens: all their experts at once and one to load into."""
    ffi, lib = load()
    floor = ffi.new("int32_t *")
    check(lib.edge_slot_floor(experts.n_expert, experts.n_expert_used, max_width, floor))
    return int(floor[0])


ORDER: npt.DTypeLike = np.dtype(  # edge_order: fields and units are the header's
    [("block", np.int32), ("expert", np.int32), ("deadline", np.int32), ("priority", np.float32)]
)
NO_BUDGET = 2**64 - 1
PROMPT_TOKENS = 64  # EDGE_PROMPT_TOKENS


@dataclass(frozen=True, slots=True)
class Transfers:
    """How experts reach their slots: over the link as it is, over one slowed down to link_bytes_per_s, or, in
    deterministic mode, in virtual time over such a link, while blocks take block_ns to compute."""

    link_bytes_per_s: int = 0
    deterministic: bool = False
    block_ns: int = 0
    compute: str = "fetch"  # or "hybrid", or "auto", whichever has been faster of late; the CPU's part by n_threads
    n_threads: int = 0
    layer_ahead: bool = False  # prefetch what a block's input says of the next; with hybrid execution only


TWIN_TENSOR: npt.DTypeLike = np.dtype(  # edge_twin_tensor
    [("block", np.int32), ("role", np.int32), ("type", np.int32), ("offset", np.uint64)], align=True
)
SPAN: npt.DTypeLike = np.dtype(  # edge_span
    [("kind", np.int32), ("block", np.int32), ("begin_ns", np.uint64), ("end_ns", np.uint64)], align=True
)
SPANS = ("device", "decide", "cpu", "copies", "ahead")  # EDGE_SPAN_...: what kinds are, by number
_USES = {"own": 0, "twin": 1, "resident": 2}  # EDGE_EXPERTS_...
_COMPUTES = {"fetch": 0, "hybrid": 1, "auto": 2}  # EDGE_COMPUTE_...


class Hook:
    """The native hook on one loaded model. Attach before its context exists, detach after it is freed.

    With `slots` (a count for each expert group) the experts are served from slots; without, only the
    routing is kept. Raises EdgeError for a dense model, for slots under the floor, and for expert weights
    that do not lie in plain host memory.
    """

    def __init__(
        self,
        model: int,
        experts: Experts,
        max_width: int,
        slots: Sequence[int] = (),
        transfers: Transfers = Transfers(),  # frozen
        *,
        reads_prompts: bool = False,
    ) -> None:
        ffi, lib = load()
        self.experts = experts
        self.max_width = max_width
        self.n_slots = sum(slots)
        self.decoding = False  # a decode has begun, and end_step() not been called for it
        self._has_slots = bool(slots)
        counts = ffi.new("int32_t[]", list(slots) or [0])
        params = ffi.new("edge_hook_params *", {"max_width": max_width, "n_groups": len(slots), "slots": counts})
        params.link_bytes_per_s, params.block_ns = transfers.link_bytes_per_s, transfers.block_ns
        params.deterministic = transfers.deterministic
        params.layer_ahead, params.reads_prompts = transfers.layer_ahead, reads_prompts
        params.compute, params.n_threads = _COMPUTES[transfers.compute], transfers.n_threads
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
        self._views: dict[int, npt.NDArray[np.int32]] = {}  # of the routing, by tokens: the same array each time
        self.are_sound: bool | None = None  # whether all scores that the last prefetch() took over are numbers
        self._prefetch, self._from_buffer, self._no_orders = lib.edge_hook_prefetch, ffi.from_buffer, ffi.NULL
        self._prefetch_waits, self._find_routing = lib.edge_waits_prefetch, lib.edge_hook_routing
        self._are_sound: Any = ffi.new("bool *")

    def end_step(self) -> None:
        """Call after each synchronised decode. Raises EdgeError for what went wrong inside the graph."""
        check(self._end_step())

    def forsake_step(self) -> None:
        """Ends a step whose end a Ctrl-C skipped, if there is one; what went wrong inside it concerns nobody now."""
        if self.decoding:
            self._end_step()

    def _end_step(self) -> int:
        status: int = load()[1].edge_hook_end_step(self._handle)
        self.decoding = False
        return status

    def cancel(self) -> None:
        """From any thread: ends the decode that runs, or the next one, at its next block."""
        if self._handle is not None:
            check(load()[1].edge_hook_cancel(self._handle))

    def routing(self) -> npt.NDArray[np.int32]:
        """Expert ids of the last graph, [n_blocks, n_tokens, n_expert_used]; n_tokens is 0 after a graph wider
        than max_width. A view of native memory: the next decode overwrites it."""
        status = self._find_routing(self._handle, self._ids, self._n)
        if status:
            check(status)
        n_tokens = self._n[0]
        view = self._views.get(n_tokens)
        if view is None:
            view = self._views[n_tokens] = self._routing[:, :n_tokens, :]
        return view

    def prompt(self) -> npt.NDArray[np.int32]:
        """With reads_prompts: expert ids of the last tokens of the last graph that was wider than max_width, [n_blocks,
        n_tokens, n_expert_used]; -1 where a block had no such row. Native memory: the next call overwrites it."""
        check(load()[1].edge_hook_prompt(self._handle, self._ids, self._n))
        n = self._n[0]
        shape = (self.experts.n_blocks, PROMPT_TOKENS if n else 0, self.experts.n_expert_used)
        return view(self._ids[0], np.dtype(np.int32), shape)[:, PROMPT_TOKENS - n :] if n else np.empty(shape, np.int32)

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """What each expert is worth in the long run, [n_blocks, n_expert] expected uses: write it between steps, the
        next prefetch() takes it over. Native memory."""
        return self._scores

    def prefetch(self, orders: npt.NDArray[Any], byte_budget: int = NO_BUDGET, margin: float = 0.0) -> int:
        """Orders experts, [n] of ORDER, most urgent first; replaces earlier orders. margin: what the priorities of
        those that are absent are less by. Returns how many were not yet in a slot."""
        pointer, n = self._no_orders, len(orders)
        if n:
            if orders.dtype is not ORDER:
                orders = np.ascontiguousarray(orders, dtype=ORDER)
            try:
                pointer = self._from_buffer("edge_order[]", orders)
            except ValueError:  # not contiguous
                pointer = self._from_buffer("edge_order[]", orders.copy())
        status = self._prefetch(self._handle, pointer, n, byte_budget, margin, self._n, self._are_sound)
        if status:
            check(status)
        self.are_sound = self._are_sound[0]
        return int(self._n[0])

    def prefetch_waits(
        self, waits: Any, ids: Any, width: int, now: Any, then: Any, least: float, margin: float
    ) -> None:
        """Scores and orders of a _reckoning.Waits, which has pointers to all that it takes: edge_waits_prefetch."""
        are_sound = self._are_sound
        status = self._prefetch_waits(waits, self._handle, ids, width, now, then, least, margin, self._n, are_sound)
        if status:
            check(status)
        self.are_sound = are_sound[0]

    def load_twin(self, path: str, tensors: npt.NDArray[Any]) -> None:
        """Copies a twin's experts to the compute device; tensors: [n] of TWIN_TENSOR. Raises EdgeError."""
        ffi, lib = load()
        tensors = np.ascontiguousarray(tensors, dtype=TWIN_TENSOR)
        pointer = ffi.from_buffer("edge_twin_tensor[]", tensors)
        check(lib.edge_hook_load_twin(self._handle, os.fsencode(path), pointer, len(tensors)))

    def use_experts(self, which: str) -> bool:
        """Graphs compute with the model's "own" experts, a "twin"'s, or those that are "resident" now. False: it cannot
        be done now."""
        ffi, lib = load()
        ready = ffi.new("bool *")
        check(lib.edge_hook_use_experts(self._handle, _USES[which], ready))
        return bool(ready[0])

    def use_budget(self, n_experts: int) -> None:
        """Lossy: verify steps run at most so many experts a block; 0: no such bound."""
        check(load()[1].edge_hook_use_budget(self._handle, n_experts))

    def keep_prompts(self, on: bool) -> None:
        """Whether prompts leave in slots what they want most: their graphs copy experts to the device anyway."""
        check(load()[1].edge_hook_keep_prompts(self._handle, on))

    def resize(self, slots: Sequence[int]) -> None:
        """Other slot counts for each group, between steps. Raises EdgeError for slots under the floor of one token,
        which changes nothing, and for slots that cannot be allocated: then the experts are computed on the CPU."""
        ffi, lib = load()
        self.forsake_step()  # its copies may travel to slots that are about to go
        status = lib.edge_hook_resize(self._handle, ffi.new("int32_t[]", list(slots)), len(slots))
        if status not in (lib.EDGE_ERR_ARGUMENT, lib.EDGE_ERR_BUDGET):
            self.n_slots = sum(slots) if status == lib.EDGE_OK else 0
        check(status)

    def drain(self) -> None:
        check(load()[1].edge_hook_drain(self._handle))

    def counters(self) -> ExpertCounters:
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
        ffi, lib = load()
        c = ffi.new("edge_costs *")
        check(lib.edge_hook_costs(self._handle, c))
        rates = c.cpu_bytes_per_s, c.link_bytes_per_s, c.contention, c.device_bytes_per_s
        return HybridCosts(*rates, c.layer_ahead_precision, bool(c.fetches_some))

    def record(self, n: int) -> None:
        """Keeps the next n spans of what the decoding thread does, 0: none any more. Between steps."""
        check(load()[1].edge_hook_record(self._handle, n))

    def spans(self) -> npt.NDArray[Any]:
        """Those kept, [n] of SPAN, as they ended; nanoseconds of time.monotonic_ns()."""
        ffi, lib = load()
        spans = ffi.new("edge_span **")
        check(lib.edge_hook_spans(self._handle, spans, self._n))
        return view(spans[0], np.dtype(SPAN), (self._n[0],)).copy() if self._n[0] else np.empty(0, dtype=SPAN)

    def states(self) -> npt.NDArray[np.uint8]:
        """[n_blocks, n_expert] of 0 absent, 1 loading, 2 resident, 3 pinned."""
        ffi, lib = load()
        out = np.zeros((self.experts.n_blocks, self.experts.n_expert), dtype=np.uint8)
        check(lib.edge_hook_states(self._handle, ffi.from_buffer("uint8_t[]", out)))
        return out

    def bytes_held(self) -> int:
        return self._bytes(load()[1].edge_hook_bytes)

    def slot_bytes(self) -> int:
        """Bytes of the slots alone."""
        return self._bytes(load()[1].edge_hook_slot_bytes)

    def _bytes(self, function: Any) -> int:
        n = load()[0].new("uint64_t *")
        check(function(self._handle, n))
        return int(n[0])

    def poison_free_slots(self) -> None:
        check(load()[1].edge_hook_poison_free_slots(self._handle))

    def detach(self) -> None:
        if self._handle is not None:
            self.forsake_step()
            self._last = self.counters()
            self._views.clear()
            self._routing, self._scores = self._routing.copy(), self._scores.copy()  # native memory goes away
            load()[1].edge_hook_detach(self._handle)
            self._handle = None
