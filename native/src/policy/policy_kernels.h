#pragma once

#include "edge_speq.h"

#include <cstddef>
#include <cstdint>

namespace edge {

inline size_t count(int32_t n) { return static_cast<size_t>(n); }

// Return true if routing has these blocks and experts. Ids out of range would write out of bounds.
bool is_valid_routing(const edge_routing & routing, int32_t n_blocks, int32_t n_expert);
bool is_valid_or_unknown_routing(const edge_routing & routing, int32_t n_blocks, int32_t n_expert); // ids of -1 allowed

// Passes over all experts that policies make; edge_speq.h documents the structures. Routing must be valid.
void score_by_best_rule(const edge_dueling & dueling, float * scores);
void observe_dueling(edge_dueling & dueling, const edge_routing & routing);
void dueling_on_prefill(edge_dueling & dueling, const edge_routing & routing);
void plan_next_use(edge_next_use & next_use, const edge_routing * routing, int32_t width, edge_prediction * now,
                   edge_prediction * then, float * scores);
void observe_next_use(edge_next_use & next_use, const edge_routing & routing, edge_prediction * now,
                      edge_prediction * then, const uint8_t * foreseen);
void next_use_on_prefill(edge_next_use & next_use, const edge_routing & routing, int32_t width);

int32_t demand_of_pool(edge_pool & pool, const uint8_t * wanted, const float * score); // returns the misses

// to = from * (outside, or inside where marked) + (added where marked). Products instead of branches, which would be
// mispredicted.
void scale_and_add(float * to, const float * from, const uint8_t * marks, int32_t n, float outside, float inside,
                   float added);

} // namespace edge
