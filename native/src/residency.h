#pragma once

#include "edge_speq.h"
#include "slot_store.h"
#include "slots.h"

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace edge {

// Keeps a bounded set of experts on the compute device: demand loads on the decoding thread, prefetches on
// a worker thread. One mutex guards the pools, the orders and the counters; copies run outside it, into
// slots that are marked loading and so belong to the thread that copies.
class Residency {
public:
    Residency(const ExpertTable & table, const std::vector<int32_t> & slots, ggml_backend_buffer_type_t buft);
    ~Residency();
    Residency(const Residency &) = delete;
    Residency & operator=(const Residency &) = delete;

    // The experts ids[0..n) of this block are about to be read: makes each resident, pins it, and writes
    // its slot to slots[0..n). The device has finished every earlier block.
    void demand(int32_t block, const int32_t * ids, int32_t n, int32_t * slots);
    void end_step();

    int32_t prefetch(const int32_t * pairs, int32_t n_pairs);
    void drain();

    edge_counters counters() const;
    void states(uint8_t * out) const;
    void poison_free_slots();
    uint64_t bytes() const { return store_.bytes(); }
    const SlotStore & store() const { return store_; }

private:
    struct Order {
        int32_t block;
        int32_t expert;
    };
    using Lock = std::unique_lock<std::mutex>;

    SlotPool & pool(const ExpertBlock & block) { return pools_[static_cast<size_t>(block.group)]; }
    const ExpertBlock & block_at(int32_t block) const { return table_.blocks[static_cast<size_t>(block)]; }
    uint64_t expert_bytes(const ExpertBlock & block) const { return table_.groups[static_cast<size_t>(block.group)].expert_bytes; }

    void begin_block(int32_t block);
    void hit(const ExpertBlock & block, int32_t slot);
    int32_t take_for_demand(Lock & lock, const ExpertBlock & block, int32_t key);
    void work();

    const ExpertTable &   table_;
    SlotStore             store_;

    mutable std::mutex      mutex_; // guards all below but the worker itself
    std::condition_variable loaded_;
    std::condition_variable ordered_;
    std::vector<SlotPool>   pools_;
    std::deque<Order>       orders_;
    bool                    working_ = false; // the worker copies right now
    bool                    stop_    = false;
    int32_t                 last_block_ = -1;
    edge_counters           counters_{};
    uint64_t                prefetched_bytes_ = 0;
    uint64_t                prefetched_used_bytes_ = 0;

    std::thread worker_;
};

} // namespace edge
