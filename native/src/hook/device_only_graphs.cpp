// The part of edge_hook whose graphs never ask the host: those of self-drafting, and all graphs once every expert is
// resident.
#include "hook/hook.h"

#include "util/error.h"

#include "ggml-backend.h"

#include <algorithm>
#include <string>
#include <utility>

void edge_hook::use_budget(int32_t n_experts) {
    if (n_experts != 0 && (n_experts < table_.n_expert_used || n_experts > table_.n_expert)) {
        throw edge::Error(EDGE_ERR_ARGUMENT, "a verify step cannot be limited to " + std::to_string(n_experts) +
                                                 " experts: give " + std::to_string(table_.n_expert_used) + " to " +
                                                 std::to_string(table_.n_expert) + ", or 0 for no limit");
    }
    if (std::exchange(budget_, n_experts) != n_experts) {
        set_on_model();
    }
}

// Own and draft graphs alternate; a new epoch keeps llama.cpp from reusing one for the other.
bool edge_hook::use_experts(int32_t which) {
    if (which == EDGE_EXPERTS_DRAFT && !draft_experts_.is_loaded()) {
        throw edge::Error(EDGE_ERR_ARGUMENT, "no draft experts are loaded");
    }
    bool ready = which == EDGE_EXPERTS_OWN || (slot_cache_ && slot_cache_->has_slots());
    if (ready && which == EDGE_EXPERTS_RESIDENT && !draft_experts_.restrict_to_residents(*slot_cache_)) {
        slot_cache_->end_step(); // release the pins taken so far
        ready = false;
    }
    which = ready ? which : EDGE_EXPERTS_OWN;
    if (std::exchange(experts_, which) != which) {
        set_on_model();
    }
    if (experts_ != EDGE_EXPERTS_OWN) {
        clear_routing();
    }
    return ready;
}

void edge_hook::load_draft_experts(const char * path, const edge_draft_tensor * tensors, int32_t n) {
    if (experts_ == EDGE_EXPERTS_DRAFT) {
        throw edge::Error(EDGE_ERR_ARGUMENT, "the draft experts are in use: select the model's own experts first");
    }
    draft_experts_.load(path, tensors, n);
    set_on_model(); // no graph built with an earlier file is reused
}

// Once every expert is resident, and so stays resident, graphs look up slots by themselves: no block waits for the
// host.
void edge_hook::switch_to_device_only() {
    if (slot_cache_->all_resident()) {
        draft_experts_.write_slot_table(*slot_cache_);
        slot_cache_->end_step(); // release the pins of the slot table
        device_only_ = true;
        clear_routing();
        set_on_model();
    }
}

void edge_hook::end_device_only_step() {
    n_tokens_ = 0;
    if (width_ > 0) {
        ggml_backend_tensor_get(leaf_, host_routing_, 0, ggml_nbytes(leaf_));
        n_tokens_ = all_known(width_) ? width_ : 0;
        clear_routing();
    }
    for (int32_t block = 0; n_tokens_ > 0 && block < static_cast<int32_t>(table_.blocks.size()); ++block) {
        slot_cache_->used(block, routing_of(block), n_tokens_ * table_.n_expert_used);
    }
    slot_cache_->end_step();
}

// A device-only graph may end early, or not be served from slots: then some ids are still those of clear_routing().
bool edge_hook::all_known(int32_t n_tokens) const {
    const auto n = static_cast<size_t>(n_tokens) * static_cast<size_t>(table_.n_expert_used);
    for (size_t block = 0; block < table_.blocks.size(); ++block) {
        const int32_t * ids = host_routing_ + block * block_ids_;
        if (std::any_of(ids, ids + n, [](int32_t id) { return id < 0; })) {
            return false;
        }
    }
    return true;
}

void edge_hook::clear_routing() {
    if (experts_ == EDGE_EXPERTS_RESIDENT) {
        draft_experts_.clear_unrestricted();
    } else {
        draft_experts_.forget(leaf_);
    }
}

// No block of a draft step called the host: its routing is in the leaf or, with restricted routers, beside it.
void edge_hook::end_draft_step() {
    slot_cache_->end_step();
    if (experts_ == EDGE_EXPERTS_RESIDENT) {
        draft_experts_.read_unrestricted(host_routing_);
    } else {
        ggml_backend_tensor_get(leaf_, host_routing_, 0, ggml_nbytes(leaf_));
    }
    n_tokens_ = all_known(width_) ? width_ : 0;
}
