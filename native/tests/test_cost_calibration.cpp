// Calibration before the first block, on a device whose copies take as long as the test likes.
#include "check.h"
#include "cpu/cpu_experts.h"
#include "fake_device.h"
#include "labelled_model.h"
#include "slots/slot_cache.h"

#include <algorithm>
#include <cmath>
#include <vector>

using namespace labelled;

namespace {

struct Measured {
    edge::CpuExperts cpu{ nullptr, 2 };
    edge::SlotCache slot_cache;

    Measured(fake::Device & device, const Model & model, const edge::TransferParams & params = {})
        : slot_cache(model.table, { 13, 13 }, device.memory(), params) {
        slot_cache.calibrate_costs(cpu);
    }
};

void the_link_is_measured_and_slots_stay_empty(fake::Device & device, const Model & model) {
    constexpr int copy_us = 500; // of each of three matrices
    device.copy_us = copy_us;
    Measured measured(device, model);
    device.copy_us = 0;
    const edge_costs costs = measured.slot_cache.costs();
    const double expected = static_cast<double>(model.table.groups.front().expert_bytes) / (3e-6 * copy_us);
    CHECK(costs.link_bytes_per_s > 0.5 * expected && costs.link_bytes_per_s < 1.1 * expected);
    CHECK(costs.cpu_bytes_per_s > 0 && costs.device_bytes_per_s > 0 && std::isfinite(costs.contention));
    const edge_counters counters = measured.slot_cache.counters();
    CHECK(counters.fetched == 0 && counters.misses == 0 && counters.bytes_fetched == 0);
    std::vector<uint8_t> states(n_blocks * n_expert);
    measured.slot_cache.states(states.data());
    CHECK(std::all_of(states.begin(), states.end(),
                      [](uint8_t s) { return s == static_cast<uint8_t>(edge::SlotState::absent); }));
}

uint64_t fetched_in_the_first_steps(edge::SlotCache & slot_cache) {
    for (int32_t i = 0; i < 30; ++i) {
        const int32_t ids[] = { i % n_expert, (i + 5) % n_expert };
        int32_t slots[2];
        slot_cache.demand_hybrid(i % n_blocks, ids, 2, slots);
        slot_cache.await_fetches();
    }
    slot_cache.end_step();
    CHECK(slot_cache.counters().misses > 0);
    return slot_cache.counters().fetched;
}

// Without calibration some blocks are all the CPU's and some all the link's, to measure both.
void no_block_teaches_what_was_measured(fake::Device & device, const Model & model) {
    device.copy_us = 3000; // the CPU is done long before
    edge::SlotCache uncalibrated(model.table, { 13, 13 }, device.memory(), {});
    CHECK(fetched_in_the_first_steps(uncalibrated) > 0);
    Measured measured(device, model);
    CHECK(fetched_in_the_first_steps(measured.slot_cache) == 0);
    device.copy_us = 0;
}

void nothing_is_measured_where_nothing_is_fetched(fake::Device & device, const Model & staged, const Model & model) {
    CHECK(Measured(device, staged).slot_cache.costs().link_bytes_per_s == 0);
    edge::TransferParams virtual_time;
    virtual_time.deterministic = true;
    virtual_time.link_bytes_per_s = 1000000000;
    CHECK(Measured(device, model, virtual_time).slot_cache.costs().link_bytes_per_s == 0);
}

void a_link_that_is_emulated_is_known(fake::Device & device, const Model & model) {
    edge::TransferParams params;
    params.link_bytes_per_s = 123456789;
    CHECK(std::abs(Measured(device, model, params).slot_cache.costs().link_bytes_per_s - 123456789) < 1);
}

} // namespace

int main() {
    fake::Device device;
    const Model model(device.page_locked());
    const Model staged(ggml_backend_cpu_buffer_type());
    the_link_is_measured_and_slots_stay_empty(device, model);
    no_block_teaches_what_was_measured(device, model);
    nothing_is_measured_where_nothing_is_fetched(device, staged, model);
    a_link_that_is_emulated_is_known(device, model);
    std::puts("cost_calibration: ok");
}
