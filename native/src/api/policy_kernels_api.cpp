// The policy kernels of the C ABI.
#include "api/guarded.h"
#include "policy/policy_kernels.h"

namespace {

using namespace edge::api;

constexpr const char * bad_routing = "the routing has another shape, or expert ids out of range";

void require_rates(const edge_prediction * now, const edge_prediction * then) {
    require((now == nullptr || now->rates != nullptr) && (then == nullptr || then->rates != nullptr),
            "a prediction has no rates");
}

void require_predictions(const edge_next_use & next_use, const edge_routing * routing, int32_t width,
                         const edge_prediction * now, const edge_prediction * then) {
    require((routing == nullptr) == (now == nullptr) && (now != nullptr || then == nullptr),
            "routing and predictions do not go together");
    if (routing != nullptr) {
        require(edge::is_valid_routing(*routing, next_use.n_blocks, next_use.n_expert), bad_routing);
        require(width > 0 && (then == nullptr || width < routing->n_tokens),
                "width must be positive and leave tokens for `then`");
    }
    require_rates(now, then);
}

} // namespace

extern "C" {

int edge_pool_demand(edge_pool * pool, const uint8_t * wanted, const float * score, int32_t * missed) {
    return guarded([&] {
        require(pool != nullptr && wanted != nullptr && score != nullptr && missed != nullptr,
                "pool, wanted, scores or out is null");
        *missed = edge::demand_of_pool(*pool, wanted, score);
    });
}

int edge_dueling_score(const edge_dueling * dueling, float * scores) {
    return guarded([&] {
        require(dueling != nullptr && scores != nullptr, "dueling or scores is null");
        edge::score_by_best_rule(*dueling, scores);
    });
}

int edge_dueling_observe(edge_dueling * dueling, const edge_routing * routing) {
    return guarded([&] {
        require(dueling != nullptr, "dueling is null");
        require(routing != nullptr && edge::is_valid_routing(*routing, dueling->n_blocks, dueling->n_expert),
                bad_routing);
        edge::observe_dueling(*dueling, *routing);
    });
}

int edge_dueling_on_prefill(edge_dueling * dueling, const edge_routing * routing) {
    return guarded([&] {
        require(dueling != nullptr, "dueling is null");
        require(routing != nullptr && edge::is_valid_or_unknown_routing(*routing, dueling->n_blocks, dueling->n_expert),
                bad_routing);
        edge::dueling_on_prefill(*dueling, *routing);
    });
}

int edge_next_use_plan(edge_next_use * next_use, const edge_routing * routing, int32_t width, edge_prediction * now,
                       edge_prediction * then, float * scores) {
    return guarded([&] {
        require(next_use != nullptr && scores != nullptr, "next_use or scores is null");
        require_predictions(*next_use, routing, width, now, then);
        edge::plan_next_use(*next_use, routing, width, now, then, scores);
    });
}

int edge_next_use_prefetch(edge_next_use * next_use, edge_hook * hook, const edge_routing * routing, int32_t width,
                           edge_prediction * now, edge_prediction * then, double min_share, float margin,
                           int32_t * n_absent, bool * finite) {
    return guarded([&] {
        edge::SlotCache & slot_cache = slot_cache_of(hook);
        require(next_use != nullptr && n_absent != nullptr, "next_use or out is null");
        const edge::ExpertTable & table = hook->table();
        require(next_use->n_blocks == static_cast<int32_t>(table.blocks.size()) && next_use->n_expert == table.n_expert,
                "the state is of other experts");
        require_predictions(*next_use, routing, width, now, then);
        edge::plan_next_use(*next_use, routing, width, now, then, slot_cache.scores());
        const uint64_t byte_budget = now != nullptr && now->rates->inside >= min_share ? UINT64_MAX : 0;
        *n_absent =
            slot_cache.prefetch(next_use->requests, now != nullptr ? now->n_found : 0, byte_budget, margin, finite);
    });
}

int edge_next_use_observe(edge_next_use * next_use, const edge_routing * routing, edge_prediction * now,
                          edge_prediction * then, const uint8_t * foreseen) {
    return guarded([&] {
        require(next_use != nullptr, "next_use is null");
        require(routing != nullptr && edge::is_valid_routing(*routing, next_use->n_blocks, next_use->n_expert),
                bad_routing);
        require_rates(now, then);
        edge::observe_next_use(*next_use, *routing, now, then, foreseen);
    });
}

int edge_next_use_on_prefill(edge_next_use * next_use, const edge_routing * routing, int32_t width) {
    return guarded([&] {
        require(next_use != nullptr && width > 0, "next_use is null or width is not positive");
        require(routing != nullptr &&
                    edge::is_valid_or_unknown_routing(*routing, next_use->n_blocks, next_use->n_expert),
                bad_routing);
        edge::next_use_on_prefill(*next_use, *routing, width);
    });
}

} // extern "C"
