// SlotCache on the CPU backend: after demand() a slot holds the demanded expert, whatever the worker thread prefetches
// meanwhile. Run under TSan as well as ASan and UBSan.
#include "check.h"
#include "slots/slot_cache.h"
#include "util/error.h"
#include "util/faults.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int32_t n_blocks = 4;
constexpr int32_t n_expert = 16;
constexpr int32_t rows = 64;

// Every weight of an expert is block * 1000 + expert, so that a slot's content tells its expert.
struct Model {
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buffer;
    edge::ExpertTable table;

    Model() {
        ggml_init_params params{};
        params.mem_size = ggml_tensor_overhead() * 3 * n_blocks;
        params.no_alloc = true;
        ctx.reset(ggml_init(params));
        std::vector<edge::BlockWeights> blocks(n_blocks);
        for (edge::BlockWeights & weights : blocks) {
            for (const edge::Role role : { edge::role_up, edge::role_gate, edge::role_down }) {
                weights[role] = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, rows, rows, n_expert);
            }
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()));
        table.n_expert = n_expert;
        table.n_expert_used = 4;
        for (int32_t b = 0; b < n_blocks; ++b) {
            for (const ggml_tensor * weight : blocks[static_cast<size_t>(b)]) {
                for (int32_t e = 0; weight && e < n_expert; ++e) {
                    float * data = reinterpret_cast<float *>(static_cast<char *>(weight->data) +
                                                             weight->nb[2] * static_cast<size_t>(e));
                    std::fill_n(data, rows * rows, static_cast<float>(b * 1000 + e));
                }
            }
            table.add(blocks[static_cast<size_t>(b)]);
        }
        CHECK(table.groups.size() == 1 && table.blocks.size() == n_blocks);
        table.require_host_weights();
    }
};

void check_slot(const edge::SlotCache & slot_cache, int32_t block, int32_t expert, int32_t slot) {
    for (const edge::Role role : { edge::role_up, edge::role_gate, edge::role_down }) {
        const ggml_tensor * tensor = slot_cache.store().tensor(0, role);
        const float * data = reinterpret_cast<const float *>(static_cast<const char *>(tensor->data) +
                                                             tensor->nb[2] * static_cast<size_t>(slot));
        const float expected = static_cast<float>(block * 1000 + expert);
        CHECK(data[0] == expected && data[rows * rows / 2] == expected && data[rows * rows - 1] == expected);
    }
}

void demand(edge::SlotCache & slot_cache, int32_t block, const std::vector<int32_t> & ids) {
    std::vector<int32_t> slots(ids.size());
    slot_cache.demand(block, ids.data(), static_cast<int32_t>(ids.size()), slots.data());
    for (size_t i = 0; i < ids.size(); ++i) {
        check_slot(slot_cache, block, ids[i], slots[i]);
    }
}

constexpr uint64_t no_budget = UINT64_MAX;

// Request (block, expert) pairs, each due at its block.
int32_t prefetch(edge::SlotCache & slot_cache, const std::vector<std::pair<int32_t, int32_t>> & pairs,
                 uint64_t budget = no_budget) {
    std::vector<edge_prefetch_request> requests;
    for (const auto & [block, expert] : pairs) {
        requests.push_back({ block, expert, block, 1.0F });
    }
    return slot_cache.prefetch(requests.data(), static_cast<int32_t>(requests.size()), budget);
}

edge::SlotState state(const edge::SlotCache & slot_cache, int32_t block, int32_t expert) {
    std::vector<uint8_t> states(n_blocks * n_expert);
    slot_cache.states(states.data());
    return static_cast<edge::SlotState>(states[static_cast<size_t>(block * n_expert + expert)]);
}

