// The part of SlotCache that serves hybrid execution: missing experts are fetched or left to the CPU, by cost.
#include "slots/slot_cache.h"

#include <algorithm>

namespace edge {

// Fill in misses_ and return how many further experts the CPU computes: those already in flight, unless waiting for the
// rest of the copy takes less.
int32_t SlotCache::find_absent(const ExpertBlock & block, const int32_t * ids, int32_t n) {
    SlotPool & slots = pool(block);
    int32_t late = 0;
    const uint64_t bytes = expert_bytes(block.group);
    const double computing = balancer_.cpu_ns(1, 1, bytes);
    demanded_.clear();
    misses_.clear();
    for (int32_t i = 0; i < n; ++i) {
        require_expert(ids[i]);
        if (std::find(demanded_.begin(), demanded_.end(), ids[i]) != demanded_.end()) {
            const auto same = [&](const Miss & miss) { return miss.expert == ids[i]; };
            const auto miss = std::find_if(misses_.begin(), misses_.end(), same);
            if (miss != misses_.end()) {
                ++miss->pairs;
            }
            continue;
        }
        demanded_.push_back(ids[i]);
        const int32_t key = block.first_key + ids[i];
        const int32_t slot = slots.find(key);
        const bool loading = slot != SlotPool::none && slots.loading(slot);
        slot_of_[static_cast<size_t>(ids[i])] = loading ? SlotPool::none : slot;
        if (loading && !clock_ && remaining_ns(block.group, slot) < computing) {
            hit(block, slot);
            slot_of_[static_cast<size_t>(ids[i])] = slot;
            if (!claim_next_layer(block.group, slot)) {
                fetches_.late.emplace_back(slot, key);
            }
        } else if (loading) {
            ++late;
            use_late(block, slot);
        } else if (slot != SlotPool::none) {
            hit(block, slot);
        } else {
            misses_.push_back({ ids[i], 1, slots.score_of(key) });
        }
    }
    return late;
}

// The CPU computes it, but its prefetch was still right.
void SlotCache::use_late(const ExpertBlock & block, int32_t slot) {
    if (pool(block).prefetched_unused(slot)) {
        ++counters_.prefetched_used;
        prefetched_used_bytes_ += expert_bytes(block.group);
    }
    pool(block).use(slot);
}

// Assign slots to the experts to fetch: loading_ becomes the first of misses_.
void SlotCache::take_for_fetches(const ExpertBlock & block) {
    const uint64_t bytes = expert_bytes(block.group);
    Around around;
    around.link = n_in_flight_ > 0 ? balancer_.link_ns(1, bytes) / 2 : 0; // half of a prefetch is still to come
    around.link += std::max(0.0, nanoseconds(link_free_ - Clock::now()));
    around.device = balancer_.device_ns(demanded_.size(), bytes);
    const size_t n = splits_always_ || store_->page_locked(block) ? balancer_.split(misses_, bytes, around) : 0;
    loading_.clear();
    for (size_t i = 0; i < n; ++i) {
        const int32_t slot = pool(block).take(block.first_key + misses_[i].expert, SlotPool::any_score);
        if (slot == SlotPool::none) { // all are pinned or loading: the CPU computes the rest
            return;
        }
        slot_of_[static_cast<size_t>(misses_[i].expert)] = slot;
        count_fetch(block, slot);
        loading_.push_back(misses_[i].expert);
    }
}

void SlotCache::demand_hybrid(int32_t number, const int32_t * ids, int32_t n, int32_t * out) {
    const ExpertBlock & block = block_at(number);
    complete_fetches(); // the device is past them
    note_block_began(number);
    fetches_.group = block.group;
    {
        const Lock lock(mutex_);
        begin_block(number);
        complete_next_layer();
        const auto late = static_cast<uint64_t>(find_absent(block, ids, n));
        score_prediction(number);
        take_for_fetches(block);
        begin_fetches();
        const uint64_t left = late + misses_.size() - loading_.size();
        counters_.late += late;
        counters_.misses += left;
        counters_.cpu_computed += left;
        size_t pairs = late;
        for (size_t i = loading_.size(); i < misses_.size(); ++i) {
            pairs += static_cast<size_t>(misses_[i].pairs);
        }
        cpu_left_ns_ = balancer_.cpu_ns(left, pairs, expert_bytes(block.group));
    }
    if (!loading_.empty()) {
        send_loading(block);
        fetches_sent(taken_, expert_bytes(block.group));
    }
    ready_ = Clock::now();
    for (int32_t i = 0; i < n; ++i) {
        out[i] = slot_of_[static_cast<size_t>(ids[i])];
    }
}

void SlotCache::computed(int32_t block, size_t n_experts, size_t n_pairs, double ns) {
    const uint64_t bytes = expert_bytes(block_at(block).group);
    balancer_.computed(n_experts, n_pairs, bytes, ns, balancer_.link_ns(fetches_.n_sent, bytes));
    cpu_left_ns_ = 0;
    ready_ = fetches_.idle_since = Clock::now();
    const Lock lock(mutex_);
    counters_.cpu_ns += clock_ ? 0 : static_cast<uint64_t>(ns); // the virtual clock counts blocks, not experts
    note_costs();
}

void SlotCache::note_costs() {
    costs_.cpu_bytes_per_s = balancer_.cpu_bytes_per_s();
    costs_.link_bytes_per_s = balancer_.link_bytes_per_s();
    costs_.contention = balancer_.contention();
    costs_.device_bytes_per_s = balancer_.device_bytes_per_s();
}

edge_costs SlotCache::costs() const {
    const Lock lock(mutex_);
    edge_costs out = costs_;
    out.fetches_some = fetches_some();
    out.next_layer_precision = router_predictor_ ? static_cast<double>(router_precision_) : 0;
    return out;
}

} // namespace edge
