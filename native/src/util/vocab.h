#pragma once

#include <cstdint>

struct llama_model;

namespace edge {

// Return the index of the first token whose text differs, -1 if the vocabularies agree.
int32_t first_vocab_difference(const llama_model * a, const llama_model * b);

} // namespace edge
