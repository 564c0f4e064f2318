// What policies learn from a prompt: how often its last tokens demanded experts.
#include "reckoning.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

namespace edge {

namespace {

// Marks the experts of a block that tokens [from, to) chose, as far as that is known. Whether any is.
bool mark_known(uint8_t * marks, int32_t n_expert, const edge_ids & routing, int32_t block, int32_t from, int32_t to) {
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

void read_duel(edge_duel & duel, const edge_ids & routing) {
    const size_t n_keys = count(duel.n_blocks) * count(duel.n_expert);
    for (int32_t block = 0; block < duel.n_blocks; ++block) {
        uint8_t * latest = duel.latest + count(block) * count(duel.n_expert);
        for (int32_t token = 0; token < routing.n_tokens; ++token) {
            if (!mark_known(latest, duel.n_expert, routing, block, token, token + 1)) {
                continue;
            }
            for (int32_t rule = 1; rule < duel.n_rules; ++rule) {
                const float decay = duel.decays[rule - 1];
                float * often = duel.often + count(rule - 1) * n_keys + count(block) * count(duel.n_expert);
                scale_and_add(often, often, latest, duel.n_expert, decay, decay, 1.0F - decay);
            }
        }
    }
}

void read_waits(edge_waits & waits, const edge_ids & routing, int32_t width) {
    const int32_t n = waits.n_expert;
    std::vector<uint8_t> demanded(count(n));
    for (int32_t block = 0; block < waits.n_blocks; ++block) {
        float * often = waits.often + count(block) * count(n);
        for (int32_t end = routing.n_tokens % width; end <= routing.n_tokens; end += width) { // whole steps last
            if (mark_known(demanded.data(), n, routing, block, std::max(0, end - width), end)) {
                scale_and_add(often, often, demanded.data(), n, waits.decay, waits.decay, 1.0F - waits.decay);
            }
        }
        for (int32_t i = 0; i < n; ++i) {
            often[i] = std::max(often[i], waits.least);
        }
    }
}

} // namespace edge
