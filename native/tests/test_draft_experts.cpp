// A model that drafts for itself, through the C ABI: which experts it drafts with, and that the target's logits never
// change.
// argv[1]: a MoE GGUF of one slot group or more.
#include "hooked.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <cmath>
#include <string>

using namespace hooked;

namespace {

// The model's own experts as draft experts: its drafts are what the target would say.
std::vector<edge_draft_tensor> own_experts(const char * path) {
    gguf_init_params params{};
    params.no_alloc = true;
    const gguf_context_ptr file(gguf_init_from_file(path, params));
    static const char * const roles[] = { "up", "gate", "down", "gate_up" };
    std::vector<edge_draft_tensor> found;
    int32_t block = 0;
    for (int layer = 0; layer < 999; ++layer) {
        const size_t before = found.size();
        for (int32_t role = 0; role < 4; ++role) {
            const std::string name = "blk." + std::to_string(layer) + ".ffn_" + roles[role] + "_exps.weight";
            const int64_t i = gguf_find_tensor(file.get(), name.c_str());
            if (i >= 0) {
                found.push_back({ block, role, static_cast<int32_t>(gguf_get_tensor_type(file.get(), i)),
                                  gguf_get_data_offset(file.get()) + gguf_get_tensor_offset(file.get(), i) });
            }
        }
        block += found.size() > before ? 1 : 0;
    }
    return found;
}

struct Counts {
    uint64_t hits, misses;
    bool operator==(const Counts & other) const { return hits == other.hits && misses == other.misses; }
};

Counts counts(edge_hook * hook) {
    edge_counters c{};
    OK(edge_hook_counters(hook, &c));
    return { c.hits, c.misses };
}

std::vector<float> logits_of(const Run & run, const llama_model * model) {
    const float * logits = llama_get_logits_ith(run.ctx, -1);
    return { logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model)) };
}

// The text one token at a time; before each, `tokens` further ones are drafted and rolled back.
std::vector<float> feed_with_drafts(Run & run, const llama_model * model, int32_t which, int tokens) {
    for (const llama_token & token : text) {
        for (int i = 0; i < tokens; ++i) {
            bool ready = false;
            OK(edge_hook_use_experts(run.hook, which, &ready));
            if (!ready) {
                break;
            }
            const Counts before = counts(run.hook);
            CHECK(run.decode({ i == 0 ? token : token + i }) == 0);
            OK(edge_hook_end_step(run.hook));
            CHECK(counts(run.hook) == before);
            CHECK(std::isfinite(logits_of(run, model)[0]));
            const int32_t * ids = nullptr;
            int32_t n = 0;
            OK(edge_hook_routing(run.hook, &ids, &n));
            CHECK(n == 1 && ids[0] >= 0);
        }
        bool ready = false;
        OK(edge_hook_use_experts(run.hook, EDGE_EXPERTS_OWN, &ready));
        const auto past = static_cast<int32_t>(&token - text.data());
        CHECK(llama_memory_seq_rm(llama_get_memory(run.ctx), -1, past, -1));
        run.n_past = past;
        CHECK(run.decode({ token }) == 0);
        OK(edge_hook_end_step(run.hook));
    }
    return logits_of(run, model);
}

void drafts_leave_no_trace(llama_model * model, const std::vector<float> & plain,
                           const std::vector<edge_draft_tensor> & draft_tensors, const char * path) {
    for (const bool hybrid : { false, true }) {
        edge_hook * hook = attach(model, slots_of(model, 12), hybrid);
        OK(edge_hook_poison_free_slots(hook));
        uint64_t before = 0, after = 0;
        OK(edge_hook_bytes(hook, &before));
        OK(edge_hook_load_draft_experts(hook, path, draft_tensors.data(), static_cast<int32_t>(draft_tensors.size())));
        OK(edge_hook_bytes(hook, &after));
        CHECK(after > before);
        {
            Run run(model, hook);
            CHECK(feed_with_drafts(run, model, EDGE_EXPERTS_DRAFT, 2) == plain);
            llama_memory_clear(llama_get_memory(run.ctx), true);
            run.n_past = 0;
            CHECK(feed_with_drafts(run, model, EDGE_EXPERTS_RESIDENT, 2) == plain);
        }
        OK(edge_hook_detach(hook));
    }
}

// Its routing, too, is the target's.
void the_same_experts_draft_the_same(llama_model * model, const std::vector<float> & plain,
                                     const std::vector<edge_draft_tensor> & draft_tensors, const char * path) {
    edge_hook * hook = attach(model, slots_of(model, 0));
    OK(edge_hook_load_draft_experts(hook, path, draft_tensors.data(), static_cast<int32_t>(draft_tensors.size())));
    {
        Run run(model, hook);
        bool ready = false;
        OK(edge_hook_use_experts(hook, EDGE_EXPERTS_DRAFT, &ready));
        CHECK(ready);
        CHECK(run.feed_text(model) == plain);
        CHECK((counts(hook) == Counts{ 0, 0 }));
        OK(edge_hook_use_experts(hook, EDGE_EXPERTS_RESIDENT, &ready));
        CHECK(!ready); // no expert is resident
    }
    OK(edge_hook_detach(hook));
}

