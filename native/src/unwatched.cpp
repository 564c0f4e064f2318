// The half of edge_hook whose graphs ask nothing of the host: drafting ones, and all once everything is in slots.
#include "hook.h"

#include "error.h"
#include "ggml-backend.h"

#include <algorithm>
#include <string>
#include <utility>

// What a router chooses by, in graphs that are ours.
ggml_tensor * edge_hook::select(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * probs, const ggml_tensor * down) {
    const int32_t number = table_.find(down);
    const int64_t width  = probs->ne[1];
    selected_ = number;
    if (number < 0 || width > widest() || probs->ne[0] != table_.n_expert || (number > 0 && !graph_fits_)) {
        return probs;
    }
    if (experts_ == EDGE_EXPERTS_RESIDENT) {
        return own_draft_.restricted(ctx, gf, probs, number);
    }
    return experts_ == EDGE_EXPERTS_OWN && width > 1 && budget_ > 0 ? edge::within_budget(ctx, probs, budget_) : probs;
}

void edge_hook::use_budget(int32_t n_experts) {
    if (n_experts != 0 && (n_experts < table_.n_expert_used || n_experts > table_.n_expert)) {
        throw edge::Error(EDGE_ERR_ARGUMENT, "a verify step cannot do with " + std::to_string(n_experts) + " experts: " +
                                                 std::to_string(table_.n_expert_used) + " to " + std::to_string(table_.n_expert) + " can");
    }
    if (std::exchange(budget_, n_experts) != n_experts) {
        set_on_model();
    }
}

// The two graphs of a drafting model alternate: neither may be taken for the other.
bool edge_hook::use_experts(int32_t which) {
    if (which == EDGE_EXPERTS_TWIN && !own_draft_.has_twin()) {
        throw edge::Error(EDGE_ERR_ARGUMENT, "no twin is loaded");
    }
    bool ready = which == EDGE_EXPERTS_OWN || (residency_ && residency_->serving());
    if (ready && which == EDGE_EXPERTS_RESIDENT && !own_draft_.restrict_to(*residency_)) {
        residency_->end_step(); // what it had begun to hold
        ready = false;
    }
    which = ready ? which : EDGE_EXPERTS_OWN;
    if (std::exchange(experts_, which) != which) {
        set_on_model();
    }
    if (experts_ != EDGE_EXPERTS_OWN) {
        forget_routing();
    }
    return ready;
}

void edge_hook::load_twin(const char * path, const edge_twin_tensor * tensors, int32_t n) {
    if (experts_ == EDGE_EXPERTS_TWIN) {
        throw edge::Error(EDGE_ERR_ARGUMENT, "a twin is in use: go back to the model's own experts first");
    }
    own_draft_.load_twin(path, tensors, n);
    set_on_model(); // no graph goes on with an earlier one
}

// Where everything is in slots, and so will never leave them, graphs look up the slots themselves from now on: no block waits
// for the host.
void edge_hook::settle() {
    if (residency_->complete()) {
        own_draft_.tabulate(*residency_);
        residency_->end_step(); // for what was lent
        settled_ = true;
        forget_routing();
        set_on_model();
    }
}

void edge_hook::end_settled_step() {
    n_tokens_ = 0;
    if (width_ > 0) {
        ggml_backend_tensor_get(leaf_, host_routing_, 0, ggml_nbytes(leaf_));
        n_tokens_ = all_known(width_) ? width_ : 0;
        forget_routing();
    }
    for (int32_t block = 0; n_tokens_ > 0 && block < static_cast<int32_t>(table_.blocks.size()); ++block) {
        residency_->used(block, routing_of(block), n_tokens_ * table_.n_expert_used);
    }
    residency_->end_step();
}

// A graph that nobody watches may end early, or be one that slots do not serve: then some of its ids are still those of
// forget_routing().
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

void edge_hook::forget_routing() {
    if (experts_ == EDGE_EXPERTS_RESIDENT) {
        own_draft_.forget_wanted();
    } else {
        own_draft_.forget(leaf_);
    }
}

// No block of a draft step came by here: its routing is still in the leaf, or, where routers were restricted, beside it.
void edge_hook::end_draft_step() {
    residency_->end_step();
    if (experts_ == EDGE_EXPERTS_RESIDENT) {
        own_draft_.read_wanted(host_routing_);
    } else {
        ggml_backend_tensor_get(leaf_, host_routing_, 0, ggml_nbytes(leaf_));
    }
    n_tokens_ = all_known(width_) ? width_ : 0;
}
