"""The C ABI of native/include/edge_speq.h as typed Python: the only package that touches cffi.

Pointers to llama.cpp objects cross it as the integers that llama_cpp's ctypes bindings hold.
"""

from edge_speq._native.devices import (
    Device,
    compute_device,
    cpu_buffer_type,
    devices,
    host_buffer_type,
    load_backends,
)
from edge_speq._native.hook import (
    DRAFT_TENSOR,
    NO_BUDGET,
    PREFETCH_REQUEST,
    PREFILL_TOKENS,
    SPAN,
    SPANS,
    Hook,
    Transfers,
    fail,
    slot_floor,
)
from edge_speq._native.library import llama_cpp_commit
from edge_speq._native.model_info import memory_used, model_experts, vocab_difference

__all__ = [
    "DRAFT_TENSOR",
    "NO_BUDGET",
    "PREFETCH_REQUEST",
    "PREFILL_TOKENS",
    "SPAN",
    "SPANS",
    "Device",
    "Hook",
    "Transfers",
    "compute_device",
    "cpu_buffer_type",
    "devices",
    "fail",
    "host_buffer_type",
    "llama_cpp_commit",
    "load_backends",
    "memory_used",
    "model_experts",
    "slot_floor",
    "vocab_difference",
]
