#include "residency.h"

#include "error.h"

#include <algorithm>
#include <chrono>
#include <string>

namespace edge {

Residency::Residency(const ExpertTable & table, const std::vector<int32_t> & slots, ggml_backend_buffer_type_t buft)
    : table_(table), store_(table, slots, buft) {
    for (size_t g = 0; g < table.groups.size(); ++g) {
        pools_.emplace_back(slots[g], static_cast<int32_t>(table.groups[g].blocks.size()) * table.n_expert);
    }
    worker_ = std::thread([this] { work(); });
}

Residency::~Residency() {
    {
        const Lock lock(mutex_);
        stop_ = true;
    }
    ordered_.notify_all();
    worker_.join();
}

// Everything before this block has run: its slots may be reused, and orders for it or earlier come too late.
void Residency::begin_block(int32_t block) {
    for (SlotPool & pool : pools_) {
        pool.unpin_all();
    }
    if (block <= last_block_ || last_block_ < 0) {
        ++counters_.steps;
    }
    last_block_ = block;
    orders_.erase(std::remove_if(orders_.begin(), orders_.end(), [block](const Order & o) { return o.block <= block; }),
                  orders_.end());
    loaded_.notify_all(); // a drain waits for orders that may all be gone now
}

void Residency::hit(const ExpertBlock & block, int32_t slot) {
    SlotPool & slots = pool(block);
    if (slots.loading(slot)) {
        ++counters_.misses;
        ++counters_.late;
        ++counters_.fetched;
    } else {
        ++counters_.hits;
    }
    if (slots.prefetched_unused(slot)) {
        ++counters_.prefetched_used;
        prefetched_used_bytes_ += expert_bytes(block);
    }
    slots.use(slot);
    slots.pin(slot);
}

int32_t Residency::take_for_demand(Lock & lock, const ExpertBlock & block, int32_t key) {
    SlotPool & slots = pool(block);
    int32_t slot = slots.take(key, false);
    while (slot == SlotPool::none) { // only a load in flight can stand in the way: the floor counts it
        loaded_.wait(lock);
        slot = slots.take(key, false);
    }
    ++counters_.misses;
    ++counters_.fetched;
    counters_.bytes_fetched += expert_bytes(block);
    slots.use(slot);
    slots.pin(slot);
    return slot;
}

void Residency::demand(int32_t number, const int32_t * ids, int32_t n, int32_t * out) {
    const ExpertBlock & block = block_at(number);
    std::vector<int32_t> slot_of(static_cast<size_t>(table_.n_expert), SlotPool::none);
    std::vector<int32_t> missing;

    Lock lock(mutex_);
    begin_block(number);
    SlotPool & slots = pool(block);
    const auto started = std::chrono::steady_clock::now();
    const uint64_t misses_before = counters_.misses;

    // residents first: pinned, they cannot become victims of this block's own misses
    for (int32_t i = 0; i < n; ++i) {
        if (ids[i] < 0 || ids[i] >= table_.n_expert) {
            throw Error(EDGE_ERR_INTERNAL, "router of block " + std::to_string(number) + " chose expert " +
                                               std::to_string(ids[i]) + " of " + std::to_string(table_.n_expert));
        }
        int32_t & slot = slot_of[static_cast<size_t>(ids[i])];
        if (slot != SlotPool::none) {
            continue;
        }
        slot = slots.find(block.first_key + ids[i]);
        if (slot != SlotPool::none) {
            hit(block, slot);
        } else if (std::find(missing.begin(), missing.end(), ids[i]) == missing.end()) {
            missing.push_back(ids[i]);
        }
    }
    for (const int32_t expert : missing) {
        // another thread may have begun to load it while take_for_demand waited
        int32_t & slot = slot_of[static_cast<size_t>(expert)];
        slot = slots.find(block.first_key + expert);
        if (slot != SlotPool::none) {
            hit(block, slot);
            continue;
        }
        slot = take_for_demand(lock, block, block.first_key + expert);
        lock.unlock();
        store_.load(block, expert, slot);
        lock.lock();
        slots.loaded(slot);
    }
    loaded_.wait(lock, [&] {
        return std::all_of(slot_of.begin(), slot_of.end(), [&](int32_t s) { return s == SlotPool::none || !slots.loading(s); });
    });
    if (counters_.misses != misses_before) {
        const auto waited = std::chrono::steady_clock::now() - started;
        counters_.stall_ns += static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count());
    }
    for (int32_t i = 0; i < n; ++i) {
        out[i] = slot_of[static_cast<size_t>(ids[i])];
    }
}

void Residency::end_step() {
    const Lock lock(mutex_);
    for (SlotPool & pool : pools_) {
        pool.unpin_all();
    }
    last_block_ = -1;
}

int32_t Residency::prefetch(const int32_t * pairs, int32_t n_pairs) {
    int32_t n_ordered = 0;
    {
        const Lock lock(mutex_);
        orders_.clear();
        for (SlotPool & pool : pools_) {
            pool.forget_expected();
        }
        for (int32_t i = 0; i < n_pairs; ++i) {
            const Order order{ pairs[2 * i], pairs[2 * i + 1] };
            const ExpertBlock & block = block_at(order.block);
            const int32_t slot = pool(block).find(block.first_key + order.expert);
            if (slot != SlotPool::none) {
                pool(block).expect(slot);
            } else {
                orders_.push_back(order);
                ++n_ordered;
            }
        }
    }
    ordered_.notify_one();
    loaded_.notify_all();
    return n_ordered;
}

void Residency::work() {
    Lock lock(mutex_);
    while (true) {
        ordered_.wait(lock, [this] { return stop_ || !orders_.empty(); });
        if (stop_) {
            return;
        }
        const Order order = orders_.front();
        orders_.pop_front();
        const ExpertBlock & block = block_at(order.block);
        const int32_t key = block.first_key + order.expert;
        SlotPool & slots = pool(block);
        const int32_t slot = slots.find(key) == SlotPool::none ? slots.take(key, true) : SlotPool::none;
        if (slot != SlotPool::none) {
            ++counters_.prefetched;
            counters_.bytes_fetched += expert_bytes(block);
            prefetched_bytes_ += expert_bytes(block);
            working_ = true;
            lock.unlock();
            store_.load(block, order.expert, slot);
            lock.lock();
            working_ = false;
            slots.loaded(slot);
        }
        loaded_.notify_all();
    }
}

void Residency::drain() {
    Lock lock(mutex_);
    loaded_.wait(lock, [this] { return orders_.empty() && !working_; });
}

edge_counters Residency::counters() const {
    const Lock lock(mutex_);
    edge_counters out = counters_;
    out.bytes_wasted = prefetched_bytes_ - prefetched_used_bytes_;
    return out;
}

void Residency::states(uint8_t * out) const {
    const Lock lock(mutex_);
    for (const ExpertBlock & block : table_.blocks) {
        const SlotPool & slots = pools_[static_cast<size_t>(block.group)];
        for (int32_t expert = 0; expert < table_.n_expert; ++expert) {
            *out++ = static_cast<uint8_t>(slots.state(block.first_key + expert));
        }
    }
}

void Residency::poison_free_slots() {
    const Lock lock(mutex_);
    for (size_t g = 0; g < pools_.size(); ++g) {
        for (int32_t slot = 0; slot < pools_[g].n_slots(); ++slot) {
            if (pools_[g].key_of(slot) == SlotPool::none) {
                store_.fill(static_cast<int32_t>(g), slot, 0xFF); // NaN as f32, f16, bf16 and as a block's scale
            }
        }
    }
}

} // namespace edge
