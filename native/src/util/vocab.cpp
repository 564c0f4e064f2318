#include "util/vocab.h"

#include "llama.h"

#include <algorithm>
#include <cstring>

namespace edge {

namespace {
constexpr int32_t most_padding = 128; // SPEC_VOCAB_MAX_SIZE_DIFFERENCE of llama.cpp's common/speculative.cpp
}

int32_t first_vocab_difference(const llama_model * model_a, const llama_model * model_b) {
    const llama_vocab * a = llama_model_get_vocab(model_a);
    const llama_vocab * b = llama_model_get_vocab(model_b);
    const int32_t n_a = llama_vocab_n_tokens(a);
    const int32_t n_b = llama_vocab_n_tokens(b);
    const int32_t n = std::min(n_a, n_b);
    for (int32_t token = 0; token < n; ++token) {
        if (std::strcmp(llama_vocab_get_text(a, token), llama_vocab_get_text(b, token)) != 0) {
            return token;
        }
    }
    return std::max(n_a, n_b) - n <= most_padding ? -1 : n;
}

} // namespace edge
