// The part of edge_hook that has the CPU compute a block's missing experts.
#include "hook/hook.h"

#include "util/error.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace {

constexpr float of_late = 0.05F;
// Fraction of the blocks with work for the CPU from which its threads are woken early.
constexpr float worth_waking = 0.25F;

} // namespace

// A split graph waits for one more callback per block, some 10 us. If fetches are so cheap that this does not pay, it
// is retried now and then, soon at first: the misses change, and costs may have been measured while threads were waking
// up. Bytes that a thread has to stage are never that cheap.
bool edge_hook::splits_this_step() {
    constexpr uint64_t tried_at_first = 16, tried_again = 256; // steps
    constexpr double callback_ns = 10e3;
    const uint64_t step = n_steps_++;
    if (on_miss_ != EDGE_ON_MISS_AUTO) {
        return on_miss_ == EDGE_ON_MISS_HYBRID;
    }
    if (!slot_cache_->fetches_some() || step < tried_at_first || slot_cache_->balancer().gain_ns() > callback_ns) {
        return true;
    }
    const bool is_due = step % tried_again == 0 || (step < tried_again && (step & (step - 1)) == 0);
    if (is_due) {
        slot_cache_->learn_cpu_again();
    }
    return is_due;
}

// Return true if the rows that enter this block can predict the next one's experts.
bool edge_hook::can_predict_next(const ggml_tensor * route, int32_t number) {
    return on_miss_ != EDGE_ON_MISS_FETCH && slot_cache_->can_prefetch_next_layer(number + 1) &&
           find_chain(route, number);
}

void edge_hook::read_rows_for(int32_t next, ggml_backend_t backend, const ggml_tensor * rows) {
    ggml_backend_tensor_get_async(backend, rows, host_input_, 0, ggml_nbytes(rows));
    next_layer_block_ = slot_cache_->can_prefetch_next_layer(next) ? next : -1;
    next_layer_tokens_ = static_cast<int32_t>(rows->ne[2]);
}

// Once per block, at the first moment at which this thread would wait: for copies, the CPU's part or the device.
void edge_hook::prefetch_next_layer() {
    const int32_t block = std::exchange(next_layer_block_, -1);
    if (block >= 0) {
        const edge::Timeline::Span span(timeline_, EDGE_SPAN_NEXT_LAYER, block);
        slot_cache_->prefetch_next_layer(block, host_input_, next_layer_tokens_);
    }
}

bool edge_hook::find_chain(const ggml_tensor * route, int32_t number) {
    edge::ExpertChain & chain = chains_[static_cast<size_t>(number)];
    try {
        if (!chain.output) {
            chain = cpu_experts_->find(graph_, route, table_.blocks[static_cast<size_t>(number)], slot_cache_->store());
        }
        return true;
    } catch (const edge::Error &) {
        if (on_miss_ == EDGE_ON_MISS_HYBRID) {
            throw;
        }
        on_miss_ = EDGE_ON_MISS_FETCH;
        splits_ = false;
        next_layer_block_ = -1;
        slot_cache_->use_router_predictor(nullptr); // the worker serves all requests from now on
        return false;
    }
}

// The device computes the resident and the fetched experts. In place of every other expert it computes a placeholder
// slot, whose output the CPU's result replaces before it is weighted.
void edge_hook::serve_hybrid(ggml_backend_t backend, ggml_tensor * route, int32_t number) {
    const edge::ExpertChain & chain = chains_[static_cast<size_t>(number)];
    const auto n = static_cast<int32_t>(ggml_nelements(route));
    int32_t * ids = routing_of(number);
    int32_t * slots = slots_of(number);
    prefetch_next_layer(); // not done yet if nothing was computed on the CPU
    ggml_backend_tensor_get_async(backend, route, ids, 0, ggml_nbytes(route));
    read_rows_for(number + 1, backend, chain.input);
    if (computing_ > worth_waking) {
        cpu_experts_->wake(); // so that its threads are up when the device gets here
    }
    await_device(backend, number);
    {
        const edge::Timeline::Span span(timeline_, EDGE_SPAN_DECIDE, number);
        slot_cache_->demand_hybrid(number, ids, n, slots);
    }
    assign_placeholder_slots(ids, slots, n);
    computing_ += of_late * (static_cast<float>(!missing_.empty()) - computing_);
    if (!missing_.empty()) {
        cpu_experts_->wake();
    }
    // Even if nothing is missing: a graph that is cut elsewhere at every step is launched node by node.
    split_block_ = number;
    computed_ = false;
    // The link is emulated: the host holds the device.
    if (slot_cache_->fetching() && !slot_cache_->hold_for_fetches(backend)) {
        compute_missing();
        prefetch_next_layer();
        await_copies(number);
    }
    ggml_backend_tensor_set_async(backend, route, slots, 0, ggml_nbytes(route));
}

// Use slots that the token does not use otherwise: kernels need the ids of one token to differ.
void edge_hook::assign_placeholder_slots(const int32_t * ids, int32_t * slots, int32_t n) {
    const int32_t used = table_.n_expert_used;
    missing_.clear();
    for (int32_t i = 0; i < n; ++i) {
        if (slots[i] != edge::SlotPool::none) {
            continue;
        }
        int32_t * row = slots + i / used * used;
        int32_t free = 0;
        while (std::find(row, row + used, free) != row + used) {
            ++free;
        }
        slots[i] = free;
        missing_.push_back({ i / used, i % used, ids[i] });
    }
}

void edge_hook::compute_missing() {
    if (std::exchange(computed_, true) || missing_.empty()) {
        return;
    }
    if (slot_cache_->link_idles_first()) { // the link would be idle
        prefetch_next_layer();
    }
    const edge::ExpertBlock & block = table_.blocks[static_cast<size_t>(split_block_)];
    const edge::Timeline::Span span(timeline_, EDGE_SPAN_CPU, split_block_);
    const auto began = std::chrono::steady_clock::now();
    cpu_experts_->compute(chains_[static_cast<size_t>(split_block_)], block, slot_cache_->store(), host_input_,
                          missing_, host_computed_);
    const auto ns =
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - began).count();
    size_t n_experts = 0;
    for (size_t i = 0; i < missing_.size(); ++i) {
        const auto same = [&](const edge::Pair & pair) { return pair.expert == missing_[i].expert; };
        n_experts += std::any_of(missing_.begin(), missing_.begin() + static_cast<std::ptrdiff_t>(i), same) ? 0 : 1;
    }
    slot_cache_->computed(split_block_, n_experts, missing_.size(), static_cast<double>(ns));
}

// The device runs the block's experts meanwhile. Adjacent rows are sent as one copy.
void edge_hook::send_computed(ggml_backend_t backend) {
    compute_missing();
    await_copies(split_block_);
    ggml_tensor * output = chains_[static_cast<size_t>(std::exchange(split_block_, -1))].output;
    const size_t row = output->nb[1];
    for (size_t i = 0, n = 0; i < missing_.size(); i += n) {
        const auto at = [&](size_t j) { return missing_[j].token * table_.n_expert_used + missing_[j].place; };
        n = 1;
        while (i + n < missing_.size() && at(i + n) == at(i) + static_cast<int32_t>(n)) {
            ++n;
        }
        ggml_backend_tensor_set_async(backend, output, reinterpret_cast<char *>(host_computed_) + i * row,
                                      static_cast<size_t>(at(i)) * row, n * row);
    }
}

// A graph may end between a block's experts and their sum: drop the CPU's results for it.
void edge_hook::cancel_split() {
    next_layer_block_ = -1;
    split_block_ = -1;
    computed_ = false;
    missing_.clear();
}
