// The C ABI's part that policies reckon with.
#include "guarded.h"
#include "reckoning.h"

namespace {

using namespace edge::api;

constexpr const char * bad_routing = "the routing is of another shape, or of experts that there are not";

void require_guesses(const edge_guess * now, const edge_guess * then) {
    require((now == nullptr || now->rates != nullptr) && (then == nullptr || then->rates != nullptr), "a guess has no rates");
}

void require_foresight(const edge_waits & waits, const edge_ids * routing, int32_t width, const edge_guess * now, const edge_guess * then) {
    require((routing == nullptr) == (now == nullptr) && (now != nullptr || then == nullptr), "routing and guesses do not go together");
    if (routing != nullptr) {
        require(edge::is_sound(*routing, waits.n_blocks, waits.n_expert), bad_routing);
        require(width > 0 && (then == nullptr || width < routing->n_tokens), "no routing is that wide");
    }
    require_guesses(now, then);
}

} // namespace

extern "C" {

int edge_pool_demand(edge_pool * pool, const uint8_t * wanted, const float * worth, int32_t * missed) {
    return guarded([&] {
        require(pool != nullptr && wanted != nullptr && worth != nullptr && missed != nullptr, "pool, wanted, worth or out is null");
        *missed = edge::demand_of_pool(*pool, wanted, worth);
    });
}

int edge_duel_score(const edge_duel * duel, float * scores) {
    return guarded([&] {
        require(duel != nullptr && scores != nullptr, "duel or scores is null");
        edge::score_by_best(*duel, scores);
    });
}

int edge_duel_observe(edge_duel * duel, const edge_ids * routing) {
    return guarded([&] {
        require(duel != nullptr, "duel is null");
        require(routing != nullptr && edge::is_sound(*routing, duel->n_blocks, duel->n_expert), bad_routing);
        edge::observe_duel(*duel, *routing);
    });
}

int edge_duel_read(edge_duel * duel, const edge_ids * routing) {
    return guarded([&] {
        require(duel != nullptr, "duel is null");
        require(routing != nullptr && edge::is_sound_or_unknown(*routing, duel->n_blocks, duel->n_expert), bad_routing);
        edge::read_duel(*duel, *routing);
    });
}

int edge_waits_foresee(edge_waits * waits, const edge_ids * routing, int32_t width, edge_guess * now, edge_guess * then, float * scores) {
    return guarded([&] {
        require(waits != nullptr && scores != nullptr, "waits or scores is null");
        require_foresight(*waits, routing, width, now, then);
        edge::foresee_waits(*waits, routing, width, now, then, scores);
    });
}

int edge_waits_prefetch(edge_waits * waits, edge_hook * hook, const edge_ids * routing, int32_t width, edge_guess * now, edge_guess * then,
                        double least, float margin, int32_t * n_ordered, bool * sound) {
    return guarded([&] {
        edge::Residency & residency = residency_of(hook);
        require(waits != nullptr && n_ordered != nullptr, "waits or out is null");
        const edge::ExpertTable & table = hook->table();
        require(waits->n_blocks == static_cast<int32_t>(table.blocks.size()) && waits->n_expert == table.n_expert, "waits are of other experts");
        require_foresight(*waits, routing, width, now, then);
        edge::foresee_waits(*waits, routing, width, now, then, residency.scores());
        const uint64_t byte_budget = now != nullptr && now->rates->inside >= least ? UINT64_MAX : 0;
        *n_ordered = residency.prefetch(waits->orders, now != nullptr ? now->n_found : 0, byte_budget, margin, sound);
    });
}

int edge_waits_observe(edge_waits * waits, const edge_ids * routing, edge_guess * now, edge_guess * then, const uint8_t * foreseen) {
    return guarded([&] {
        require(waits != nullptr, "waits is null");
        require(routing != nullptr && edge::is_sound(*routing, waits->n_blocks, waits->n_expert), bad_routing);
        require_guesses(now, then);
        edge::observe_waits(*waits, *routing, now, then, foreseen);
    });
}

int edge_waits_read(edge_waits * waits, const edge_ids * routing, int32_t width) {
    return guarded([&] {
        require(waits != nullptr && width > 0, "waits is null, or steps of no token");
        require(routing != nullptr && edge::is_sound_or_unknown(*routing, waits->n_blocks, waits->n_expert), bad_routing);
        edge::read_waits(*waits, *routing, width);
    });
}

} // extern "C"
