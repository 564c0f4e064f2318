#include "prefetch/router_predictor.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "llama-ext.h"
#include "llama-moe-hook.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

namespace edge {

namespace {

// Read a tensor of n values from host or device memory. Empty if the model has no such tensor of that size.
std::vector<float> values(const llama_model * model, int layer, const char * name, size_t n) {
    const std::string full = "blk." + std::to_string(layer) + "." + name;
    const ggml_tensor * tensor = llama_model_find_tensor(model, full.c_str());
    if (!tensor || !tensor->buffer || !ggml_is_contiguous(tensor) || static_cast<size_t>(ggml_nelements(tensor)) != n) {
        return {};
    }
    std::vector<uint8_t> raw(ggml_nbytes(tensor));
    ggml_backend_tensor_get(tensor, raw.data(), 0, raw.size());
    std::vector<float> out(n);
    if (tensor->type == GGML_TYPE_F32) {
        std::copy_n(reinterpret_cast<const float *>(raw.data()), n, out.begin());
    } else if (const ggml_to_float_t to_float = ggml_get_type_traits(tensor->type)->to_float) {
        to_float(raw.data(), out.data(), static_cast<int64_t>(n));
    } else {
        return {};
    }
    return out;
}

std::vector<float> norm_before_experts(const llama_model * model, int layer, size_t n) {
    std::vector<float> norm = values(model, layer, "ffn_norm.weight", n);
    return norm.empty() ? values(model, layer, "post_attention_norm.weight", n) : norm;
}

int layer_of(const ggml_tensor * weight) {
    int layer = -1;
    return std::sscanf(weight->name, "blk.%d.", &layer) == 1 ? layer : -1;
}

ggml_type narrowest_for(size_t n) {
    return n % static_cast<size_t>(ggml_blck_size(GGML_TYPE_Q8_0)) == 0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F32;
}

} // namespace

RouterPredictor::RouterPredictor(const llama_model * model, const ExpertTable & table)
    : n_expert_(table.n_expert), n_used_(table.n_expert_used),
      n_embd_(static_cast<size_t>(table.blocks.front().weights[role_down]->ne[1])), type_(narrowest_for(n_embd_)),
      row_size_(ggml_row_size(type_, static_cast<int64_t>(n_embd_))), routers_(table.blocks.size()) {
    for (size_t block = 1; block < routers_.size(); ++block) {
        const int layer = layer_of(table.blocks[block].weights[role_down]);
        const int before = layer_of(table.blocks[block - 1].weights[role_down]);
        if (layer >= 0 && before == layer - 1) {
            read(model, routers_[block], layer, before);
        }
    }
}

void RouterPredictor::read(const llama_model * model, Router & router, int layer, int layer_before) const {
    const auto n_expert = static_cast<size_t>(n_expert_);
    router.bias = values(model, layer, "ffn_gate_inp.bias", n_expert);
    router.choice = values(model, layer, "exp_probs_b.bias", n_expert);
    std::vector<float> weights = values(model, layer, "ffn_gate_inp.weight", n_expert * n_embd_);
    const std::vector<float> norm = norm_before_experts(model, layer, n_embd_);
    const std::vector<float> before = norm_before_experts(model, layer_before, n_embd_);
    if (!norm.empty() && !before.empty()) {
        for (size_t i = 0; i < weights.size(); ++i) {
            const float divisor = before[i % n_embd_];
            weights[i] *= std::abs(divisor) > 1e-6F ? norm[i % n_embd_] / divisor : 0.0F;
        }
    }
    pack(weights.data(), weights.empty() ? 0 : n_expert, router.weights);
}

// Convert rows to the type of both sides of ggml's dot product.
void RouterPredictor::pack(const float * rows, size_t n_rows, std::vector<uint8_t> & out) const {
    out.resize(n_rows * row_size_);
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(type_)->from_float;
    for (size_t row = 0; row < n_rows; ++row) {
        from_float(rows + row * n_embd_, out.data() + row * row_size_, static_cast<int64_t>(n_embd_));
    }
}

bool RouterPredictor::can_predict(int32_t block) const {
    return block > 0 && static_cast<size_t>(block) < routers_.size() &&
           !routers_[static_cast<size_t>(block)].weights.empty();
}

// Each expert's weights are read once for all rows: the weights come from memory, the rows from the cache.
void RouterPredictor::score(const Router & router, const float * rows, int32_t n_tokens) {
    scores_.resize(static_cast<size_t>(n_tokens) * static_cast<size_t>(n_expert_));
    pack(rows, static_cast<size_t>(n_tokens), rows_);
    const ggml_vec_dot_t dot = ggml_get_type_traits_cpu(type_)->vec_dot;
    for (int32_t expert = 0; expert < n_expert_; ++expert) {
        const auto e = static_cast<size_t>(expert);
        for (size_t token = 0; token < static_cast<size_t>(n_tokens); ++token) {
            float score = 0;
            dot(static_cast<int>(n_embd_), &score, 0, router.weights.data() + e * row_size_, 0,
                rows_.data() + token * row_size_, 0, 1);
            score += router.bias.empty() ? 0.0F : router.bias[e];
            if (!router.choice.empty()) {
                score = 1.0F / (1.0F + std::exp(-score)) + router.choice[e];
            }
            scores_[token * static_cast<size_t>(n_expert_) + e] = { std::isfinite(score) ? -score : HUGE_VALF, expert };
        }
    }
}

void RouterPredictor::choose(int32_t token, std::vector<int32_t> & chosen) {
    const auto first = scores_.begin() + static_cast<std::ptrdiff_t>(token) * n_expert_;
    std::partial_sort(first, first + n_used_, first + n_expert_);
    for (auto score = first; score != first + n_used_; ++score) {
        if (std::find(chosen.begin(), chosen.end(), score->second) == chosen.end()) {
            chosen.push_back(score->second);
        }
    }
}

void RouterPredictor::predict(int32_t block, const float * rows, int32_t n_tokens, std::vector<int32_t> & chosen) {
    chosen.clear();
    score(routers_[static_cast<size_t>(block)], rows, n_tokens);
    for (int32_t token = 0; token < n_tokens; ++token) {
        choose(token, chosen);
    }
}

} // namespace edge