void counters_follow_the_glossary(const Model & model) {
    edge::SlotCache slot_cache(model.table, { 9 }, ggml_backend_cpu_buffer_type(), {});
    demand(slot_cache, 0, { 1, 2, 1, 3 }); // three distinct demands
    demand(slot_cache, 1, { 1 });
    demand(slot_cache, 0, { 3, 4 }); // block 0 again: the second step
    CHECK(prefetch(slot_cache, { { 2, 5 }, { 2, 6 }, { 0, 4 } }) == 2); // (0, 4) is resident
    slot_cache.drain();
    demand(slot_cache, 2, { 5 });
    const edge_counters c = slot_cache.counters();
    const uint64_t bytes = model.table.groups[0].expert_bytes;
    CHECK(c.steps == 2 && c.hits == 2 && c.misses == 5 && c.late == 0 && c.fetched == 5);
    CHECK(c.prefetched == 2 && c.prefetched_used == 1);
    CHECK(c.bytes_fetched == 7 * bytes && c.bytes_wasted == bytes);
}

void a_router_out_of_range_is_an_error(const Model & model) {
    edge::SlotCache slot_cache(model.table, { 9 }, ggml_backend_cpu_buffer_type(), {});
    const int32_t ids[] = { 1, n_expert };
    int32_t slots[2];
    bool thrown = false;
    try {
        slot_cache.demand(0, ids, 2, slots);
    } catch (const std::runtime_error &) {
        thrown = true;
    }
    CHECK(thrown);
    demand(slot_cache, 0, { 1, 2 }); // the next step works
}

// Demands of every block in order, while another thread keeps changing its requests.
void demands_hold_against_prefetches(const Model & model, int32_t n_slots) {
    edge::SlotCache slot_cache(model.table, { n_slots }, ggml_backend_cpu_buffer_type(), {});
    std::atomic<bool> done{ false };
    std::thread foresight([&] {
        std::mt19937 random(1);
        std::vector<uint8_t> states(n_blocks * n_expert);
        while (!done) {
            std::vector<std::pair<int32_t, int32_t>> pairs;
            for (int i = 0; i < 12; ++i) {
                pairs.emplace_back(random() % n_blocks, random() % n_expert);
            }
            prefetch(slot_cache, pairs);
            slot_cache.states(states.data());
            slot_cache.counters();
        }
    });
    std::thread drain([&] {
        while (!done) {
            slot_cache.drain();
        }
    });
    std::mt19937 random(2);
    for (int step = 0; step < 300; ++step) {
        for (int32_t block = 0; block < n_blocks; ++block) {
            std::vector<int32_t> ids(8);
            for (int32_t & id : ids) {
                id = static_cast<int32_t>(random() % n_expert);
            }
            demand(slot_cache, block, ids);
        }
        slot_cache.end_step();
    }
    done = true;
    foresight.join();
    drain.join();
    slot_cache.drain();
    const edge_counters c = slot_cache.counters();
    CHECK(c.misses == c.fetched && c.late <= c.fetched && c.steps == 300);
    CHECK(c.bytes_fetched == (c.fetched - c.late + c.prefetched) * model.table.groups[0].expert_bytes);
    CHECK(c.prefetched_used <= c.prefetched);
}

void requests_respect_budget_deadline_and_score(const Model & model) {
    const uint64_t bytes = model.table.groups[0].expert_bytes;
    edge::SlotCache slot_cache(model.table, { 9 }, ggml_backend_cpu_buffer_type(), {});
    prefetch(slot_cache, { { 3, 1 }, { 3, 2 }, { 3, 3 } }, 2 * bytes);
    slot_cache.drain();
    CHECK(state(slot_cache, 3, 2) == edge::SlotState::resident && state(slot_cache, 3, 3) == edge::SlotState::absent);

    for (int32_t e = 0; e < 9; ++e) { // nine experts of score 1 fill the slots
        slot_cache.scores()[e] = 1.0F;
    }
    slot_cache.scores()[0] = std::numeric_limits<float>::quiet_NaN(); // counts as 0
    slot_cache.prefetch(nullptr, 0, no_budget);
    demand(slot_cache, 0, { 0, 1, 2, 3, 4, 5, 6, 7 });
    demand(slot_cache, 1, { 8 });
    slot_cache.end_step();
    slot_cache.scores()[n_expert + 8] = 1.0F;
    const edge_prefetch_request poor{ 2, 1, 2, 0.5F };
    slot_cache.prefetch(&poor, 1, no_budget);
    slot_cache.drain();
    CHECK(state(slot_cache, 2, 1) == edge::SlotState::resident && state(slot_cache, 0, 0) == edge::SlotState::absent);
    slot_cache.scores()[2 * n_expert + 1] = 1.0F;
    const edge_prefetch_request poorer{ 2, 2, 2, 0.75F };
    slot_cache.prefetch(&poorer, 1, no_budget);
    slot_cache.drain();
    CHECK(state(slot_cache, 2, 2) == edge::SlotState::absent);
}

