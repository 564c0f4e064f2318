// Residency on the CPU backend: what lies in a slot after demand() is the expert that was asked for, whatever
// the worker thread prefetches meanwhile. Run under TSan as well as ASan and UBSan.
#include "check.h"
#include "residency.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <atomic>
#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

constexpr int32_t n_blocks = 4;
constexpr int32_t n_expert = 16;
constexpr int32_t rows     = 64;

// Experts whose every weight is block * 1000 + expert, so that a slot tells what it holds.
struct Model {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    edge::ExpertTable       table;

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
        table.n_expert      = n_expert;
        table.n_expert_used = 4;
        for (int32_t b = 0; b < n_blocks; ++b) {
            for (const ggml_tensor * weight : blocks[static_cast<size_t>(b)]) {
                for (int32_t e = 0; weight && e < n_expert; ++e) {
                    float * data = reinterpret_cast<float *>(static_cast<char *>(weight->data) + weight->nb[2] * static_cast<size_t>(e));
                    std::fill_n(data, rows * rows, static_cast<float>(b * 1000 + e));
                }
            }
            table.add(blocks[static_cast<size_t>(b)]);
        }
        CHECK(table.groups.size() == 1 && table.blocks.size() == n_blocks);
        table.require_host_weights();
    }
};

void check_slot(const edge::Residency & residency, int32_t block, int32_t expert, int32_t slot) {
    for (const edge::Role role : { edge::role_up, edge::role_gate, edge::role_down }) {
        const ggml_tensor * tensor = residency.store().tensor(0, role);
        const float * data = reinterpret_cast<const float *>(static_cast<const char *>(tensor->data) + tensor->nb[2] * static_cast<size_t>(slot));
        const float expected = static_cast<float>(block * 1000 + expert);
        CHECK(data[0] == expected && data[rows * rows / 2] == expected && data[rows * rows - 1] == expected);
    }
}

void demand(edge::Residency & residency, int32_t block, const std::vector<int32_t> & ids) {
    std::vector<int32_t> slots(ids.size());
    residency.demand(block, ids.data(), static_cast<int32_t>(ids.size()), slots.data());
    for (size_t i = 0; i < ids.size(); ++i) {
        check_slot(residency, block, ids[i], slots[i]);
    }
}

void counters_follow_the_glossary(const Model & model) {
    edge::Residency residency(model.table, { 9 }, ggml_backend_cpu_buffer_type());
    demand(residency, 0, { 1, 2, 1, 3 }); // three distinct demands
    demand(residency, 1, { 1 });
    demand(residency, 0, { 3, 4 });       // block 0 again: the second step
    const std::vector<int32_t> pairs{ 2, 5, 2, 6, 0, 4 };
    CHECK(residency.prefetch(pairs.data(), 3) == 2); // (0, 4) is there already
    residency.drain();
    demand(residency, 2, { 5 });
    const edge_counters c = residency.counters();
    const uint64_t bytes = model.table.groups[0].expert_bytes;
    CHECK(c.steps == 2 && c.hits == 2 && c.misses == 5 && c.late == 0 && c.fetched == 5);
    CHECK(c.prefetched == 2 && c.prefetched_used == 1);
    CHECK(c.bytes_fetched == 7 * bytes && c.bytes_wasted == bytes);
}

void a_router_out_of_range_is_an_error(const Model & model) {
    edge::Residency residency(model.table, { 9 }, ggml_backend_cpu_buffer_type());
    const int32_t ids[] = { 1, n_expert };
    int32_t slots[2];
    bool thrown = false;
    try {
        residency.demand(0, ids, 2, slots);
    } catch (const std::runtime_error &) {
        thrown = true;
    }
    CHECK(thrown);
    demand(residency, 0, { 1, 2 }); // and the next request works
}

// Demands of every block in order, while another thread keeps changing its mind about what to prefetch.
void demands_hold_against_prefetches(const Model & model, int32_t n_slots) {
    edge::Residency residency(model.table, { n_slots }, ggml_backend_cpu_buffer_type());
    std::atomic<bool> done{ false };
    std::thread foresight([&] {
        std::mt19937 random(1);
        std::vector<uint8_t> states(n_blocks * n_expert);
        while (!done) {
            std::vector<int32_t> pairs;
            for (int i = 0; i < 12; ++i) {
                pairs.push_back(static_cast<int32_t>(random() % n_blocks));
                pairs.push_back(static_cast<int32_t>(random() % n_expert));
            }
            residency.prefetch(pairs.data(), 12);
            residency.states(states.data());
            residency.counters();
        }
    });
    std::thread drain([&] {
        while (!done) {
            residency.drain();
        }
    });
    std::mt19937 random(2);
    for (int step = 0; step < 300; ++step) {
        for (int32_t block = 0; block < n_blocks; ++block) {
            std::vector<int32_t> ids(8);
            for (int32_t & id : ids) {
                id = static_cast<int32_t>(random() % n_expert);
            }
            demand(residency, block, ids);
        }
        residency.end_step();
    }
    done = true;
    foresight.join();
    drain.join();
    residency.drain();
    const edge_counters c = residency.counters();
    CHECK(c.misses == c.fetched && c.late <= c.fetched && c.steps == 300);
    CHECK(c.bytes_fetched == (c.fetched - c.late + c.prefetched) * model.table.groups[0].expert_bytes);
    CHECK(c.prefetched_used <= c.prefetched);
}

} // namespace

int main() {
    const Model model;
    counters_follow_the_glossary(model);
    a_router_out_of_range_is_an_error(model);
    demands_hold_against_prefetches(model, 9); // the floor: 8 of a graph and one to load into
    demands_hold_against_prefetches(model, n_blocks * n_expert);
    std::puts("residency: ok");
}
