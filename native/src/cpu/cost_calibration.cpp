// Measures what an expert costs on either side before the first block, so that this is split by the machine's own
// costs.
#include "cpu/cpu_experts.h"
#include "slots/slot_cache.h"
#include "util/stopwatch.h"

#include <algorithm>

namespace edge {

// Experts in turn: one that was just computed would be in the CPU's caches, unlike a step's.
void SlotCache::calibrate_costs(CpuExperts & cpu) {
    const ExpertBlock & block = table_.blocks.front();
    if (!fetches_some() || !cpu.knows(block)) {
        return;
    }
    constexpr size_t most_fetched = 4;
    int32_t next = 0;
    const auto expert = [&] { return next++ % table_.n_expert; };
    const auto send = [&](size_t n) { // into a slot that holds nothing yet
        for (size_t i = 0; i < n; ++i) {
            store_->send(demand_link_, block, expert(), 0, 1);
        }
    };
    CostCalibration found{};
    found.expert_bytes = expert_bytes(block.group);
    found.link = least_ns([&] {
        send(1);
        demand_link_.wait();
    });
    found.cpu = least_ns([&] { cpu.compute_some(block, expert(), 1); });
    found.cpu_pair = least_ns([&] { cpu.compute_some(block, expert(), 2); }) - found.cpu;
    found.n_fetched = std::min(most_fetched, static_cast<size_t>(found.cpu / found.link) + 1);
    found.cpu_shared = least_ns([&] { cpu.compute_some(block, expert(), 1); },
                                [&] {
                                    demand_link_.wait();
                                    cpu.wake();
                                    send(found.n_fetched);
                                });
    demand_link_.wait();
    found.device_byte = store_->read_ns_per_byte();
    balancer_.calibrate(found);
    const Lock lock(mutex_);
    note_costs();
}

} // namespace edge
