#pragma once

#include "edge_speq.h"

#include <cstddef>
#include <cstdint>

namespace edge {

inline size_t count(int32_t n) { return static_cast<size_t>(n); }

// Whether routing is that of so many blocks and experts. Out of range, its ids would be written anywhere.
bool is_sound(const edge_ids & routing, int32_t n_blocks, int32_t n_expert);
bool is_sound_or_unknown(const edge_ids & routing, int32_t n_blocks, int32_t n_expert); // with ids of -1

// The passes over all experts that policies make; edge_speq.h says what the structures hold. Routing is sound.
void score_by_best(const edge_duel & duel, float * scores);
void observe_duel(edge_duel & duel, const edge_ids & routing);
void read_duel(edge_duel & duel, const edge_ids & routing);
void foresee_waits(edge_waits & waits, const edge_ids * routing, int32_t width, edge_guess * now, edge_guess * then, float * scores);
void observe_waits(edge_waits & waits, const edge_ids & routing, edge_guess * now, edge_guess * then, const uint8_t * foreseen);
void read_waits(edge_waits & waits, const edge_ids & routing, int32_t width);

int32_t demand_of_pool(edge_pool & pool, const uint8_t * wanted, const float * worth); // misses

// to = from * (outside, or inside of the marks) + (added, inside of the marks). Products instead of branches: which way
// these go is as good as random.
void scale_and_add(float * to, const float * from, const uint8_t * marks, int32_t n, float outside, float inside, float added);

} // namespace edge