// Graphs look up slots that nothing leaves any more: hits are still counted, and other slot counts are served again.
void device_only_graphs_do_not_ask_the_host(Run & run, llama_model * model, const std::vector<float> & plain,
                                            const std::vector<int32_t> & all) {
    for (const std::vector<int32_t> & slots : { all, slots_of(model, 3), all }) {
        OK(edge_hook_resize(run.hook, slots.data(), static_cast<int32_t>(slots.size())));
        Counts before = counts(run.hook);
        for (int i = 0; i < 3; ++i) {
            llama_memory_clear(llama_get_memory(run.ctx), true);
            run.n_past = 0;
            CHECK(run.feed_text(model) == plain);
            const Counts after = counts(run.hook);
            CHECK(after.hits + after.misses > before.hits + before.misses);
            CHECK(after.misses == before.misses || slots != all || i == 0);
            before = after;
        }
        const int32_t * ids = nullptr;
        int32_t n = 0;
        OK(edge_hook_routing(run.hook, &ids, &n));
        CHECK(n > 0 && ids[0] >= 0);
        OK(edge_hook_end_step(run.hook)); // without a graph
        CHECK(counts(run.hook) == before);
    }
}

// Routers restricted to residents choose as usual if every expert is resident.
void full_residency_restricts_no_router(llama_model * model, const std::vector<float> & plain) {
    edge_experts experts{};
    OK(edge_model_experts(model, &experts));
    std::vector<int32_t> slots;
    for (int32_t group = 0; group < experts.n_groups; ++group) {
        edge_group found{};
        OK(edge_model_group(model, group, &found));
        slots.push_back(found.n_experts);
    }
    edge_hook * hook = attach(model, slots);
    std::vector<edge_prefetch_request> requests;
    for (int32_t block = 0; block < experts.n_blocks; ++block) {
        for (int32_t expert = 0; expert < experts.n_expert; ++expert) {
            requests.push_back({ block, expert, experts.n_blocks, 1.0F });
        }
    }
    int32_t n = 0;
    OK(edge_hook_prefetch(hook, requests.data(), static_cast<int32_t>(requests.size()), UINT64_MAX, 0.0F, &n, nullptr));
    OK(edge_hook_drain(hook));
    {
        Run run(model, hook);
        bool ready = false;
        for (size_t i = 0; i < text.size(); ++i) {
            OK(edge_hook_use_experts(hook, EDGE_EXPERTS_RESIDENT, &ready));
            CHECK(ready && run.decode({ text[i] }) == 0);
            OK(edge_hook_end_step(hook));
        }
        CHECK(logits_of(run, model) == plain);
        OK(edge_hook_use_experts(hook, EDGE_EXPERTS_OWN, &ready));
        device_only_graphs_do_not_ask_the_host(run, model, plain, slots);
    }
    OK(edge_hook_detach(hook));
}

// A limit of all experts changes nothing; a lower one is respected.
void verify_steps_keep_to_their_budget(llama_model * model, const std::vector<float> & plain) {
    edge_experts experts{};
    OK(edge_model_experts(model, &experts));
    edge_hook * hook = attach(model, slots_of(model, 0));
    CHECK(edge_hook_use_budget(hook, experts.n_expert_used - 1) == EDGE_ERR_ARGUMENT);
    CHECK(edge_hook_use_budget(hook, experts.n_expert + 1) == EDGE_ERR_ARGUMENT);
    {
        Run run(model, hook);
        OK(edge_hook_use_budget(hook, experts.n_expert));
        CHECK(run.feed_text(model) == plain);
        llama_memory_clear(llama_get_memory(run.ctx), true);
        run.n_past = 0;
        const int32_t budget = experts.n_expert_used + 1;
        OK(edge_hook_use_budget(hook, budget));
        CHECK(run.decode({ text[0], text[1], text[2] }) == 0);
        OK(edge_hook_end_step(hook));
        const int32_t * ids = nullptr;
        int32_t n = 0;
        OK(edge_hook_routing(hook, &ids, &n));
        CHECK(n == 3);
        for (int32_t block = 0; block < experts.n_blocks; ++block) {
            const int32_t * first = ids + block * max_width * experts.n_expert_used;
            std::vector<int32_t> distinct(first, first + n * experts.n_expert_used);
            std::sort(distinct.begin(), distinct.end());
            CHECK(std::unique(distinct.begin(), distinct.end()) - distinct.begin() <= budget);
        }
    }
    OK(edge_hook_detach(hook));
}