// On a virtual link that copies one expert in the time of two blocks, everything is known beforehand.
void virtual_time_repeats(const Model & model) {
    const uint64_t bytes = model.table.groups[0].expert_bytes;
    constexpr uint64_t block_ns = 500;
    edge::TransferParams params;
    params.deterministic = true;
    params.block_ns = block_ns;
    params.link_bytes_per_s = 1000000000 * bytes / (2 * block_ns);
    edge::SlotCache slot_cache(model.table, { 9 }, ggml_backend_cpu_buffer_type(), params);
    CHECK(prefetch(slot_cache, { { 2, 1 }, { 3, 1 }, { 3, 2 } }) == 3);
    CHECK(state(slot_cache, 2, 1) == edge::SlotState::loading && state(slot_cache, 3, 1) == edge::SlotState::absent);
    demand(slot_cache, 0, { 5 }); // at 1: waits for the one in flight, then for its own
    CHECK(slot_cache.counters().stall_ns == 3 * block_ns); // from 1 to 4 blocks
    CHECK(state(slot_cache, 2, 1) == edge::SlotState::resident);
    demand(slot_cache, 2, { 1 }); // at 5: hit; (3, 1) began at 4
    demand(slot_cache, 3, { 1, 2 }); // at 6: hit, and (3, 2) is late
    const edge_counters c = slot_cache.counters();
    CHECK(c.hits == 2 && c.misses == 2 && c.late == 1 && c.prefetched == 3 && c.prefetched_used == 3 &&
          c.bytes_wasted == 0);
    slot_cache.end_step();
    prefetch(slot_cache, { { 0, 9 }, { 1, 9 }, { 1, 10 } });
    slot_cache.drain();
    CHECK(state(slot_cache, 1, 10) == edge::SlotState::resident);
}

void an_emulated_link_is_as_slow_as_asked(const Model & model) {
    edge::TransferParams params;
    params.link_bytes_per_s = 50000000;
    edge::SlotCache slot_cache(model.table, { 9 }, ggml_backend_cpu_buffer_type(), params);
    const double seconds = 8.0 * static_cast<double>(model.table.groups[0].expert_bytes) / 5e7;
    const auto started = std::chrono::steady_clock::now();
    prefetch(slot_cache, { { 3, 1 }, { 3, 2 }, { 3, 3 }, { 3, 4 } });
    slot_cache.drain();
    demand(slot_cache, 0, { 1, 2, 3, 4 });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
    CHECK(took.count() >= 0.99 * seconds);
    CHECK(static_cast<double>(slot_cache.counters().stall_ns) >= 0.49e9 * seconds);
}

