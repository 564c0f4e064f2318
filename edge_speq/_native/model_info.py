"""Experts and memory of a loaded model and its context."""

from __future__ import annotations

from edge_speq._native.library import check, llama, load
from edge_speq.core import ExpertGroup, Experts, MemoryUse


def model_experts(model: int) -> Experts:
    """Return the routed experts of a model."""
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
    """Return the first token whose text differs between two models, None if their vocabularies agree."""
    ffi, lib = load()
    token = ffi.new("int32_t *")
    check(lib.edge_vocab_compare(llama(a, "llama_model"), llama(b, "llama_model"), token))
    return None if token[0] < 0 else int(token[0])


def memory_used(ctx: int, on_gpu: bool) -> MemoryUse:
    """Return the bytes that a context and its model hold on GPUs, or in host memory."""
    ffi, lib = load()
    m = ffi.new("edge_memory *")
    check(lib.edge_memory_used(llama(ctx, "llama_context"), on_gpu, m))
    return MemoryUse(m.model_bytes, m.context_bytes, m.compute_bytes)
