#include "vocab.h"

#include "llama.h"

#include <algorithm>
#include <cstring>

namespace edge {

int32_t first_vocab_difference(const llama_model * model_a, const llama_model * model_b) {
    const llama_vocab * a = llama_model_get_vocab(model_a);
    const llama_vocab * b = llama_model_get_vocab(model_b);
    const int32_t n = std::min(llama_vocab_n_tokens(a), llama_vocab_n_tokens(b));
    for (int32_t token = 0; token < n; ++token) {
        if (std::strcmp(llama_vocab_get_text(a, token), llama_vocab_get_text(b, token)) != 0) {
            return token;
        }
    }
    return llama_vocab_n_tokens(a) == llama_vocab_n_tokens(b) ? -1 : n;
}

} // namespace edge
