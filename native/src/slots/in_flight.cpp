// What travels on the decoding thread's link: copies that the running block waits for, and those sent ahead for the next one.
#include "slots/slot_cache.h"

#include "util/error.h"

#include <algorithm>

namespace edge {

namespace {

constexpr std::chrono::microseconds noticeable(25); // of waiting: what has long arrived takes up to 10 to find out

} // namespace

// In virtual time a demand takes its time at once, and without a GPU a copy is done when it has been sent.
bool SlotCache::defers() const {
    return !clock_ && (demand_link_.asynchronous() || splits_always_);
}

std::vector<SlotCache::NextLayerCopy>::const_iterator SlotCache::find_next_layer(int32_t group, int32_t slot) const {
    const auto same = [&](const NextLayerCopy & one) { return one.group == group && one.slot == slot; };
    return std::find_if(next_layer_copies_.begin(), next_layer_copies_.end(), same);
}

bool SlotCache::is_on_demand_link(int32_t group, int32_t slot) const {
    return find_next_layer(group, slot) != next_layer_copies_.end() ||
           (fetches_.group == group && std::find(fetches_.slots.begin(), fetches_.slots.end(), slot) != fetches_.slots.end());
}

void SlotCache::note_sent(size_t n_experts, uint64_t bytes) {
    if (demand_link_.is_emulated()) {
        link_free_ = demand_link_.due();
        return;
    }
    const double ns = demand_link_.asynchronous() ? balancer_.link_ns(n_experts, bytes) : 0;
    link_free_ = std::max(Clock::now(), link_free_) + std::chrono::nanoseconds(static_cast<int64_t>(ns));
}

// The block knows its experts: what lies between two blocks is what the link can be idle for.
void SlotCache::note_block_began(int32_t number) {
    constexpr double weight = 0.1, most_ns = 5e6;
    if (number > 0 && ready_ != Clock::time_point{}) {
        block_ns_ += weight * (std::clamp(nanoseconds(Clock::now() - ready_), 0.0, most_ns) - block_ns_);
    }
    ready_ = {};
}

// What was sent ahead and has arrived by now, by estimate. What comes later stays under way.
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

// All of it; false when there is none.
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

// The running block waits for it; false for what the worker brings.
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

// Nanoseconds until it has arrived, by estimate.
double SlotCache::remaining_ns(int32_t group, int32_t slot) const {
    const auto one = find_next_layer(group, slot);
    return one == next_layer_copies_.end() ? balancer_.link_ns(1, expert_bytes(group)) / 2 : nanoseconds(one->due - Clock::now());
}

// The block's demands are about to be sent.
void SlotCache::begin_fetches() {
    fetches_.queued = n_in_flight_ > 0 || link_free_ > Clock::now();
    fetches_.sent   = Clock::now();
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

// What prefetches are bringing for the block. One that failed is nobody's to fetch any more: the graph ends.
void SlotCache::await_late() {
    if (fetches_.late.empty()) {
        return;
    }
    Lock lock(mutex_);
    const auto began = Clock::now();
    loaded_.wait(lock, [this] {
        return std::all_of(fetches_.late.begin(), fetches_.late.end(), [this](const auto & late) { return has_arrived(late.first, late.second); });
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

// A stall is the time in which nothing but the copies was waited for, by this thread or by the device.
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
        balancer_.fetched(fetches_.n_sent, expert_bytes(fetches_.group), nanoseconds(ended - fetches_.sent), waited && !fetches_.queued);
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
    fetches_.late.clear(); // theirs is the worker's to land
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

// Their slots can be had by others once the block's pins are gone.
void SlotCache::mark_arrived() {
    for (const int32_t slot : fetches_.slots) {
        pools_[static_cast<size_t>(fetches_.group)].loaded(slot);
    }
    fetches_.slots.clear();
    fetches_.n_sent = 0;
}

} // namespace edge
