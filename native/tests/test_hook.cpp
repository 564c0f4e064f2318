// The hook on a real model, through the C ABI: logits equal those without it, whatever errors, cancels and resizes
// happen in the middle of a text. argv[1]: a MoE GGUF of one slot group or more.
#include "hooked.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

using namespace hooked;

namespace {

void logits_are_those_without_a_hook(llama_model * model, const std::vector<float> & plain) {
    edge_hook * hook = attach(model, slots_of(model, 0));
    OK(edge_hook_poison_free_slots(hook));
    std::atomic<bool> done{ false };
    std::thread foresight([&] { // requests at random meanwhile
        for (int32_t i = 0; !done; ++i) {
            const edge_prefetch_request requests[] = { { i % 4, i % 8, 99, 1.0F }, { (i + 1) % 4, i % 5, 99, 0.5F } };
            int32_t n = 0;
            OK(edge_hook_prefetch(hook, requests, 2, UINT64_MAX, 0.0F, &n, nullptr));
        }
    });
    {
        Run run(model, hook);
        CHECK(run.feed_text(model) == plain);
    }
    done = true;
    foresight.join();
    edge_counters c{};
    OK(edge_hook_counters(hook, &c));
    CHECK(c.hits + c.misses > 0 && c.misses == c.fetched && c.failed == 0);
    OK(edge_hook_detach(hook));
}

// Nothing is fetched on demand: the CPU computes what was not prefetched, to the last bit.
void missing_experts_are_computed_where_they_lie(llama_model * model, const std::vector<float> & plain) {
    edge_hook * hook = attach(model, slots_of(model, 0), true);
    OK(edge_hook_poison_free_slots(hook));
    {
        Run run(model, hook);
        CHECK(run.feed_text(model) == plain);
        edge_counters c{};
        OK(edge_hook_counters(hook, &c));
        CHECK(c.hits == 0 && c.misses > 0 && c.cpu_computed == c.misses && c.fetched == 0);
        std::vector<edge_prefetch_request> requests;
        for (int32_t expert = 0; expert < 20; ++expert) {
            requests.push_back({ expert % 4, expert, 99, 1.0F });
        }
        int32_t n = 0;
        float * scores = nullptr;
        OK(edge_hook_scores(hook, &scores));
        for (const float score :
             { std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(), 0.0F }) {
            bool finite = score != 0.0F;
            scores[5] = score;
            OK(edge_hook_prefetch(hook, nullptr, 0, 0, 0.0F, &n, &finite));
            CHECK(finite == (score == 0.0F));
        }
        OK(edge_hook_prefetch(hook, requests.data(), static_cast<int32_t>(requests.size()), UINT64_MAX, 0.0F, &n,
                              nullptr));
        llama_memory_clear(llama_get_memory(run.ctx), true);
        run.n_past = 0;
        CHECK(run.feed_text(model) == plain); // while they come in
        OK(edge_hook_counters(hook, &c));
        CHECK(c.hits > 0 && c.fetched <= c.late); // the ones in flight
        OK(edge_test_fail(EDGE_FAULT_ROUTING, 2));
        CHECK(run.decode({ 400 }) != 0 && edge_hook_end_step(hook) == EDGE_ERR_BACKEND);
        llama_memory_clear(llama_get_memory(run.ctx), true);
        run.n_past = 0;
        CHECK(run.feed_text(model) == plain);
    }
    OK(edge_hook_detach(hook));
}

// Next-layer prefetch fetches experts; the logits do not change.
void the_next_layer_is_prefetched(llama_model * model, const std::vector<float> & plain) {
    edge_hook * hook = attach(model, slots_of(model, 8), true, true);
    OK(edge_hook_poison_free_slots(hook));
    {
        Run run(model, hook);
        for (int i = 0; i < 4; ++i) {
            CHECK(run.feed_text(model) == plain);
            llama_memory_clear(llama_get_memory(run.ctx), true);
            run.n_past = 0;
        }
    }
    edge_counters c{};
    OK(edge_hook_counters(hook, &c));
    CHECK(c.prefetched > 0 && c.prefetched_used > 0 && c.fetched <= c.late);
    edge_costs costs{};
    OK(edge_hook_costs(hook, &costs));
    CHECK(costs.next_layer_precision > 0.3 && costs.next_layer_precision < 1 && !costs.fetches_some);
    OK(edge_hook_detach(hook));
}

void other_slot_counts_change_nothing(llama_model * model, const std::vector<float> & plain) {
    edge_hook * hook = attach(model, slots_of(model, 4));
    {
        Run run(model, hook);
        CHECK(run.feed_text(model) == plain);
        for (const int32_t extra : { 0, 9, 1 }) {
            const std::vector<int32_t> slots = slots_of(model, extra);
            OK(edge_hook_resize(hook, slots.data(), static_cast<int32_t>(slots.size())));
            llama_memory_clear(llama_get_memory(run.ctx), true);
            run.n_past = 0;
            CHECK(run.feed_text(model) == plain);
        }
        const std::vector<int32_t> few(slots_of(model, 0).size(), 1);
        CHECK(edge_hook_resize(hook, few.data(), static_cast<int32_t>(few.size())) == EDGE_ERR_BUDGET);
        const std::vector<int32_t> slots = slots_of(model, 0);
        OK(edge_test_fail(EDGE_FAULT_ALLOCATION, 1));
        CHECK(edge_hook_resize(hook, slots.data(), static_cast<int32_t>(slots.size())) == EDGE_ERR_MEMORY);
        llama_memory_clear(llama_get_memory(run.ctx), true);
        run.n_past = 0;
        CHECK(run.feed_text(model) == plain); // on the stock path
        OK(edge_hook_resize(hook, slots.data(), static_cast<int32_t>(slots.size())));
        llama_memory_clear(llama_get_memory(run.ctx), true);
        run.n_past = 0;
        CHECK(run.feed_text(model) == plain);
    }
    OK(edge_hook_detach(hook));
}

// Whatever ends a graph, the KV cache is as before it and the text goes on as if nothing had happened.
void a_failed_step_leaves_no_trace(llama_model * model, const std::vector<float> & plain) {
    edge_hook * hook = attach(model, slots_of(model, 0));
    {
        Run run(model, hook);
        for (int64_t nth = 1; nth <= 4; ++nth) {
            OK(edge_test_fail(nth % 2 ? EDGE_FAULT_ROUTING : EDGE_FAULT_COPY, nth));
            CHECK(run.decode({ text[0], 400, 401 }) != 0);
            CHECK(edge_hook_end_step(hook) == EDGE_ERR_BACKEND);
            OK(edge_hook_cancel(hook));
            CHECK(run.decode({ text[0], 400, 401 }) != 0);
            CHECK(edge_hook_end_step(hook) == EDGE_ERR_CANCELLED);
        }
        CHECK(llama_memory_seq_pos_max(llama_get_memory(run.ctx), 0) == -1);
        CHECK(run.feed_text(model) == plain);
    }
    OK(edge_hook_detach(hook));
}

void bad_arguments_are_statuses(llama_model * model) {
    edge_hook_params params{};
    edge_hook * hook = nullptr;
    CHECK(edge_hook_attach(nullptr, &params, &hook) == EDGE_ERR_ARGUMENT);
    CHECK(edge_hook_attach(model, &params, &hook) == EDGE_ERR_ARGUMENT);
    const std::vector<int32_t> slots = slots_of(model, -1);
    params.max_width = max_width;
    params.n_groups = static_cast<int32_t>(slots.size());
    params.slots = slots.data();
    CHECK(edge_hook_attach(model, &params, &hook) == EDGE_ERR_BUDGET && hook == nullptr);
    params.n_groups = 99;
    CHECK(edge_hook_attach(model, &params, &hook) == EDGE_ERR_ARGUMENT);
    params.n_groups = 0;
    OK(edge_hook_attach(model, &params, &hook)); // routing only
    int32_t n = 0;
    CHECK(edge_hook_prefetch(hook, nullptr, 0, 0, 0.0F, &n, nullptr) == EDGE_ERR_ARGUMENT);
    CHECK(edge_hook_drain(hook) == EDGE_ERR_ARGUMENT && std::strlen(edge_last_error()) > 0);
    OK(edge_hook_detach(hook));
    CHECK(edge_test_fail(17, 1) == EDGE_ERR_ARGUMENT);
    edge_device device{};
    CHECK(edge_device_get(-1, &device) == EDGE_ERR_ARGUMENT);
    CHECK(edge_backend_load("/nowhere.so") == EDGE_ERR_BACKEND);
}

} // namespace

int main(int argc, char ** argv) {
    CHECK(argc == 2);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model * model = load(argv[1]);
    std::vector<float> plain;
    {
        Run run(model, nullptr);
        plain = run.feed_text(model);
    }
    CHECK(std::isfinite(plain[0]));
    logits_are_those_without_a_hook(model, plain);
    missing_experts_are_computed_where_they_lie(model, plain);
    the_next_layer_is_prefetched(model, plain);
    other_slot_counts_change_nothing(model, plain);
    a_failed_step_leaves_no_trace(model, plain);
    bad_arguments_are_statuses(model);
    llama_model_free(model);
    llama_backend_free();
    std::puts("hook: ok");
}
