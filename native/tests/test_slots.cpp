// SlotPool against what an LRU cache with pins and expectations must do, and against a model of itself.
#include "check.h"
#include "slots.h"

#include <algorithm>
#include <map>
#include <random>
#include <vector>

using edge::SlotPool;
using edge::SlotState;

namespace {

int32_t load(SlotPool & pool, int32_t key, bool prefetch = false) {
    const int32_t slot = pool.take(key, prefetch);
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
    pool.take(1, false); // still loading
    load(pool, 2);
    load(pool, 3);
    CHECK(pool.state(0) == SlotState::pinned && pool.state(1) == SlotState::loading);
    CHECK(pool.state(2) == SlotState::absent && pool.state(3) == SlotState::resident);
    pool.pin(pool.find(3));
    CHECK(pool.take(4, false) == SlotPool::none);
    pool.unpin_all();
    CHECK(pool.take(4, false) != SlotPool::none);
}

void expected_slots_go_last_and_never_for_a_prefetch() {
    SlotPool pool(2, 10);
    pool.use(load(pool, 0));
    pool.use(load(pool, 1));
    pool.expect(pool.find(0)); // older, but foreseen
    load(pool, 2);
    CHECK(pool.state(0) == SlotState::resident && pool.state(1) == SlotState::absent);
    pool.expect(pool.find(2));
    CHECK(pool.take(3, true) == SlotPool::none);
    CHECK(pool.take(3, false) != SlotPool::none); // a demand must be served
    pool.forget_expected();
    CHECK(pool.take(4, true) != SlotPool::none);
}

void a_prefetch_is_unused_until_used() {
    SlotPool pool(2, 10);
    const int32_t slot = load(pool, 7, true);
    CHECK(pool.prefetched_unused(slot));
    pool.use(slot);
    CHECK(!pool.prefetched_unused(slot));
    CHECK(!pool.prefetched_unused(load(pool, 8)));
}

// Random operations: lookups stay a bijection between keys and slots, and no pinned or loading key is lost.
void lookups_stay_consistent(unsigned seed) {
    std::mt19937 random(seed);
    const int32_t n_slots = 1 + static_cast<int32_t>(random() % 8);
    const int32_t n_keys  = n_slots + static_cast<int32_t>(random() % 20);
    SlotPool pool(n_slots, n_keys);
    std::map<int32_t, bool> held; // key -> still loading
    std::vector<int32_t> pinned;
    for (int step = 0; step < 2000; ++step) {
        const int32_t key  = static_cast<int32_t>(random() % static_cast<unsigned>(n_keys));
        const int32_t slot = pool.find(key);
        CHECK((slot != SlotPool::none) == (held.count(key) == 1));
        switch (random() % 6) {
            case 0:
            case 1:
                if (slot == SlotPool::none) {
                    const int32_t taken = pool.take(key, random() % 2 == 0);
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
            default:
                if (slot != SlotPool::none) {
                    pool.expect(slot);
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
    expected_slots_go_last_and_never_for_a_prefetch();
    a_prefetch_is_unused_until_used();
    for (unsigned seed = 0; seed < 50; ++seed) {
        lookups_stay_consistent(seed);
    }
    std::puts("slots: ok");
}
