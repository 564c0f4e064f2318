// The part of SlotCache that prefetches: requests, the worker thread that serves them, and its virtual counterpart.
#include "slots/slot_cache.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace edge {

// Return true if the decoding thread itself sends it, when its block is next.
bool SlotCache::is_for_next_layer(const edge_prefetch_request & request) const {
    return request.deadline == request.block && defers() && can_prefetch_next_layer(request.block);
}

bool SlotCache::commit_scores() {
    const float * scores = shared_scores_.data();
    bool finite = true;
    for (const ExpertBlock & block : table_.blocks) {
        finite &= pool(block).score(block.first_key, scores, table_.n_expert);
        scores += table_.n_expert;
    }
    return finite;
}

// Runs between two decodes with cold caches: touch each thing once, and do not wake the worker for nothing.
int32_t SlotCache::prefetch(const edge_prefetch_request * requests, int32_t n, uint64_t byte_budget, float margin,
                            bool * finite) {
    Lock lock(mutex_);
    requests_.clear();
    forget_next_layer_requests();
    const bool are_finite = !has_slots() || commit_scores();
    if (finite != nullptr) {
        *finite = are_finite;
    }
    if (!has_slots()) {
        return 0;
    }
    for (SlotPool & pool : pools_) {
        pool.forget_expected();
    }
    const uint64_t now = clock_ ? clock_->now() : 0;
    int32_t n_absent = 0;
    constexpr int32_t most = 64; // requests sorted at once into resident and absent ones: the outcome
    std::array<int32_t, most> slot_of; // is random, and a mispredicted branch costs more than the rest
    std::array<int32_t, most> held;
    std::array<int32_t, most> absent;
    std::array<bool, most> for_next_layer;
    const auto finite_or_zero = [](float priority) { return std::isfinite(priority) ? priority : 0.0F; };
    for (int32_t from = 0; from < n; from += most) {
        const int32_t to = std::min(n, from + most);
        size_t n_held = 0;
        size_t n_missing = 0;
        for (int32_t i = from; i < to; ++i) {
            const ExpertBlock & block = block_at(requests[i].block);
            for_next_layer[static_cast<size_t>(i - from)] = byte_budget > 0 && is_for_next_layer(requests[i]);
            if (for_next_layer[static_cast<size_t>(i - from)]) {
                requested_blocks_[static_cast<size_t>(requests[i].block)] = true;
            }
            const int32_t slot = pool(block).find(block.first_key + requests[i].expert);
            slot_of[n_held] = slot; // of the next held one
            held[n_held] = absent[n_missing] = i;
            n_held += static_cast<size_t>(slot != SlotPool::none);
            n_missing += static_cast<size_t>(slot == SlotPool::none);
        }
        for (size_t k = 0; k < n_held; ++k) {
            const edge_prefetch_request & wanted = requests[held[k]];
            pool(block_at(wanted.block)).expect(slot_of[k], finite_or_zero(wanted.priority));
        }
        for (size_t k = 0; k < n_missing && byte_budget > 0; ++k) { // without a budget none would ever begin
            const edge_prefetch_request & wanted = requests[absent[k]];
            std::vector<Request> & outstanding =
                for_next_layer[static_cast<size_t>(absent[k] - from)] ? next_layer_requests_ : requests_;
            outstanding.push_back(
                { wanted.block, wanted.expert, wanted.deadline, finite_or_zero(wanted.priority) - margin, now });
        }
        n_absent += static_cast<int32_t>(n_missing);
    }
    std::reverse(requests_.begin(), requests_.end()); // most urgent last
    byte_budget_ = byte_budget;
    if (clock_) {
        run_virtual_requests();
    }
    const bool has_requests = !requests_.empty();
    lock.unlock(); // so that the woken worker finds it free
    if (has_requests) {
        requested_.notify_one();
    }
    loaded_.notify_all();
    return n_absent;
}

// Take a slot for a request. Nothing if the expert came in meanwhile, scores too low or exceeds the byte budget.
std::optional<SlotCache::InFlight> SlotCache::begin_prefetch(const Request & request) {
    const ExpertBlock & block = block_at(request.block);
    const uint64_t bytes = expert_bytes(block.group);
    const int32_t key = block.first_key + request.expert;
    if (pool(block).find(key) != SlotPool::none || bytes > byte_budget_) {
        return std::nullopt;
    }
    const int32_t slot = pool(block).prefetch(key, request.priority);
    if (slot == SlotPool::none) {
        return std::nullopt;
    }
    byte_budget_ -= bytes;
    count_prefetch(bytes);
    ++n_in_flight_;
    return InFlight{ block.group, slot, 0, 0 };
}

