// A SlotCache in the middle of a text, for tests of single events.
#pragma once

#include "check.h"
#include "fake_device.h"
#include "labelled_model.h"
#include "prefetch/router_predictor.h"
#include "slots/slot_cache.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace labelled {

using Experts = std::vector<int32_t>;

inline edge::TransferParams over_link(uint64_t bytes_per_s) {
    edge::TransferParams params;
    params.link_bytes_per_s = bytes_per_s;
    return params;
}

// Its link copies an expert in 20 us unless told otherwise, its measured blocks are 300 us apart, and it holds experts
// 0 to 3 of the first two blocks: much can be prefetched.
struct Warm {
    edge::SlotCache slot_cache;

    Warm(fake::Device & device, const Model & model, int32_t n_slots, uint64_t link_bytes_per_s = 1000000000)
        : slot_cache(model.table, { n_slots, n_expert }, device.memory(), over_link(link_bytes_per_s)) {
        slot_cache.use_router_predictor(std::make_unique<edge::RouterPredictor>(nullptr, model.table));
        for (int i = 0; i < 30; ++i) {
            demand(0, { 0, 1, 2, 3 });
            fake::pass(300);
            demand(1, { 0, 1, 2, 3 });
            slot_cache.end_step();
        }
    }

    void demand(int32_t block, const Experts & ids) {
        std::vector<int32_t> slots(ids.size());
        slot_cache.demand(block, ids.data(), static_cast<int32_t>(ids.size()), slots.data());
        slot_cache.await_fetches();
        for (size_t i = 0; i < ids.size(); ++i) {
            CHECK(is_right(slot_cache.store(), { block, 0, ids[i], slots[i] }));
        }
    }

    // For block 1.
    void predict(const std::vector<float> & predictions) {
        slot_cache.prefetch_next_layer(1, predictions.data(), static_cast<int32_t>(predictions.size()));
    }

    // A request of another thread; on return its copies are in flight.
    void begin_prefetch(int32_t block, int32_t expert) {
        const edge_prefetch_request request{ block, expert, n_blocks, 1.0F };
        slot_cache.prefetch(&request, 1, UINT64_MAX);
        while (!holds(block, { expert })) {
            std::this_thread::yield();
        }
    }

    // resident or in flight
    bool holds(int32_t block, const Experts & experts) const {
        std::vector<uint8_t> states(n_blocks * n_expert);
        slot_cache.states(states.data());
        return std::all_of(experts.begin(), experts.end(), [&](int32_t expert) {
            return states[static_cast<size_t>(block * n_expert + expert)] !=
                   static_cast<uint8_t>(edge::SlotState::absent);
        });
    }
};

} // namespace labelled
