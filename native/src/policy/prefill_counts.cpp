// Update policies from prefill: count how often its last tokens demanded each expert.
#include "policy/policy_kernels.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

namespace edge {

namespace {

// Mark the experts of a block that tokens [from, to) chose, if known. Return true if any is known.
bool mark_known(uint8_t * marks, int32_t n_expert, const edge_routing & routing, int32_t block, int32_t from,
                int32_t to) {
    std::memset(marks, 0, count(n_expert));
    const int32_t * row = routing.ids + count(block) * count(routing.stride);
    bool any = false;
    for (size_t i = count(from) * count(routing.n_used); i < count(to) * count(routing.n_used); ++i) {
        if (row[i] >= 0) {
            marks[row[i]] = 1;
            any = true;
        }
    }
    return any;
}

} // namespace

void dueling_on_prefill(edge_dueling & dueling, const edge_routing & routing) {
    const size_t n_keys = count(dueling.n_blocks) * count(dueling.n_expert);
    for (int32_t block = 0; block < dueling.n_blocks; ++block) {
        uint8_t * latest = dueling.latest + count(block) * count(dueling.n_expert);
        for (int32_t token = 0; token < routing.n_tokens; ++token) {
            if (!mark_known(latest, dueling.n_expert, routing, block, token, token + 1)) {
                continue;
            }
            for (int32_t rule = 1; rule < dueling.n_rules; ++rule) {
                const float decay = dueling.decays[rule - 1];
                float * frequency =
                    dueling.frequency + count(rule - 1) * n_keys + count(block) * count(dueling.n_expert);
                scale_and_add(frequency, frequency, latest, dueling.n_expert, decay, decay, 1.0F - decay);
            }
        }
    }
}

void next_use_on_prefill(edge_next_use & next_use, const edge_routing & routing, int32_t width) {
    const int32_t n = next_use.n_expert;
    std::vector<uint8_t> demanded(count(n));
    for (int32_t block = 0; block < next_use.n_blocks; ++block) {
        float * frequency = next_use.frequency + count(block) * count(n);
        for (int32_t end = routing.n_tokens % width; end <= routing.n_tokens; end += width) { // whole steps last
            if (mark_known(demanded.data(), n, routing, block, std::max(0, end - width), end)) {
                scale_and_add(frequency, frequency, demanded.data(), n, next_use.decay, next_use.decay,
                              1.0F - next_use.decay);
            }
        }
        for (int32_t i = 0; i < n; ++i) {
            frequency[i] = std::max(frequency[i], next_use.min_frequency);
        }
    }
}

} // namespace edge
