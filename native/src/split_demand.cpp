// The half of Residency that serves hybrid execution: what is missing is fetched or left to the CPU, by cost.
#include "residency.h"

#include "error.h"

#include <algorithm>
#include <chrono>

namespace edge {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds noticeable(25); // of waiting: what has long arrived takes up to 10 to find out

double nanoseconds(Clock::duration span) {
    return static_cast<double>(std::chrono::duration_cast<std::chrono::nanoseconds>(span).count());
}

} // namespace

// Fills in misses_ and says how many more there are that the CPU computes: those that a prefetch is bringing, unless
// waiting for the rest of it, half of it on average, takes less.
int32_t Residency::find_absent(const ExpertBlock & block, const int32_t * ids, int32_t n) {
    SlotPool & slots = pool(block);
    int32_t late = 0;
    const uint64_t bytes = expert_bytes(block.group);
    const bool waits = !clock_ && balancer_.link_ns(1, bytes) / 2 < balancer_.cpu_ns(1, 1, bytes);
    wanted_.clear();
    misses_.clear();
    for (int32_t i = 0; i < n; ++i) {
        require_expert(ids[i]);
        if (std::find(wanted_.begin(), wanted_.end(), ids[i]) != wanted_.end()) {
            const auto same = [&](const Miss & miss) { return miss.expert == ids[i]; };
            const auto miss = std::find_if(misses_.begin(), misses_.end(), same);
            if (miss != misses_.end()) {
                ++miss->pairs;
            }
            continue;
        }
        wanted_.push_back(ids[i]);
        const int32_t key = block.first_key + ids[i];
        const int32_t slot = slots.find(key);
        const bool loading = slot != SlotPool::none && slots.loading(slot);
        slot_of_[static_cast<size_t>(ids[i])] = loading ? SlotPool::none : slot;
        if (loading && waits) {
            hit(block, slot);
            slot_of_[static_cast<size_t>(ids[i])] = slot;
            fetches_.late.emplace_back(slot, key);
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

// The CPU computes it, and its prefetch was right all the same.
void Residency::use_late(const ExpertBlock & block, int32_t slot) {
    if (pool(block).prefetched_unused(slot)) {
        ++counters_.prefetched_used;
        prefetched_used_bytes_ += expert_bytes(block.group);
    }
    pool(block).use(slot);
}

// Gives those that are to be fetched a slot each and says how many there are: the first of misses_.
size_t Residency::take_for_fetches(const ExpertBlock & block) {
    const uint64_t bytes = expert_bytes(block.group);
    fetches_.queued = flying_ > 0;
    const double queued_ns = fetches_.queued ? balancer_.link_ns(1, bytes) / 2 : 0; // half of a prefetch is still to come
    const size_t n = splits_always_ || store_->page_locked(block) ? balancer_.split(misses_, bytes, queued_ns) : 0;
    for (size_t i = 0; i < n; ++i) {
        const int32_t slot = pool(block).take(block.first_key + misses_[i].expert, SlotPool::any_price);
        if (slot == SlotPool::none) { // all are pinned or loading: the rest is the CPU's
            return i;
        }
        slot_of_[static_cast<size_t>(misses_[i].expert)] = slot;
        count_fetch(block, slot);
    }
    return n;
}

void Residency::demand_some(int32_t number, const int32_t * ids, int32_t n, int32_t * out) {
    const ExpertBlock & block = block_at(number);
    land_fetches(); // the device is past them
    size_t n_fetched = 0;
    {
        const Lock lock(mutex_);
        begin_block(number);
        const auto late = static_cast<uint64_t>(find_absent(block, ids, n));
        judge_foresight(number);
        n_fetched = take_for_fetches(block);
        const uint64_t left = late + misses_.size() - n_fetched;
        counters_.late += late;
        counters_.misses += left;
        counters_.cpu_computed += left;
    }
    send_some(block, n_fetched);
    for (int32_t i = 0; i < n; ++i) {
        out[i] = slot_of_[static_cast<size_t>(ids[i])];
    }
}

void Residency::send_some(const ExpertBlock & block, size_t n_fetched) {
    fetches_.group = block.group;
    fetches_.sent  = Clock::now();
    try {
        for (size_t i = 0; i < n_fetched; ++i) {
            const int32_t slot = slot_of_[static_cast<size_t>(misses_[i].expert)];
            fetches_.slots.push_back(slot);
            store_->send(demand_link_, block, misses_[i].expert, slot, false);
        }
    } catch (...) {
        demand_link_.wait();
        const Lock lock(mutex_);
        for (size_t i = 0; i < n_fetched; ++i) {
            pool(block).drop(slot_of_[static_cast<size_t>(misses_[i].expert)]);
        }
        ++counters_.failed;
        fetches_.slots.clear();
        throw;
    }
}

bool Residency::has_landed(int32_t slot, int32_t key) const {
    const SlotPool & slots = pools_[static_cast<size_t>(fetches_.group)];
    return slots.key_of(slot) != key || !slots.loading(slot);
}

// What prefetches are bringing for the block. One that failed is nobody's to fetch any more: the graph ends.
void Residency::await_late() {
    if (fetches_.late.empty()) {
        return;
    }
    Lock lock(mutex_);
    const auto began = Clock::now();
    loaded_.wait(lock, [this] {
        return std::all_of(fetches_.late.begin(), fetches_.late.end(), [this](const auto & late) { return has_landed(late.first, late.second); });
    });
    counters_.stall_ns += static_cast<uint64_t>(nanoseconds(Clock::now() - began));
    const SlotPool & slots = pools_[static_cast<size_t>(fetches_.group)];
    const auto failed = [&](const auto & late) { return slots.key_of(late.first) != late.second; };
    const bool any_failed = std::any_of(fetches_.late.begin(), fetches_.late.end(), failed);
    fetches_.late.clear();
    if (any_failed) {
        throw Error(EDGE_ERR_BACKEND, "a transfer that a block waited for has failed");
    }
}

void Residency::await_fetches() {
    await_late();
    if (fetches_.slots.empty()) {
        return;
    }
    const auto began = Clock::now();
    demand_link_.wait();
    const auto ended = Clock::now();
    balancer_.fetched(fetches_.slots.size(), expert_bytes(fetches_.group), nanoseconds(ended - fetches_.sent),
                      ended - began > noticeable && !fetches_.queued);
    {
        const Lock lock(mutex_);
        counters_.stall_ns += static_cast<uint64_t>(nanoseconds(ended - began));
        note_costs();
        mark_landed();
    }
    loaded_.notify_all();
}

void Residency::land_fetches() {
    fetches_.late.clear(); // theirs is the worker's to land
    if (fetches_.slots.empty()) {
        return;
    }
    demand_link_.wait();
    {
        const Lock lock(mutex_);
        mark_landed();
    }
    loaded_.notify_all();
}

// Their slots can be had by others once the block's pins are gone.
void Residency::mark_landed() {
    for (const int32_t slot : fetches_.slots) {
        pools_[static_cast<size_t>(fetches_.group)].loaded(slot);
    }
    fetches_.slots.clear();
}

void Residency::computed(int32_t block, size_t n_experts, size_t n_pairs, double ns) {
    const uint64_t bytes = expert_bytes(block_at(block).group);
    balancer_.computed(n_experts, n_pairs, bytes, ns, balancer_.link_ns(fetches_.slots.size(), bytes));
    const Lock lock(mutex_);
    counters_.cpu_ns += clock_ ? 0 : static_cast<uint64_t>(ns); // the virtual clock has blocks, not experts
    note_costs();
}

void Residency::note_costs() {
    costs_.cpu_bytes_per_s  = balancer_.cpu_bytes_per_s();
    costs_.link_bytes_per_s = balancer_.link_bytes_per_s();
    costs_.contention       = balancer_.contention();
}

edge_costs Residency::costs() const {
    const Lock lock(mutex_);
    edge_costs out = costs_;
    out.fetches_some = fetches_some();
    out.layer_ahead_precision = gate_ ? static_cast<double>(foresight_precision_) : 0;
    return out;
}

} // namespace edge