void bad_draft_experts_are_statuses(llama_model * model, const std::vector<edge_draft_tensor> & draft_tensors,
                                    const char * path) {
    edge_hook * hook = attach(model, slots_of(model, 0));
    const auto load = [&](const std::vector<edge_draft_tensor> & tensors, const char * from) {
        return edge_hook_load_draft_experts(hook, from, tensors.data(), static_cast<int32_t>(tensors.size()));
    };
    const auto changed = [&](auto change) {
        std::vector<edge_draft_tensor> bad = draft_tensors;
        change(bad.front());
        return bad;
    };
    bool ready = false;
    CHECK(edge_hook_use_experts(hook, EDGE_EXPERTS_DRAFT, &ready) == EDGE_ERR_ARGUMENT);
    CHECK(edge_hook_use_experts(hook, 7, &ready) == EDGE_ERR_ARGUMENT);
    CHECK(load({}, path) == EDGE_ERR_ARGUMENT);
    CHECK(load({ draft_tensors.begin(), draft_tensors.end() - 1 }, path) == EDGE_ERR_ARGUMENT);
    CHECK(load(changed([](edge_draft_tensor & t) { t.block = 99; }), path) == EDGE_ERR_ARGUMENT);
    CHECK(load(changed([](edge_draft_tensor & t) { t.role = -1; }), path) == EDGE_ERR_ARGUMENT);
    CHECK(load(changed([](edge_draft_tensor & t) { t.role = EDGE_ROLE_GATE_UP; }), path) == EDGE_ERR_ARGUMENT);
    // A type that ggml removed
    CHECK(load(changed([](edge_draft_tensor & t) { t.type = 4; }), path) == EDGE_ERR_UNSUPPORTED);
    CHECK(load(changed([](edge_draft_tensor & t) { t.type = 10000; }), path) == EDGE_ERR_UNSUPPORTED);
    CHECK(load(changed([](edge_draft_tensor & t) { t.offset = uint64_t{ 1 } << 62; }), path) == EDGE_ERR_ARGUMENT);
    CHECK(load(draft_tensors, "/nowhere.gguf") == EDGE_ERR_ARGUMENT);
    OK(edge_test_fail(EDGE_FAULT_ALLOCATION, 1));
    CHECK(load(draft_tensors, path) == EDGE_ERR_MEMORY);
    CHECK(edge_hook_use_experts(hook, EDGE_EXPERTS_DRAFT, &ready) == EDGE_ERR_ARGUMENT); // none was loaded
    // Types that no kernel multiplies with
    for (const int32_t type : { GGML_TYPE_I8, GGML_TYPE_I32, GGML_TYPE_F64, GGML_TYPE_Q8_1, GGML_TYPE_Q8_K }) {
        CHECK(load(changed([&](edge_draft_tensor & t) { t.type = type; }), path) == EDGE_ERR_UNSUPPORTED);
    }
    OK(load(draft_tensors, path));
    {
        Run run(model, hook);
        OK(edge_hook_use_experts(hook, EDGE_EXPERTS_DRAFT, &ready));
        CHECK(ready && run.decode({ text[0] }) == 0);
        OK(edge_hook_end_step(hook));
        CHECK(load(draft_tensors, path) == EDGE_ERR_ARGUMENT); // while it is in use
        OK(edge_hook_use_experts(hook, EDGE_EXPERTS_OWN, &ready));
        OK(load(draft_tensors, path)); // replaces the first
        OK(edge_hook_use_experts(hook, EDGE_EXPERTS_DRAFT, &ready));
        CHECK(ready && run.decode({ text[1] }) == 0);
        OK(edge_hook_end_step(hook));
        const std::vector<int32_t> slots = slots_of(model, 1);
        OK(edge_hook_resize(hook, slots.data(), static_cast<int32_t>(slots.size())));
        CHECK(run.decode({ text[2] }) == 0); // with its own experts again
        OK(edge_hook_end_step(hook));
        CHECK(counts(hook).misses > 0);
    }
    OK(edge_hook_detach(hook));
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
    const std::vector<edge_draft_tensor> draft_tensors = own_experts(argv[1]);
    CHECK(!draft_tensors.empty());
    drafts_leave_no_trace(model, plain, draft_tensors, argv[1]);
    the_same_experts_draft_the_same(model, plain, draft_tensors, argv[1]);
    full_residency_restricts_no_router(model, plain);
    verify_steps_keep_to_their_budget(model, plain);
    bad_draft_experts_are_statuses(model, draft_tensors, argv[1]);
    llama_model_free(model);
    llama_backend_free();
    std::puts("draft_experts: ok");
}
