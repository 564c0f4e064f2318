#pragma once

#include <cstdint>

struct llama_model;

namespace edge {

// Index of the first token whose text differs, -1 when a draft's tokens mean the target's.
int32_t first_vocab_difference(const llama_model * a, const llama_model * b);

} // namespace edge
