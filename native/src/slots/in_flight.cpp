// Copies in flight on the decoding thread's link: demands that the running block waits for, and prefetches for the next
// one.
#include "slots/slot_cache.h"

#include "util/error.h"

#include <algorithm>

namespace edge {

namespace {

// Shortest wait that counts as a stall: finding that a copy arrived long ago takes up to 10 us.
constexpr std::chrono::microseconds noticeable(25);

} // namespace

// In virtual time a demand passes its time at once; without a GPU a copy is done when it has been sent.
bool SlotCache::defers() const { return !clock_ && (demand_link_.asynchronous() || splits_always_); }

std::vector<SlotCache::NextLayerCopy>::const_iterator SlotCache::find_next_layer(int32_t group, int32_t slot) const {
    const auto same = [&](const NextLayerCopy & one) { return one.group == group && one.slot == slot; };
    return std::find_if(next_layer_copies_.begin(), next_layer_copies_.end(), same);
}

bool SlotCache::is_on_demand_link(int32_t group, int32_t slot) const {
    return find_next_layer(group, slot) != next_layer_copies_.end() ||
           (fetches_.group == group &&
            std::find(fetches_.slots.begin(), fetches_.slots.end(), slot) != fetches_.slots.end());
}

void SlotCache::note_sent(size_t n_experts, uint64_t bytes) {
    if (demand_link_.is_emulated()) {
        link_free_ = demand_link_.due();
        return;
    }
    const double ns = demand_link_.asynchronous() ? balancer_.link_ns(n_experts, bytes) : 0;
    link_free_ = std::max(Clock::now(), link_free_) + std::chrono::nanoseconds(static_cast<int64_t>(ns));
}

// The block knows its experts: the link is idle at most between two blocks.
void SlotCache::note_block_began(int32_t number) {
    constexpr double weight = 0.1, most_ns = 5e6;
    if (number > 0 && ready_ != Clock::time_point{}) {
        block_ns_ += weight * (std::clamp(nanoseconds(Clock::now() - ready_), 0.0, most_ns) - block_ns_);
    }
    ready_ = {};
}

// Complete the next-layer copies that have arrived by estimate. Later ones stay in flight.
void SlotCache::complete_next_layer() {
    const auto now = Clock::now();
    const auto settled = [&](const NextLayerCopy & one) {
        if (one.due > now) {
            return false;
        }
        demand_link_.wait(one.ticket);
        pools_[static_cast<size_t>(one.group)].loaded(one.slot);
        return true;
    };
    const auto left = std::remove_if(next_layer_copies_.begin(), next_layer_copies_.end(), settled);
    const auto waited = Clock::now() - now;
    if (left != next_layer_copies_.end() && waited > noticeable) {
        counters_.stall_ns += static_cast<uint64_t>(nanoseconds(waited));
    }
    next_layer_copies_.erase(left, next_layer_copies_.end());
}

// Wait for all next-layer copies. False if no such copy is in flight.
bool SlotCache::await_next_layer() {
    if (next_layer_copies_.empty()) {
        return false;
    }
    demand_link_.wait(next_layer_copies_.back().ticket);
    for (const NextLayerCopy & one : next_layer_copies_) {
        pools_[static_cast<size_t>(one.group)].loaded(one.slot);
    }
    next_layer_copies_.clear();
    return true;
}

// Make the running block wait for a next-layer copy. False if the expert is the worker's.
bool SlotCache::claim_next_layer(int32_t group, int32_t slot) {
    const auto one = find_next_layer(group, slot);
    if (one == next_layer_copies_.end()) {
        return false;
    }
    if (fetches_.slots.empty()) {
        fetches_.sent = fetches_.idle_since = Clock::now();
    }
    fetches_.slots.push_back(slot);
    fetches_.ticket = std::max(fetches_.ticket, one->ticket);
    next_layer_copies_.erase(one);
    return true;
}

// Estimated nanoseconds until it arrives.
double SlotCache::remaining_ns(int32_t group, int32_t slot) const {
    const auto one = find_next_layer(group, slot);
    return one == next_layer_copies_.end() ? balancer_.link_ns(1, expert_bytes(group)) / 2
                                           : nanoseconds(one->due - Clock::now());
}

// The block's demands are about to be sent.
void SlotCache::begin_fetches() {
    fetches_.queued = n_in_flight_ > 0 || link_free_ > Clock::now();
    fetches_.sent = Clock::now();
}

void SlotCache::fetches_sent(const std::vector<int32_t> & slots, uint64_t bytes) {
    fetches_.slots.insert(fetches_.slots.end(), slots.begin(), slots.end());
    fetches_.n_sent += slots.size();
    fetches_.ticket = demand_link_.last();
    fetches_.idle_since = Clock::now();
    note_sent(slots.size(), bytes);
}

bool SlotCache::has_arrived(int32_t slot, int32_t key) const {
    const SlotPool & slots = pools_[static_cast<size_t>(fetches_.group)];
    return slots.key_of(slot) != key || !slots.loading(slot);
}

// Wait for the prefetches that the block needs. If one failed the graph ends, since nobody fetches it any more.
void SlotCache::await_late() {
    if (fetches_.late.empty()) {
        return;
    }
    Lock lock(mutex_);
    const auto began = Clock::now();
    loaded_.wait(lock, [this] {
        return std::all_of(fetches_.late.begin(), fetches_.late.end(),
                           [this](const auto & late) { return has_arrived(late.first, late.second); });
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

// A stall is time in which this thread or the device waited for nothing but copies.
void SlotCache::await_fetches() {
    await_late();
    if (fetches_.slots.empty()) {
        return;
    }
    const auto began = Clock::now();
    demand_link_.wait(fetches_.ticket);
    const auto ended = Clock::now();
    const bool waited = ended - began > noticeable;
    if (fetches_.n_sent > 0) {
        balancer_.fetched(fetches_.n_sent, expert_bytes(fetches_.group), nanoseconds(ended - fetches_.sent),
                          waited && !fetches_.queued);
    }
    ready_ = ended;
    link_free_ = next_layer_copies_.empty() ? std::min(link_free_, ended) : link_free_;
    {
        const Lock lock(mutex_);
        counters_.stall_ns += static_cast<uint64_t>(nanoseconds(ended - (waited ? fetches_.idle_since : began)));
        note_costs();
        mark_arrived();
    }
    loaded_.notify_all();
}

void SlotCache::complete_fetches() {
    fetches_.late.clear(); // the worker completes these
    if (fetches_.slots.empty()) {
        return;
    }
    demand_link_.wait(fetches_.ticket);
    {
        const Lock lock(mutex_);
        mark_arrived();
    }
    loaded_.notify_all();
}

// Their slots can be evicted once the block's pins are released.
void SlotCache::mark_arrived() {
    for (const int32_t slot : fetches_.slots) {
        pools_[static_cast<size_t>(fetches_.group)].loaded(slot);
    }
    fetches_.slots.clear();
    fetches_.n_sent = 0;
}

} // namespace edge
