// The hook on a real model, through the C ABI: logits as without it, and what errors, cancels and other slot counts in
// the middle of a text leave behind. argv[1]: a MoE GGUF of one slot group or more.
#include "check.h"
#include "edge_speq.h"

#include "llama.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int32_t max_width = 3;
const std::vector<llama_token> text{ 1, 17, 90, 45, 300, 7, 21, 250, 33, 64, 128, 5 };

#define OK(call)                                    \
    do {                                            \
        const bool ok = (call) == EDGE_OK;          \
        if (!ok) {                                  \
            std::fprintf(stderr, "%s\n", edge_last_error()); \
        }                                           \
        CHECK(ok);                                  \
    } while (0)

llama_model * load(const char * path) {
    static const llama_model_tensor_buft_override overrides[] = {
        { "\\.ffn_(up|down|gate|gate_up)_(ch|)exps", static_cast<ggml_backend_buffer_type_t>(edge_cpu_buffer_type()) },
        { nullptr, nullptr },
    };
    llama_model_params params = llama_model_default_params();
    params.tensor_buft_overrides = overrides;
    params.use_extra_bufts = false;
    llama_model * model = llama_model_load_from_file(path, params);
    CHECK(model != nullptr);
    return model;
}

// A context of its own over a hooked model; hook may be null.
struct Run {
    edge_hook * hook;
    llama_context * ctx;
    int32_t n_past = 0;

    Run(llama_model * model, edge_hook * used) : hook(used) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = 128;
        params.n_threads = params.n_threads_batch = 1; // OpenMP is not instrumented
        ctx = llama_init_from_model(model, params);
        CHECK(ctx != nullptr);
    }
    ~Run() { llama_free(ctx); }

    int decode(std::vector<llama_token> tokens) {
        llama_batch batch = llama_batch_init(static_cast<int32_t>(tokens.size()), 0, 1);
        for (size_t i = 0; i < tokens.size(); ++i) {
            batch.token[i]     = tokens[i];
            batch.pos[i]       = n_past + static_cast<int32_t>(i);
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = 1;
        }
        batch.n_tokens = static_cast<int32_t>(tokens.size());
        const int status = llama_decode(ctx, batch);
        llama_synchronize(ctx);
        n_past += status == 0 ? batch.n_tokens : 0;
        llama_batch_free(batch);
        return status;
    }

    // Logits after the whole text, fed in widths of 1 to max_width.
    std::vector<float> feed_text(llama_model * model) {
        int32_t width = 1;
        for (size_t i = 0; i < text.size(); width = width % max_width + 1) {
            const size_t end = std::min(text.size(), i + static_cast<size_t>(width));
            CHECK(decode({ text.begin() + static_cast<std::ptrdiff_t>(i), text.begin() + static_cast<std::ptrdiff_t>(end) }) == 0);
            if (hook) {
                OK(edge_hook_end_step(hook));
            }
            i = end;
        }
        const float * logits = llama_get_logits_ith(ctx, -1);
        return { logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model)) };
    }
};

std::vector<int32_t> slots_of(const llama_model * model, int32_t extra) {
    edge_experts experts{};
    OK(edge_model_experts(model, &experts));
    int32_t floor = 0;
    OK(edge_slot_floor(experts.n_expert, experts.n_expert_used, max_width, &floor));
    return std::vector<int32_t>(static_cast<size_t>(experts.n_groups), floor + extra);
}

edge_hook * attach(llama_model * model, const std::vector<int32_t> & slots, bool hybrid = false, bool layer_ahead = false) {
    edge_hook_params params{};
    params.compute   = hybrid ? EDGE_COMPUTE_HYBRID : EDGE_COMPUTE_DEVICE;
    params.n_threads = 1;
    params.layer_ahead = layer_ahead;
    params.max_width = max_width;
    params.n_groups  = static_cast<int32_t>(slots.size());
    params.slots     = slots.data();
    edge_hook * hook = nullptr;
    OK(edge_hook_attach(model, &params, &hook));
    return hook;
}

void logits_are_those_without_a_hook(llama_model * model, const std::vector<float> & plain) {
    edge_hook * hook = attach(model, slots_of(model, 0));
    OK(edge_hook_poison_free_slots(hook));
    std::atomic<bool> done{ false };
    std::thread foresight([&] { // orders what it likes, meanwhile
        for (int32_t i = 0; !done; ++i) {
            const edge_order orders[] = { { i % 4, i % 8, 99, 1.0F }, { (i + 1) % 4, i % 5, 99, 0.5F } };
            int32_t n = 0;
            OK(edge_hook_prefetch(hook, orders, 2, UINT64_MAX, &n));
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

// Nothing is fetched on demand: what foresight has not brought, the CPU computes, to the last bit.
void missing_experts_are_computed_where_they_lie(llama_model * model, const std::vector<float> & plain) {
    edge_hook * hook = attach(model, slots_of(model, 0), true);
    OK(edge_hook_poison_free_slots(hook));
    {
        Run run(model, hook);
        CHECK(run.feed_text(model) == plain);
        edge_counters c{};
        OK(edge_hook_counters(hook, &c));
        CHECK(c.hits == 0 && c.misses > 0 && c.cpu_computed == c.misses && c.fetched == 0);
        std::vector<edge_order> orders;
        for (int32_t expert = 0; expert < 20; ++expert) {
            orders.push_back({ expert % 4, expert, 99, 1.0F });
        }
        int32_t n = 0;
        OK(edge_hook_prefetch(hook, orders.data(), static_cast<int32_t>(orders.size()), UINT64_MAX, &n));
        llama_memory_clear(llama_get_memory(run.ctx), true);
        run.n_past = 0;
        CHECK(run.feed_text(model) == plain); // while they come in
        OK(edge_hook_counters(hook, &c));
        CHECK(c.hits > 0 && c.fetched <= c.late); // those that were on their way
        OK(edge_test_fail(EDGE_FAULT_ROUTING, 2));
        CHECK(run.decode({ 400 }) != 0 && edge_hook_end_step(hook) == EDGE_ERR_BACKEND);
        llama_memory_clear(llama_get_memory(run.ctx), true);
        run.n_past = 0;
        CHECK(run.feed_text(model) == plain);
    }
    OK(edge_hook_detach(hook));
}

// What a block's input says of the next block brings experts; the logits do not see it.
void a_block_ahead_is_foreseen(llama_model * model, const std::vector<float> & plain) {
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
    CHECK(costs.layer_ahead_precision > 0.3 && costs.layer_ahead_precision < 1 && !costs.fetches_some);
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
    params.n_groups  = static_cast<int32_t>(slots.size());
    params.slots     = slots.data();
    CHECK(edge_hook_attach(model, &params, &hook) == EDGE_ERR_BUDGET && hook == nullptr);
    params.n_groups = 99;
    CHECK(edge_hook_attach(model, &params, &hook) == EDGE_ERR_ARGUMENT);
    params.n_groups = 0;
    OK(edge_hook_attach(model, &params, &hook)); // routing only
    int32_t n = 0;
    CHECK(edge_hook_prefetch(hook, nullptr, 0, 0, &n) == EDGE_ERR_ARGUMENT);
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
    a_block_ahead_is_foreseen(model, plain);
    other_slot_counts_change_nothing(model, plain);
    a_failed_step_leaves_no_trace(model, plain);
    bad_arguments_are_statuses(model);
    llama_model_free(model);
    llama_backend_free();
    std::puts("hook: ok");
}
