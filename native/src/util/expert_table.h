#pragma once

#include "ggml.h"

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

struct llama_model;

namespace edge {

// The weights of a MoE block; a model that fuses gate and up has gate_up and neither of the two.
constexpr int n_roles = 4;
enum Role : int { role_up = 0, role_gate = 1, role_down = 2, role_gate_up = 3 };
using BlockWeights = std::array<const ggml_tensor *, n_roles>;

struct ExpertBlock {
    BlockWeights weights{}; // null if the block has no such role
    int32_t group = 0;
    int32_t first_key = 0; // of this block's experts among the keys of its group
};

struct ExpertGroup {
    std::vector<int32_t> blocks;
    uint64_t expert_bytes = 0;
};

// A model's routed experts, found by tensor name ("blk.<il>.ffn_up_exps.weight", ...).
class ExpertTable {
public:
    ExpertTable() = default;
    explicit ExpertTable(const llama_model * model);

    // Add a block in layer order; ignored unless its weights are n_expert matrices each.
    void add(const BlockWeights & weights);

    int32_t n_expert = 0;
    int32_t n_expert_used = 0;
    std::vector<ExpertBlock> blocks;
    std::vector<ExpertGroup> groups;

    // Return the block of a weight, -1 if it is not in the table. Tensors are unique, layer indices are not: grovemoe
    // has two blocks per layer.
    int32_t find(const ggml_tensor * weight) const;
    uint64_t total_bytes() const;

    // Throws unless every weight is in plain host memory, expert after expert, as slot copies need.
    void require_host_weights() const;

private:
    std::unordered_map<const ggml_tensor *, int32_t> by_weight_;
};

// Slots that a group needs for graphs of `width` tokens: all their experts and one to load into. A slot for every
// expert is always enough.
int32_t slot_floor(int32_t n_expert, int32_t n_expert_used, int32_t width);
int32_t slot_floor(const ExpertTable & table, size_t group, int32_t width);

} // namespace edge
