// Replaces router_predictor.cpp in test programs that do not link it; each includes this once.
#pragma once

#include "prefetch/router_predictor.h"

#include <cstdint>
#include <vector>

// A row is one number, the expert that it predicts.
namespace edge {

RouterPredictor::RouterPredictor(const llama_model *, const ExpertTable & table)
    : n_expert_(table.n_expert), n_used_(1), n_embd_(1), type_(GGML_TYPE_F32), row_size_(sizeof(float)) {}

bool RouterPredictor::can_predict(int32_t block) const { return block > 0; }

void RouterPredictor::predict(int32_t, const float * rows, int32_t n_tokens, std::vector<int32_t> & chosen) {
    chosen.assign(rows, rows + n_tokens);
}

} // namespace edge
