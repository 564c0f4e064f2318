// The half of Residency that looks ahead: orders, the worker that carries them out, and its virtual twin.
#include "residency.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace edge {

// Whether it is for the decoding thread to send, when its block is next.
bool Residency::waits_for_block(const edge_order & order) const {
    return order.deadline == order.block && defers() && looks_ahead_to(order.block);
}

bool Residency::commit_scores() {
    const float * scores = shared_scores_.data();
    bool sound = true;
    for (const ExpertBlock & block : table_.blocks) {
        sound &= pool(block).score(block.first_key, scores, table_.n_expert);
        scores += table_.n_expert;
    }
    return sound;
}

// Between two decodes, when all that it touches has left the caches: one thing after the other, and the worker is not
// woken for nothing.
int32_t Residency::prefetch(const edge_order * orders, int32_t n, uint64_t byte_budget, float margin, bool * sound) {
    Lock lock(mutex_);
    orders_.clear();
    forget_ordered();
    const bool are_numbers = !serving() || commit_scores();
    if (sound != nullptr) {
        *sound = are_numbers;
    }
    if (!serving()) {
        return 0;
    }
    for (SlotPool & pool : pools_) {
        pool.forget_expected();
    }
    const uint64_t now = clock_ ? clock_->now() : 0;
    int32_t n_absent = 0;
    constexpr int32_t most = 64; // that are sorted at once, into those in slots and the others: which is as good as random,
    std::array<int32_t, most> slot_of; // and a branch that is guessed wrong costs more than all else here
    std::array<int32_t, most> held;
    std::array<int32_t, most> absent;
    std::array<bool, most> waits;
    const auto number = [](float priority) { return std::isfinite(priority) ? priority : 0.0F; };
    for (int32_t from = 0; from < n; from += most) {
        const int32_t to = std::min(n, from + most);
        size_t n_held = 0;
        size_t n_missing = 0;
        for (int32_t i = from; i < to; ++i) {
            const ExpertBlock & block = block_at(orders[i].block);
            waits[static_cast<size_t>(i - from)] = byte_budget > 0 && waits_for_block(orders[i]);
            if (waits[static_cast<size_t>(i - from)]) {
                ordered_blocks_[static_cast<size_t>(orders[i].block)] = true;
            }
            const int32_t slot = pool(block).find(block.first_key + orders[i].expert);
            slot_of[n_held] = slot; // of the next one that is held
            held[n_held] = absent[n_missing] = i;
            n_held    += static_cast<size_t>(slot != SlotPool::none);
            n_missing += static_cast<size_t>(slot == SlotPool::none);
        }
        for (size_t k = 0; k < n_held; ++k) {
            const edge_order & wanted = orders[held[k]];
            pool(block_at(wanted.block)).expect(slot_of[k], number(wanted.priority));
        }
        for (size_t k = 0; k < n_missing && byte_budget > 0; ++k) { // else none would ever begin
            const edge_order & wanted = orders[absent[k]];
            std::vector<Order> & outstanding = waits[static_cast<size_t>(absent[k] - from)] ? ordered_ahead_ : orders_;
            outstanding.push_back({ wanted.block, wanted.expert, wanted.deadline, number(wanted.priority) - margin, now });
        }
        n_absent += static_cast<int32_t>(n_missing);
    }
    std::reverse(orders_.begin(), orders_.end()); // the most urgent last
    byte_budget_ = byte_budget;
    if (clock_) {
        run_virtual_orders();
    }
    const bool has_orders = !orders_.empty();
    lock.unlock(); // a worker that wakes finds it free
    if (has_orders) {
        ordered_.notify_one();
    }
    loaded_.notify_all();
    return n_absent;
}

// Takes a slot for an order; nothing when it came in meanwhile, costs more than it is worth or than is left to spend.
std::optional<Residency::InFlight> Residency::begin_prefetch(const Order & order) {
    const ExpertBlock & block = block_at(order.block);
    const uint64_t bytes = expert_bytes(block.group);
    const int32_t key = block.first_key + order.expert;
    if (pool(block).find(key) != SlotPool::none || bytes > byte_budget_) {
        return std::nullopt;
    }
    const int32_t slot = pool(block).prefetch(key, order.priority);
    if (slot == SlotPool::none) {
        return std::nullopt;
    }
    byte_budget_ -= bytes;
    count_prefetch(bytes);
    ++flying_;
    return InFlight{ block.group, slot, 0, 0 };
}