void resizing_keeps_the_highest_scores(const Model & model) {
    edge::SlotCache slot_cache(model.table, { 12 }, ggml_backend_cpu_buffer_type(), {});
    for (int32_t block = 0; block < 3; ++block) {
        demand(slot_cache, block, { 1, 2, 3, 4 });
    }
    slot_cache.end_step();
    slot_cache.scores()[1] = 5.0F; // the oldest
    slot_cache.prefetch(nullptr, 0, no_budget);
    const uint64_t before = slot_cache.bytes();
    slot_cache.resize({ 6 });
    CHECK(slot_cache.bytes() == before / 2);
    CHECK(state(slot_cache, 0, 1) == edge::SlotState::resident && state(slot_cache, 0, 2) == edge::SlotState::absent);
    CHECK(state(slot_cache, 2, 4) == edge::SlotState::resident && state(slot_cache, 1, 4) == edge::SlotState::resident);
    const uint64_t misses = slot_cache.counters().misses;
    demand(slot_cache, 2, { 1, 2, 3, 4 }); // the slots hold what their states say
    demand(slot_cache, 0, { 1 });
    CHECK(slot_cache.counters().misses == misses);
    slot_cache.end_step();
    slot_cache.resize({ 40 });
    demand(slot_cache, 0, { 1, 5, 6, 7, 8, 9, 10, 11 });
}

// Copies overlap with the caller. A slot holds its expert, the rest is the CPU's; every miss is counted once.
void hybrid_demands_are_served(const Model & model, int32_t n_slots) {
    edge::TransferParams params;
    params.splits_always = true;
    edge::SlotCache slot_cache(model.table, { n_slots }, ggml_backend_cpu_buffer_type(), params);
    std::atomic<bool> done{ false };
    std::thread foresight([&] {
        std::mt19937 random(1);
        while (!done) {
            prefetch(slot_cache,
                     { { static_cast<int32_t>(random() % n_blocks), static_cast<int32_t>(random() % n_expert) } });
            slot_cache.counters();
        }
    });
    std::mt19937 random(2);
    uint64_t demands = 0, left = 0;
    for (int step = 0; step < 400; ++step) {
        for (int32_t block = 0; block < n_blocks; ++block) {
            std::vector<int32_t> ids(6);
            std::vector<int32_t> slots(ids.size());
            for (int32_t & id : ids) {
                id = static_cast<int32_t>(random() % n_expert);
            }
            const auto demanded = random() % 4 == 0 ? &edge::SlotCache::demand : &edge::SlotCache::demand_hybrid;
            (slot_cache.*demanded)(block, ids.data(), static_cast<int32_t>(ids.size()), slots.data());
            const bool awaited = random() % 2 == 0; // or the next block completes them
            if (awaited) {
                slot_cache.await_fetches();
            }
            std::vector<int32_t> seen;
            for (size_t i = 0; i < ids.size(); ++i) {
                if (slots[i] != edge::SlotPool::none && awaited) {
                    check_slot(slot_cache, block, ids[i], slots[i]);
                }
                if (std::find(seen.begin(), seen.end(), ids[i]) == seen.end()) {
                    seen.push_back(ids[i]);
                    left += slots[i] == edge::SlotPool::none ? 1 : 0;
                }
            }
            demands += seen.size();
        }
        slot_cache.end_step();
    }
    done = true;
    foresight.join();
    slot_cache.drain();
    const edge_counters c = slot_cache.counters();
    CHECK(c.hits + c.misses == demands && c.cpu_computed == left && c.misses == c.cpu_computed + c.fetched);
    CHECK(c.fetched > 0 && c.cpu_computed > 0); // a late one is awaited: the link is the faster side here
    // Late ones may be awaited, or computed on the CPU
    const uint64_t moved = c.bytes_fetched / model.table.groups[0].expert_bytes;
    CHECK(moved <= c.fetched + c.prefetched && moved + c.late >= c.fetched + c.prefetched);
}

