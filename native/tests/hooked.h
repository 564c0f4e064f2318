// A model, a context over it and a hook on it, for tests.
#pragma once

#include "check.h"
#include "edge_speq.h"

#include "llama.h"

#include <algorithm>
#include <vector>

namespace hooked {

constexpr int32_t max_width = 3;
const std::vector<llama_token> text{ 1, 17, 90, 45, 300, 7, 21, 250, 33, 64, 128, 5 };

#define OK(call)                                             \
    do {                                                     \
        const bool ok = (call) == EDGE_OK;                   \
        if (!ok) {                                           \
            std::fprintf(stderr, "%s\n", edge_last_error()); \
        }                                                    \
        CHECK(ok);                                           \
    } while (0)

inline llama_model * load(const char * path) {
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

// A context over a hooked model; hook may be null.
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
            batch.token[i] = tokens[i];
            batch.pos[i] = n_past + static_cast<int32_t>(i);
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
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
            CHECK(decode({ text.begin() + static_cast<std::ptrdiff_t>(i),
                           text.begin() + static_cast<std::ptrdiff_t>(end) }) == 0);
            if (hook) {
                OK(edge_hook_end_step(hook));
            }
            i = end;
        }
        const float * logits = llama_get_logits_ith(ctx, -1);
        return { logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model)) };
    }
};

inline std::vector<int32_t> slots_of(const llama_model * model, int32_t extra) {
    edge_experts experts{};
    OK(edge_model_experts(model, &experts));
    int32_t floor = 0;
    OK(edge_slot_floor(experts.n_expert, experts.n_expert_used, max_width, &floor));
    return std::vector<int32_t>(static_cast<size_t>(experts.n_groups), floor + extra);
}

inline edge_hook * attach(llama_model * model, const std::vector<int32_t> & slots, bool hybrid = false,
                          bool next_layer_prefetch = false) {
    edge_hook_params params{};
    params.on_miss = hybrid ? EDGE_ON_MISS_HYBRID : EDGE_ON_MISS_FETCH;
    params.n_threads = 3; // of the hook
    params.next_layer_prefetch = next_layer_prefetch;
    params.max_width = max_width;
    params.n_groups = static_cast<int32_t>(slots.size());
    params.slots = slots.data();
    edge_hook * hook = nullptr;
    OK(edge_hook_attach(model, &params, &hook));
    return hook;
}

} // namespace hooked