void Residency::count_prefetch(uint64_t bytes) {
    prefetched_bytes_ += bytes;
    counters_.bytes_fetched += bytes;
    ++counters_.prefetched;
}

void Residency::forget_prefetch(uint64_t bytes) {
    prefetched_bytes_ -= bytes;
    counters_.bytes_fetched -= bytes;
    --counters_.prefetched;
}

void Residency::finish(const InFlight & flight, bool arrived) {
    SlotPool & slots = pools_[static_cast<size_t>(flight.group)];
    if (arrived) {
        slots.loaded(flight.slot);
    } else { // whoever waits for it finds it gone, and fetches it
        slots.drop(flight.slot);
        ++counters_.failed;
    }
    --flying_;
    loaded_.notify_all();
}

// Sends an order's copies; false when a copy failed, and then none is under way.
bool Residency::send(const Order & order, InFlight & flight) {
    try {
        store_->send(prefetch_link_, block_at(order.block), order.expert, flight.slot, prefetch_marks);
        flight.ticket = prefetch_link_.last();
        return true;
    } catch (const std::exception &) {
        prefetch_link_.wait();
        return false;
    }
}

// One expert's copies follow the last without a gap: all its matrices but one start when those of the expert before
// have arrived, and the last when its last has, so hardly more than one expert's bytes are ever under way.
void Residency::work() {
    Lock lock(mutex_);
    std::optional<InFlight> before;
    const auto land = [&] {
        lock.unlock();
        prefetch_link_.wait(before->ticket);
        lock.lock();
        finish(*before, true);
        before.reset();
    };
    while (true) {
        ordered_.wait(lock, [&] { return stop_ || before || (!orders_.empty() && !demand_waits_); });
        std::optional<InFlight> now;
        bool sent = false;
        if (!stop_ && !orders_.empty() && !demand_waits_) {
            const Order order = orders_.back();
            orders_.pop_back();
            now = begin_prefetch(order);
            if (now && before && !store_->page_locked(block_at(order.block))) {
                land(); // staging takes longer than the link's gap
            }
            if (now) {
                lock.unlock();
                sent = send(order, *now);
                lock.lock();
            }
        }
        if (before) {
            land();
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

// Begins the orders whose turn on the virtual link has come by now. The bytes are copied at once; the slot is loading
// until its virtual arrival.
void Residency::run_virtual_orders() {
    while (true) {
        if (virtual_flight_ && virtual_flight_->arrives_at <= clock_->now()) {
            finish(*virtual_flight_, true);
            virtual_flight_.reset();
        }
        if (virtual_flight_ || orders_.empty()) {
            return;
        }
        const Order order = orders_.back();
        orders_.pop_back();
        std::optional<InFlight> flight = begin_prefetch(order);
        if (!flight) {
            continue;
        }
        if (!send(order, *flight)) {
            finish(*flight, false);
            continue;
        }
        prefetch_link_.wait();
        flight->arrives_at = clock_->transfer(order.ordered_at, expert_bytes(flight->group));
        virtual_flight_ = flight;
    }
}

// Lets virtual time pass until the prefetch under way has arrived; false when there is none.
bool Residency::settle_virtual_flight() {
    if (!virtual_flight_) {
        return false;
    }
    clock_->wait_until(virtual_flight_->arrives_at);
    finish(*virtual_flight_, true);
    virtual_flight_.reset();
    return true;
}

void Residency::drain() {
    Lock lock(mutex_);
    while (clock_ && (virtual_flight_ || !orders_.empty())) {
        settle_virtual_flight();
        run_virtual_orders();
    }
    loaded_.wait(lock, [this] { return orders_.empty() && flying_ == 0; });
}

} // namespace edge
