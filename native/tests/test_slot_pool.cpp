// SlotPool against the rules of an LRU cache with pins and expectations, and against a model of itself.
#include "check.h"
#include "slots/slot_pool.h"

#include <algorithm>
#include <map>
#include <random>
#include <vector>

using edge::SlotPool;
using edge::SlotState;

namespace {

int32_t load(SlotPool & pool, int32_t key) {
    const int32_t slot = pool.take(key, SlotPool::any_score);
    CHECK(slot != SlotPool::none);
    CHECK(pool.state(key) == SlotState::loading);
    pool.loaded(slot);
    return slot;
}

void the_least_recently_used_goes_first() {
    SlotPool pool(3, 10);
    for (int32_t key : { 0, 1, 2 }) {
        pool.use(load(pool, key));
    }
    pool.use(pool.find(0));
    load(pool, 5);
    CHECK(pool.state(1) == SlotState::absent);
    CHECK(pool.state(0) == SlotState::resident && pool.state(2) == SlotState::resident);
}

void pinned_and_loading_slots_stay() {
    SlotPool pool(3, 10);
    pool.pin(load(pool, 0));
    pool.take(1, SlotPool::any_score); // still loading
    load(pool, 2);
    load(pool, 3);
    CHECK(pool.state(0) == SlotState::pinned && pool.state(1) == SlotState::loading);
    CHECK(pool.state(2) == SlotState::absent && pool.state(3) == SlotState::resident);
    pool.pin(pool.find(3));
    CHECK(pool.take(4, SlotPool::any_score) == SlotPool::none);
    pool.unpin_all();
    CHECK(pool.take(4, SlotPool::any_score) != SlotPool::none);
}

void the_lowest_score_goes_first_whatever_its_age() {
    SlotPool pool(3, 10);
    for (int32_t key : { 0, 1, 2 }) {
        pool.score(key, static_cast<float>(2 - key));
        pool.use(load(pool, key));
    }
    pool.expect(pool.find(2), 3.0F); // the newest and of score 0, but expected
    load(pool, 3);
    CHECK(pool.state(1) == SlotState::absent && pool.state(2) == SlotState::resident);
    pool.use(pool.find(2)); // its expectation is met
    load(pool, 4);
    CHECK(pool.state(3) == SlotState::absent); // equals: 3 was never used since
    load(pool, 5);
    CHECK(pool.state(2) == SlotState::absent && pool.state(0) == SlotState::resident);
}

void a_prefetch_evicts_only_lower_scores() {
    SlotPool pool(2, 10);
    pool.score(0, 1.0F);
    pool.score(1, 2.0F);
    pool.score(2, 0.5F);
    pool.use(load(pool, 0));
    pool.use(load(pool, 1));
    CHECK(pool.prefetch(2, 0.5F) == SlotPool::none); // scores as much as the lowest
    const int32_t slot = pool.prefetch(2, 0.75F);
    CHECK(slot != SlotPool::none && pool.state(0) == SlotState::absent);
    CHECK(pool.prefetch(3, 9.0F) != SlotPool::none && pool.state(1) == SlotState::absent); // loading ones stay
    CHECK(pool.prefetch(4, 9.0F) == SlotPool::none);
    pool.loaded(slot);
    pool.forget_expected();
    CHECK(pool.prefetch(4, 0.6F) != SlotPool::none && pool.state(2) == SlotState::absent);
}

void a_prefetch_is_unused_until_used() {
    SlotPool pool(2, 10);
    const int32_t slot = pool.prefetch(7, 1.0F);
    pool.loaded(slot);
    CHECK(pool.prefetched_unused(slot));
    pool.use(slot);
    CHECK(!pool.prefetched_unused(slot));
    CHECK(!pool.prefetched_unused(load(pool, 8)));
}

void a_dropped_slot_is_free_again() {
    SlotPool pool(1, 10);
    pool.drop(pool.take(3, SlotPool::any_score));
    CHECK(pool.state(3) == SlotState::absent);
    CHECK(load(pool, 4) == 0 && pool.key_of(0) == 4);
}

void the_highest_scores_are_named_in_order() {
    SlotPool pool(4, 10);
    for (int32_t key : { 0, 1, 2 }) {
        pool.use(load(pool, key));
    }
    pool.take(3, SlotPool::any_score); // loading: not resident yet
    pool.score(0, 1.0F);
    CHECK((pool.highest_scored(9) == std::vector<int32_t>{ 0, 2, 1 }));
    CHECK((pool.highest_scored(1) == std::vector<int32_t>{ 0 }));
}

// Random operations: lookups stay a bijection between keys and slots, and no pinned or loading key is lost.
void lookups_stay_consistent(unsigned seed) {
    std::mt19937 random(seed);
    const int32_t n_slots = 1 + static_cast<int32_t>(random() % 8);
    const int32_t n_keys = n_slots + static_cast<int32_t>(random() % 20);
    SlotPool pool(n_slots, n_keys);
    std::map<int32_t, bool> held; // key -> still loading
    std::vector<int32_t> pinned;
    const auto value = [&] { return static_cast<float>(random() % 4); };
    for (int step = 0; step < 2000; ++step) {
        const int32_t key = static_cast<int32_t>(random() % static_cast<unsigned>(n_keys));
        const int32_t slot = pool.find(key);
        CHECK((slot != SlotPool::none) == (held.count(key) == 1));
        switch (random() % 8) {
            case 0:
            case 1:
                if (slot == SlotPool::none) {
                    const bool ahead = random() % 2 == 0;
                    const int32_t taken = ahead ? pool.prefetch(key, value()) : pool.take(key, SlotPool::any_score);
                    if (taken != SlotPool::none) {
                        for (auto it = held.begin(); it != held.end();) {
                            const bool gone = pool.find(it->first) == SlotPool::none;
                            CHECK(!gone || (!it->second && std::count(pinned.begin(), pinned.end(), it->first) == 0));
                            it = gone ? held.erase(it) : std::next(it);
                        }
                        held[key] = true;
                        CHECK(pool.key_of(taken) == key);
                    }
                }
                break;
            case 2:
                if (slot != SlotPool::none && held[key]) {
                    pool.loaded(slot);
                    held[key] = false;
                }
                break;
            case 3:
                if (slot != SlotPool::none && !held[key]) {
                    pool.use(slot);
                    pool.pin(slot);
                    pinned.push_back(key);
                }
                break;
            case 4:
                pool.unpin_all();
                pinned.clear();
                break;
            case 5:
                pool.score(key, value());
                break;
            case 6:
                if (slot != SlotPool::none && held[key]) {
                    pool.drop(slot);
                    held.erase(key);
                }
                break;
            default:
                if (slot != SlotPool::none) {
                    pool.expect(slot, value());
                } else {
                    pool.forget_expected();
                }
        }
        CHECK(held.size() <= static_cast<size_t>(n_slots));
    }
}

} // namespace

int main() {
    the_least_recently_used_goes_first();
    pinned_and_loading_slots_stay();
    the_lowest_score_goes_first_whatever_its_age();
    a_prefetch_evicts_only_lower_scores();
    a_prefetch_is_unused_until_used();
    a_dropped_slot_is_free_again();
    the_highest_scores_are_named_in_order();
    for (unsigned seed = 0; seed < 50; ++seed) {
        lookups_stay_consistent(seed);
    }
    std::puts("slot_pool: ok");
}
