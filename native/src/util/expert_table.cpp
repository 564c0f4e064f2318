#include "util/expert_table.h"

#include "edge_speq.h"
#include "util/error.h"

#include "ggml-backend.h"
#include "llama-ext.h"
#include "llama-model.h"
#include "llama-moe-hook.h"
#include "llama.h"

#include <algorithm>
#include <string>

namespace edge {

namespace {

// 0 if layers differ, which makes the caller take the stock path. Respects kv_overrides.
int32_t expert_used_count(const llama_model * model) {
    const uint32_t most = model->hparams.n_expert_used_max();
    for (uint32_t il = 0; il < model->hparams.n_layer(); ++il) {
        if (model->hparams.n_expert_used(il) != most) {
            return 0;
        }
    }
    return static_cast<int32_t>(most);
}

bool same_layout(const BlockWeights & a, const BlockWeights & b) {
    for (size_t role = 0; role < a.size(); ++role) {
        if ((a[role] == nullptr) != (b[role] == nullptr)) {
            return false;
        }
        if (a[role] != nullptr &&
            (a[role]->type != b[role]->type || a[role]->ne[0] != b[role]->ne[0] || a[role]->ne[1] != b[role]->ne[1])) {
            return false;
        }
    }
    return true;
}

} // namespace

ExpertTable::ExpertTable(const llama_model * model) {
    n_expert = llama_model_n_expert(model);
    n_expert_used = expert_used_count(model);
    if (n_expert <= 0 || n_expert_used <= 0 || n_expert_used > n_expert) {
        return;
    }
    static const char * const names[n_roles] = { "ffn_up_exps", "ffn_gate_exps", "ffn_down_exps", "ffn_gate_up_exps" };
    for (int32_t il = 0; il < llama_model_n_layer(model); ++il) {
        BlockWeights weights{};
        for (size_t role = 0; role < weights.size(); ++role) {
            const std::string name = "blk." + std::to_string(il) + "." + names[role] + ".weight";
            weights[role] = llama_model_find_tensor(model, name.c_str());
        }
        const bool complete = weights[role_down] && (weights[role_up] || weights[role_gate_up]);
        if (complete) {
            add(weights);
        }
    }
}

void ExpertTable::add(const BlockWeights & weights) {
    for (const ggml_tensor * weight : weights) {
        if (weight && (weight->ne[2] != n_expert || weight->ne[3] != 1)) {
            return; // not one matrix per expert: the stock path serves this layer
        }
    }
    const int32_t number = static_cast<int32_t>(blocks.size());
    size_t group = 0;
    while (group < groups.size() &&
           !same_layout(weights, blocks[static_cast<size_t>(groups[group].blocks.front())].weights)) {
        ++group;
    }
    if (group == groups.size()) {
        groups.emplace_back();
        for (const ggml_tensor * weight : weights) {
            groups.back().expert_bytes += weight ? weight->nb[2] : 0;
        }
    }
    ExpertBlock block;
    block.weights = weights;
    block.group = static_cast<int32_t>(group);
    block.first_key = static_cast<int32_t>(groups[group].blocks.size()) * n_expert;
    groups[group].blocks.push_back(number);
    blocks.push_back(block);
    for (const ggml_tensor * weight : weights) {
        if (weight) {
            by_weight_[weight] = number;
        }
    }
}

int32_t ExpertTable::find(const ggml_tensor * weight) const {
    const auto it = by_weight_.find(weight);
    return it == by_weight_.end() ? -1 : it->second;
}

uint64_t ExpertTable::total_bytes() const {
    uint64_t bytes = 0;
    for (const ExpertGroup & group : groups) {
        bytes += group.expert_bytes * group.blocks.size() * static_cast<uint64_t>(n_expert);
    }
    return bytes;
}

void ExpertTable::require_host_weights() const {
    for (const ExpertBlock & block : blocks) {
        for (const ggml_tensor * weight : block.weights) {
            if (weight == nullptr) {
                continue;
            }
            const std::string where = weight->buffer ? ggml_backend_buffer_name(weight->buffer) : "nowhere";
            // CPU_REPACK and AMX buffers are host memory, too, but with another layout
            const bool plain = weight->buffer && ggml_backend_buffer_is_host(weight->buffer) && weight->data &&
                               (where == "CPU" || where == "CPU_Mapped" || where.find("_Host") != std::string::npos);
            if (!plain || !ggml_is_contiguous(weight)) {
                throw Error(EDGE_ERR_UNSUPPORTED, "expert weights " + std::string(weight->name) + " are in " + where +
                                                      " memory; slots need them in plain CPU memory (override the " +
                                                      "expert tensors to the CPU buffer type, use_extra_bufts=false)");
            }
        }
    }
}

int32_t slot_floor(int32_t n_expert, int32_t n_expert_used, int32_t width) {
    return static_cast<int32_t>(std::min<int64_t>(n_expert, static_cast<int64_t>(n_expert_used) * width)) + 1;
}

int32_t slot_floor(const ExpertTable & table, size_t group, int32_t width) {
    const auto n_experts = static_cast<int32_t>(table.groups[group].blocks.size()) * table.n_expert;
    return std::min(n_experts, slot_floor(table.n_expert, table.n_expert_used, width));
}

} // namespace edge