// A copy of demand_hybrid() fails: nothing counts as resident that has not arrived.
void failed_fetches_are_survived(const Model & model) {
    edge::TransferParams params;
    params.splits_always = true;
    edge::SlotCache slot_cache(model.table, { 9 }, ggml_backend_cpu_buffer_type(), params);
    const int32_t ids[] = { 1, 2, 3 };
    int32_t slots[3];
    int failed = 0;
    for (int32_t i = 0; i < 40; ++i) {
        edge::arm_fault(edge::Fault::copy, 5);
        try {
            slot_cache.demand_hybrid(i % n_blocks, ids, 3, slots);
        } catch (const edge::Error & error) {
            CHECK(error.status == EDGE_ERR_BACKEND);
            CHECK(state(slot_cache, i % n_blocks, 2) == edge::SlotState::absent);
            ++failed;
        }
        edge::arm_fault(edge::Fault::copy, 0);
        slot_cache.end_step();
    }
    CHECK(failed > 0 && slot_cache.counters().failed == static_cast<uint64_t>(failed));
    demand(slot_cache, 0, { 1, 2, 3, 4 });
}

// The nth copy fails: demand() throws, nothing counts as resident that has not arrived, and the next step works.
void failed_copies_are_survived(const Model & model) {
    edge::SlotCache slot_cache(model.table, { 9 }, ggml_backend_cpu_buffer_type(), {});
    for (int64_t nth = 1; nth <= 12; ++nth) {
        edge::arm_fault(edge::Fault::copy, nth);
        const auto first = static_cast<int32_t>(nth);
        int32_t slots[4];
        const int32_t ids[] = { first, (first + 1) % n_expert, (first + 2) % n_expert, (first + 3) % n_expert };
        for (int32_t block = 0; block < n_blocks; ++block) {
            try {
                slot_cache.demand(block, ids, 4, slots);
            } catch (const edge::Error & error) {
                CHECK(error.status == EDGE_ERR_BACKEND);
                break;
            }
        }
        edge::arm_fault(edge::Fault::copy, 0);
        slot_cache.end_step();
        demand(slot_cache, 0, { ids[0], ids[1], ids[2], ids[3] });
        slot_cache.end_step();
    }
    const uint64_t failed = slot_cache.counters().failed;
    CHECK(failed > 0);
    edge::arm_fault(edge::Fault::copy, 2); // of a prefetch: dropped, and fetched when demanded
    prefetch(slot_cache, { { 3, 12 }, { 3, 13 } });
    slot_cache.drain();
    CHECK(slot_cache.counters().failed == failed + 1);
    CHECK(state(slot_cache, 3, 12) == edge::SlotState::absent && state(slot_cache, 3, 13) == edge::SlotState::resident);
    demand(slot_cache, 3, { 12, 13 });
}

void failed_allocations_are_survived(const Model & model) {
    edge::arm_fault(edge::Fault::allocation, 1);
    bool thrown = false;
    try {
        const edge::SlotCache slot_cache(model.table, { 9 }, ggml_backend_cpu_buffer_type(), {});
    } catch (const edge::Error & error) {
        thrown = error.status == EDGE_ERR_MEMORY;
    }
    CHECK(thrown);
    edge::SlotCache slot_cache(model.table, { 12 }, ggml_backend_cpu_buffer_type(), {});
    demand(slot_cache, 0, { 1, 2, 3 });
    slot_cache.end_step();
    edge::arm_fault(edge::Fault::allocation, 1);
    thrown = false;
    try {
        slot_cache.resize({ 9 });
    } catch (const edge::Error & error) {
        thrown = error.status == EDGE_ERR_MEMORY;
    }
    CHECK(thrown && !slot_cache.has_slots() && slot_cache.bytes() == 0);
    CHECK(prefetch(slot_cache, { { 1, 1 } }) == 0 && state(slot_cache, 0, 1) == edge::SlotState::absent);
    slot_cache.resize({ 9 });
    CHECK(slot_cache.has_slots());
    demand(slot_cache, 0, { 1, 2, 3 });
}

