#pragma once

#include "ggml.h"

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

struct llama_model;

namespace edge {

// The three weights of a MoE block; a model that fuses gate and up has gate_up and leaves those empty.
constexpr int n_roles = 4;
enum Role : int { role_up = 0, role_gate = 1, role_down = 2, role_gate_up = 3 };
using BlockWeights = std::array<const ggml_tensor *, n_roles>;

struct ExpertBlock {
    BlockWeights weights{}; // null where the block has no such role
    int32_t      group       = 0;
    int32_t      first_key   = 0; // of this block's experts among the keys of its group
};

struct ExpertGroup {
    std::vector<int32_t> blocks;
    uint64_t             expert_bytes = 0;
};

// Where a model's routed experts are, found by tensor name ("blk.<il>.ffn_up_exps.weight", ...).
class ExpertTable {
public:
    ExpertTable() = default;
    explicit ExpertTable(const llama_model * model);

    // One more block in layer order; ignored when its weights are not n_expert matrices each.
    void add(const BlockWeights & weights);

    int32_t n_expert      = 0;
    int32_t n_expert_used = 0;
    std::vector<ExpertBlock> blocks;
    std::vector<ExpertGroup> groups;

    // The block that these weights are of, -1 when it is none of ours. Layer indices are not unique
    // (grovemoe has two blocks of one layer), tensors are.
    int32_t find(const ggml_tensor * weight) const;
    uint64_t total_bytes() const;

    // Throws unless every weight lies in plain host memory, expert after expert, as slot copies need.
    void require_host_weights() const;

private:
    std::unordered_map<const ggml_tensor *, int32_t> by_weight_;
};

// Slots that a group needs for graphs of this many tokens: all their experts at once and one to load into; a slot
// for every expert is always enough.
int32_t slot_floor(int32_t n_expert, int32_t n_expert_used, int32_t width);
int32_t slot_floor(const ExpertTable & table, size_t group, int32_t width);

} // namespace edge
