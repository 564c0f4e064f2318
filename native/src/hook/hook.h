#pragma once

#include "cpu/cpu_experts.h"
#include "edge_speq.h"
#include "hook/draft_experts.h"
#include "hook/timeline.h"
#include "slots/slot_cache.h"
#include "util/expert_table.h"

#include "ggml-cpp.h"

#include <atomic>
#include <memory>
#include <string>
#include <vector>

struct llama_moe_block;

namespace edge {
// Prefix of the node that copies a block's routing; the block's number follows.
constexpr char route_prefix[] = "edge_route-";
} // namespace edge

// The hook on one model. While a graph is built, it copies each block's routing into a leaf tensor. With slots, it also
// makes the expert matmuls read the slots by that leaf. While the graph runs, it turns the leaf's expert ids into slot
// ids in place before the matmuls read them: every scheduler sees the dependency, and no second ids tensor is needed.
struct edge_hook {
    edge_hook(llama_model * model, edge::ExpertTable table, const edge_hook_params & params);
    ~edge_hook();
    edge_hook(const edge_hook &) = delete;
    edge_hook & operator=(const edge_hook &) = delete;

    void build(ggml_context * ctx, ggml_cgraph * gf, llama_moe_block & block);
    ggml_tensor * select(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * probs, const ggml_tensor * down);
    bool eval(ggml_backend_t backend, ggml_tensor * node, bool ask) noexcept;
    bool copy_from_slot(ggml_backend_t backend, const ggml_tensor * weight, ggml_tensor * copy, int32_t expert,
                        bool ask, bool pad) noexcept;
    bool offload(const ggml_tensor * node) noexcept;
    void copied(ggml_backend_t backend, const ggml_tensor * weight, ggml_tensor * copy, const ggml_tensor * ids,
                const int32_t * chosen, bool before) noexcept;
    void admit_from_prefill(bool on) { admits_from_prefill_ = on; }
    void end_step();
    void resize(const std::vector<int32_t> & slots);
    bool use_experts(int32_t which); // from the next graph on; false: not possible now
    void use_budget(int32_t n_experts);
    void load_draft_experts(const char * path, const edge_draft_tensor * tensors, int32_t n);
    void cancel() noexcept { cancelled_ = true; }

    const int32_t * routing_ids() const { return routing_; }
    int32_t routing_tokens() const { return n_tokens_; }
    int32_t read_prefill(); // returns the number of tokens
    const int32_t * prefill_ids() const { return prefill_ids_.data(); }
    const edge::ExpertTable & table() const { return table_; }
    edge::SlotCache * slot_cache() const { return slot_cache_.get(); }
    edge::Timeline & timeline() { return timeline_; }
    uint64_t bytes() const;

private:
    void make_leaves(ggml_backend_buffer_type_t buft, bool reads_prefill);
    void keep_prefill_routing(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * ids, int32_t number);
    ggml_tensor * slots_on(ggml_backend_t backend, const edge::ExpertBlock & block, edge::Role role) const;
    void copy_on_device(ggml_backend_t backend, ggml_tensor * from, size_t from_offset, ggml_tensor * to,
                        size_t to_offset, size_t bytes);
    void begin_admission(int32_t number, const ggml_tensor * ids, const int32_t * chosen);
    void send_admissions(ggml_backend_t backend, const ggml_tensor * weight, ggml_tensor * copy, ggml_tensor * slots);
    void set_on_model();
    // Tokens of the widest graph that the hook serves.
    int32_t widest() const { return experts_ == EDGE_EXPERTS_OWN ? served_width_ : max_width_; }
    bool looks_up_slots() const { return device_only_ || experts_ == EDGE_EXPERTS_RESIDENT; } // by graphs themselves
    void switch_to_device_only();
    void end_device_only_step();
    void end_draft_step();
    bool all_known(int32_t n_tokens) const;
    void clear_routing();
    void serve(ggml_backend_t backend, ggml_tensor * route, int32_t number);
    bool splits_this_step();
    void cancel_split();
    void prefetch_next_layer();
    void await_device(ggml_backend_t backend, int32_t number);
    void await_copies(int32_t number);
    void read_rows_for(int32_t next, ggml_backend_t backend, const ggml_tensor * rows);
    bool can_predict_next(const ggml_tensor * route, int32_t number);
    bool find_chain(const ggml_tensor * route, int32_t number);
    void serve_hybrid(ggml_backend_t backend, ggml_tensor * route, int32_t number);
    void compute_missing();
    void send_computed(ggml_backend_t backend);
    void assign_placeholder_slots(const int32_t * ids, int32_t * slots, int32_t n);
    void allocate_host(ggml_backend_buffer_type_t buft);
    int32_t widest_served(const int32_t * slots) const;
    int32_t * routing_of(int32_t block) { return host_routing_ + static_cast<size_t>(block) * block_ids_; }
    int32_t * slots_of(int32_t block) { return routing_of(block) + table_.blocks.size() * block_ids_; }

