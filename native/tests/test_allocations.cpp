// What runs in every block of every step allocates nothing after warm-up: demands of both kinds, next-layer copies and
// their waits, prefetch requests, and the CPU's part of the experts. llama.cpp's and ggml's own calls are not tested.
#include "check.h"
#include "cpu/expert_matmul.h"
#include "labelled_model.h"
#include "scripted_predictor.h"
#include "slots/slot_cache.h"

#include "ggml-cpu.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

namespace {

thread_local size_t n_allocations = 0;

} // namespace

__attribute__((noinline)) void * operator new(size_t bytes) { // inlined, the compiler warns about free()
    ++n_allocations;
    if (void * memory = std::malloc(bytes)) {
        return memory;
    }
    throw std::bad_alloc();
}

__attribute__((noinline)) void operator delete(void * memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void * memory, size_t) noexcept { std::free(memory); }

namespace {

using namespace labelled;

constexpr int n_pairs = 12; // of a block: three tokens

// Allocations of n steps over all blocks.
size_t steps(edge::SlotCache & slot_cache, std::mt19937 & random, int n) {
    int32_t ids[n_pairs], slots[n_pairs];
    float rows[4];
    edge_prefetch_request requests[8];
    const size_t before = n_allocations;
    for (int step = 0; step < n; ++step) {
        for (edge_prefetch_request & request : requests) {
            request = { static_cast<int32_t>(random() % n_blocks), static_cast<int32_t>(random() % n_expert), n_blocks,
                        1.0F };
            request.deadline = random() % 2 ? request.block : n_blocks; // of the decoding thread or of the worker
        }
        slot_cache.prefetch(requests, 8, UINT64_MAX);
        for (int32_t block = 0; block < n_blocks; ++block) {
            for (int32_t & id : ids) {
                id = static_cast<int32_t>(random() % n_expert);
            }
            if (random() % 2) {
                slot_cache.demand(block, ids, n_pairs, slots);
            } else {
                slot_cache.demand_hybrid(block, ids, n_pairs, slots);
                slot_cache.computed(block, 1, 1, 1e5);
            }
            if (block + 1 < n_blocks && slot_cache.can_prefetch_next_layer(block + 1)) {
                for (float & row : rows) {
                    row = static_cast<float>(random() % n_expert);
                }
                slot_cache.prefetch_next_layer(block + 1, rows, 4);
            }
            slot_cache.await_fetches();
        }
        slot_cache.end_step();
    }
    return n_allocations - before;
}

void a_block_allocates_nothing() {
    const Model model(ggml_backend_cpu_buffer_type());
    edge::TransferParams params;
    params.splits_always = true;
    edge::SlotCache slot_cache(model.table, { 20, 20 }, ggml_backend_cpu_buffer_type(), params);
    slot_cache.use_router_predictor(std::make_unique<edge::RouterPredictor>(nullptr, model.table));
    std::mt19937 random(3);
    CHECK(steps(slot_cache, random, 1000) > 0); // vectors grow as needed
    // Of 3,000 blocks: one may still grow, when more comes together than ever before
    CHECK(steps(slot_cache, random, 500) < 8);
    const edge_counters counters = slot_cache.counters();
    CHECK(counters.hits > 0 && counters.fetched > 0 && counters.cpu_computed > 0 && counters.prefetched > 0);
}

void computing_allocates_nothing() {
    constexpr int n_in = 256, n_out = 96, n_rows = 5;
    ggml_cpu_init();
    const ggml_context_ptr ctx(ggml_init({ 8 << 20, nullptr, false }));
    ggml_tensor * weights = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_Q8_0, n_in, n_out, n_expert);
    std::memset(weights->data, 1, ggml_nbytes(weights));
    ggml_tensor * rows = ggml_set_f32(ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_in, 1, n_rows), 0.5F);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, n_rows);
    ggml_tensor * node = ggml_mul_mat_id(ctx.get(), weights, rows, ids);
    const int32_t experts[n_rows] = { 3, 0, 3, 15, 7 };
    edge::ExpertMatmul matrices(3);
    for (const bool first : { true, false }) {
        const size_t before = n_allocations;
        for (int job = 0; job < 50; ++job) {
            matrices.begin(experts, n_rows);
            matrices.add(node);
            matrices.run();
        }
        CHECK((n_allocations - before > 0) == first);
    }
}

} // namespace

int main() {
    a_block_allocates_nothing();
    computing_allocates_nothing();
    std::puts("allocations: ok");
    return 0;
}
