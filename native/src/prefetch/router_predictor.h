#pragma once

#include "util/expert_table.h"

#include "ggml.h"

#include <cstdint>
#include <utility>
#include <vector>

struct llama_model;

namespace edge {

// Predicts the next block's experts from the rows that enter the current one, by applying the next block's router a
// layer early. The residual stream changes little from one block to the next, so most predictions come true (SP-MoE,
// arXiv 2510.10302, does this with a draft's rows). Rows are normed for the current block: the ratio of both norms'
// weights is folded into the router, and the norms' scale does not change the order.
class RouterPredictor {
public:
    RouterPredictor(const llama_model * model, const ExpertTable & table);

    bool can_predict(int32_t block) const; // whether the rows of the block before it predict anything

    // Predict the experts of a block from n_tokens rows [n_embd] of the block before it: n_expert_used per row, the
    // most likely of the first row first, without duplicates.
    void predict(int32_t block, const float * rows, int32_t n_tokens, std::vector<int32_t> & chosen);

private:
    struct Router {
        std::vector<uint8_t> weights; // [n_expert, n_embd] of type_; empty: unknown
        std::vector<float> bias; // [n_expert] added to the logits, or empty
        std::vector<float> choice; // [n_expert] added to the logits' sigmoid for selection only, or empty
    };
    void read(const llama_model * model, Router & router, int layer, int layer_before) const;
    void pack(const float * rows, size_t n_rows, std::vector<uint8_t> & out) const;
    void score(const Router & router, const float * rows, int32_t n_tokens);
    void choose(int32_t token, std::vector<int32_t> & chosen);

    int32_t n_expert_;
    int32_t n_used_;
    size_t n_embd_;
    // 8 bits if rows divide into its quantization blocks: reading the weights from memory is the cost
    ggml_type type_;
    size_t row_size_; // bytes
    std::vector<Router> routers_; // per block
    std::vector<uint8_t> rows_; // [n_tokens, n_embd] of type_
    std::vector<std::pair<float, int32_t>> scores_; // [n_tokens, n_expert] of (-score, expert)
};

} // namespace edge