    llama_model * model_;
    edge::ExpertTable table_;
    int32_t max_width_; // rows of the leaf
    int32_t served_width_; // widest graph served from slots; 0 without slots
    size_t block_ids_; // ids of one block in the leaf: max_width * n_expert_used
    edge::DraftExperts draft_experts_;
    int32_t experts_ = EDGE_EXPERTS_OWN; // EDGE_EXPERTS_... that graphs compute with
    // Every expert is resident, and graphs look up slots themselves.
    bool device_only_ = false;
    int32_t budget_ = 0; // distinct experts of a block in a verify step, 0: all
    ggml_context_ptr ctx_;
    ggml_backend_buffer_ptr buffer_;
    ggml_tensor * leaf_ = nullptr; // [n_expert_used, max_width, n_blocks] I32
    ggml_tensor * prefill_leaf_ = nullptr; // [n_expert_used, EDGE_PREFILL_TOKENS, n_blocks] I32
    std::vector<int32_t> prefill_rows_; // rows of each block that the last prefill graph wrote
    std::vector<int32_t> prefill_ids_;
    bool admits_from_prefill_ = false;
    // The link that copies resident experts while a weight's experts are queued.
    edge::Link * slot_link_ = nullptr;
    std::vector<edge::SlotCache::Admission> admissions_; // of admission_block_, whose matrices a prefill graph copies
    std::vector<float> prefill_weights_; // [n_expert] weighted use by that block's tokens
    int32_t admission_block_ = -1;
    int32_t n_matrices_left_ = 0; // of that block's matrices, not copied yet
    std::unique_ptr<edge::SlotCache> slot_cache_;
    ggml_backend_buffer_ptr host_; // page-locked with a GPU: expert ids, then slot ids, of all blocks
    int32_t * host_routing_ = nullptr;
    const int32_t * routing_ = nullptr;
    float * host_input_ = nullptr; // rows that enter the running block
    float * host_computed_ = nullptr; // the CPU's results, a row for each of missing_
    std::unique_ptr<edge::CpuExperts> cpu_experts_; // hybrid execution only
    ggml_cgraph * graph_ = nullptr; // the last one that the hook built
    std::vector<edge::ExpertChain> chains_; // of its blocks, found when first needed
    std::vector<edge::Pair> missing_; // pairs of the running block that the CPU computes
    int32_t split_block_ = -1; // block whose outputs the graph has not reached yet
    bool computed_ = false; // whether missing_ has been computed
    float computing_ = 0; // recent fraction of the blocks with work for the CPU
    int32_t on_miss_ = EDGE_ON_MISS_FETCH;
    int32_t next_layer_block_ = -1; // block that host_input_'s rows predict
    int32_t next_layer_tokens_ = 0; // number of those rows
    // Whether the running graph is split between its experts and their sum.
    bool splits_ = false;
    uint64_t n_steps_ = 0;
    bool graph_fits_ = false; // whether the last built graph is narrow enough for slots
    int32_t selected_ = -1; // block whose router select() saw last
    int32_t width_ = 0; // tokens of the graph, 0 unless every block has all of them
    size_t n_served_ = 0; // blocks of the running graph served from slots
    int32_t n_tokens_ = 0; // complete rows of routing
    edge::Timeline timeline_;
    std::string error_;
    int status_ = EDGE_OK;
    std::atomic<bool> cancelled_{ false };
};