void copy_matrix(edge::SlotCache & slot_cache, const Model & model, int32_t block,
                 const edge::SlotCache::Admission & admission, edge::Role role) {
    const ggml_tensor * weight = model.table.blocks[static_cast<size_t>(block)].weights[role];
    ggml_tensor * slots = slot_cache.store().tensor(0, role);
    const size_t bytes = weight->nb[2];
    std::memcpy(static_cast<char *>(slots->data) + bytes * static_cast<size_t>(admission.slot),
                static_cast<const char *>(weight->data) + bytes * static_cast<size_t>(admission.admitted), bytes);
}

// Experts 0 to 3 are resident, and prefill uses 3, 6, 9 and, rarely, 5.
void prefill_admits_what_it_uses_most(const Model & model) {
    edge::SlotCache slot_cache(model.table, { 12 }, ggml_backend_cpu_buffer_type(), {});
    demand(slot_cache, 1, { 0, 1, 2, 3 });
    slot_cache.end_step();
    std::vector<float> wanted(n_expert, 0.0F);
    wanted[3] = 4, wanted[6] = 3, wanted[9] = 2, wanted[5] = 1;
    for (const bool whole : { false, true }) {
        CHECK(slot_cache.pin_resident(1, 0) != edge::SlotPool::none);
        const auto admissions = slot_cache.begin_admission(1, wanted.data());
        CHECK(admissions.size() == 2 && admissions[0].admitted == 6 && admissions[1].admitted == 9);
        CHECK(std::none_of(admissions.begin(), admissions.end(),
                           [](const auto & admission) { return admission.evicted == 3; }));
        for (const edge::Role role : { edge::role_up, edge::role_gate, edge::role_down }) {
            CHECK(slot_cache.pin_resident(1, admissions[0].evicted) == admissions[0].slot); // until the last matrix
            // Each matrix is sent there before it is copied from there
            CHECK(slot_cache.pin_resident(1, 6) == admissions[0].slot);
            for (const auto & admission : admissions) {
                copy_matrix(slot_cache, model, 1, admission, role);
            }
            if (!whole) {
                break;
            }
        }
        if (whole) {
            slot_cache.end_admission();
            CHECK(slot_cache.pin_resident(1, 6) == admissions[0].slot &&
                  slot_cache.pin_resident(1, admissions[0].evicted) == edge::SlotPool::none);
        }
        slot_cache.end_step();
        for (const auto & admission : admissions) {
            CHECK(state(slot_cache, 1, admission.evicted) == edge::SlotState::absent);
            CHECK(state(slot_cache, 1, admission.admitted) ==
                  (whole ? edge::SlotState::resident : edge::SlotState::absent));
        }
        CHECK(state(slot_cache, 1, 3) == edge::SlotState::resident);
        if (!whole) {
            demand(slot_cache, 1, { 0, 1, 2, 3 }); // as before
            slot_cache.end_step();
        }
    }
    const uint64_t misses = slot_cache.counters().misses;
    demand(slot_cache, 1, { 3, 6, 9 });
    CHECK(slot_cache.counters().misses == misses);
    slot_cache.end_step();
    wanted.assign(n_expert, 0.0F);
    CHECK(slot_cache.begin_admission(1, wanted.data()).empty()); // nothing is used more than anything else
    slot_cache.end_admission();
    slot_cache.end_step();
}

} // namespace

int main() {
    const Model model;
    requests_respect_budget_deadline_and_score(model);
    virtual_time_repeats(model);
    an_emulated_link_is_as_slow_as_asked(model);
    resizing_keeps_the_highest_scores(model);
    failed_copies_are_survived(model);
    failed_allocations_are_survived(model);
    failed_fetches_are_survived(model);
    hybrid_demands_are_served(model, 9);
    hybrid_demands_are_served(model, 2 * n_expert);
    counters_follow_the_glossary(model);
    prefill_admits_what_it_uses_most(model);
    a_router_out_of_range_is_an_error(model);
    demands_hold_against_prefetches(model, 9); // the floor: 8 of a graph and one to load into
    demands_hold_against_prefetches(model, n_blocks * n_expert);
    std::puts("slot_cache: ok");
}
