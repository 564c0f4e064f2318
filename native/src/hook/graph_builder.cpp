// The part of edge_hook that runs while llama.cpp builds a graph.
#include "hook/hook.h"

#include "llama-moe-hook.h"

// Replace the scores that a router chooses by, in graphs that the hook serves.
ggml_tensor * edge_hook::select(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * probs, const ggml_tensor * down) {
    const int32_t number = table_.find(down);
    const int64_t width = probs->ne[1];
    selected_ = number;
    if (number < 0 || width > widest() || probs->ne[0] != table_.n_expert || (number > 0 && !graph_fits_)) {
        return probs;
    }
    if (experts_ == EDGE_EXPERTS_RESIDENT) {
        return draft_experts_.restrict_router(ctx, gf, probs, number);
    }
    return experts_ == EDGE_EXPERTS_OWN && width > 1 && budget_ > 0 ? edge::within_budget(ctx, probs, budget_) : probs;
}

void edge_hook::build(ggml_context * ctx, ggml_cgraph * gf, llama_moe_block & block) {
    const int32_t number = table_.find(block.down);
    const int64_t width = block.ids->ne[1];
    if (number < 0) {
        return; // not a block of the table
    }
    // Prefill and warm-up graphs, which use every expert, keep the stock graph. So does their last block, which may be
    // narrow because it has only the rows whose logits are wanted.
    const bool fits = width <= widest() && block.ids->ne[0] == table_.n_expert_used;
    if (number == 0) {
        cancel_split();
        graph_ = gf;
        chains_.assign(table_.blocks.size(), {});
        graph_fits_ = fits;
        width_ = fits ? static_cast<int32_t>(width) : 0;
    } else if (width != width_) {
        width_ = 0;
    }
    if (!graph_fits_ || !fits) {
        keep_prefill_routing(ctx, gf, block.ids, number);
        return;
    }
    ggml_tensor * view =
        ggml_view_2d(ctx, leaf_, table_.n_expert_used, width, leaf_->nb[1], static_cast<size_t>(number) * leaf_->nb[2]);
    ggml_tensor * route = ggml_cpy(ctx, block.ids, view);
    ggml_format_name(route, "%s%d", edge::route_prefix, number);
    ggml_build_forward_expand(gf, route);
    if (!slot_cache_) {
        return;
    }
    if (experts_ == EDGE_EXPERTS_DRAFT) {
        block.up = draft_experts_.tensor(number, edge::role_up);
        block.gate = draft_experts_.tensor(number, edge::role_gate);
        block.down = draft_experts_.tensor(number, edge::role_down);
        block.gate_up = draft_experts_.tensor(number, edge::role_gate_up);
        return; // with the router's own ids
    }
    const int32_t group = table_.blocks[static_cast<size_t>(number)].group;
    const edge::SlotStore & store = slot_cache_->store();
    if (experts_ == EDGE_EXPERTS_RESIDENT && selected_ != number) { // not chosen by a router's scores
        draft_experts_.keep_unrestricted(ctx, gf, route, number);
        return; // served from host memory
    }
    block.up = store.tensor(group, edge::role_up);
    block.gate = store.tensor(group, edge::role_gate);
    block.down = store.tensor(group, edge::role_down);
    block.gate_up = store.tensor(group, edge::role_gate_up);
    block.ids = looks_up_slots() ? draft_experts_.slots_of(ctx, route, number) : route;
}
