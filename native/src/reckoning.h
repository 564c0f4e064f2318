#pragma once

#include "edge_speq.h"

#include <cstdint>

namespace edge {

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

} // namespace edge