void SlotCache::count_prefetch(uint64_t bytes) {
    prefetched_bytes_ += bytes;
    counters_.bytes_fetched += bytes;
    ++counters_.prefetched;
}

void SlotCache::uncount_prefetch(uint64_t bytes) {
    prefetched_bytes_ -= bytes;
    counters_.bytes_fetched -= bytes;
    --counters_.prefetched;
}

void SlotCache::finish(const InFlight & flight, bool arrived) {
    SlotPool & slots = pools_[static_cast<size_t>(flight.group)];
    if (arrived) {
        slots.loaded(flight.slot);
    } else { // a block that waits for it finds no slot and fetches it
        slots.drop(flight.slot);
        ++counters_.failed;
    }
    --n_in_flight_;
    loaded_.notify_all();
}

// Send a request's copies. False if a copy failed, and then none is in flight.
bool SlotCache::send(const Request & request, InFlight & flight) {
    try {
        store_->send(prefetch_link_, block_at(request.block), request.expert, flight.slot, prefetch_marks);
        flight.ticket = prefetch_link_.last();
        return true;
    } catch (const std::exception &) {
        prefetch_link_.wait();
        return false;
    }
}

// One expert's copies follow the previous ones without a gap: all its matrices but the last start when the previous
// expert's have arrived, and the last when the previous last one has. So little more than one expert's bytes is ever in
// flight.
void SlotCache::work() {
    Lock lock(mutex_);
    std::optional<InFlight> before;
    const auto await_copy = [&] {
        lock.unlock();
        prefetch_link_.wait(before->ticket);
        lock.lock();
        finish(*before, true);
        before.reset();
    };
    while (true) {
        requested_.wait(lock, [&] { return stop_ || before || (!requests_.empty() && !demand_waits_); });
        std::optional<InFlight> now;
        bool sent = false;
        if (!stop_ && !requests_.empty() && !demand_waits_) {
            const Request request = requests_.back();
            requests_.pop_back();
            now = begin_prefetch(request);
            if (now && before && !store_->page_locked(block_at(request.block))) {
                await_copy(); // staging takes longer than the link's gap
            }
            if (now) {
                lock.unlock();
                sent = send(request, *now);
                lock.lock();
            }
        }
        if (before) {
            await_copy();
        }
        if (now && sent) {
            before = now;
        } else if (now) {
            finish(*now, false);
        }
        loaded_.notify_all();
        if (stop_ && !before) {
            return;
        }
    }
}

// Begin the requests whose turn on the virtual link has come. Their bytes are copied at once; the slot is loading until
// its virtual arrival.
void SlotCache::run_virtual_requests() {
    while (true) {
        if (virtual_flight_ && virtual_flight_->arrives_at <= clock_->now()) {
            finish(*virtual_flight_, true);
            virtual_flight_.reset();
        }
        if (virtual_flight_ || requests_.empty()) {
            return;
        }
        const Request request = requests_.back();
        requests_.pop_back();
        std::optional<InFlight> flight = begin_prefetch(request);
        if (!flight) {
            continue;
        }
        if (!send(request, *flight)) {
            finish(*flight, false);
            continue;
        }
        prefetch_link_.wait();
        flight->arrives_at = clock_->transfer(request.requested_at, expert_bytes(flight->group));
        virtual_flight_ = flight;
    }
}

// Advance virtual time until the prefetch in flight has arrived. False if no prefetch is in flight.
bool SlotCache::complete_virtual_flight() {
    if (!virtual_flight_) {
        return false;
    }
    clock_->wait_until(virtual_flight_->arrives_at);
    finish(*virtual_flight_, true);
    virtual_flight_.reset();
    return true;
}

void SlotCache::drain() {
    Lock lock(mutex_);
    while (clock_ && (virtual_flight_ || !requests_.empty())) {
        complete_virtual_flight();
        run_virtual_requests();
    }
    loaded_.wait(lock, [this] { return requests_.empty() && n_in_flight_ == 0; });
}

} // namespace edge
