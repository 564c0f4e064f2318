#include "slots.h"

#include <tuple>

namespace edge {

SlotPool::SlotPool(int32_t n_slots, int32_t n_keys) : slots_(index(n_slots)), slot_of_(index(n_keys), none) {}

SlotState SlotPool::state(int32_t key) const {
    const int32_t slot = find(key);
    if (slot == none) {
        return SlotState::absent;
    }
    if (at(slot).loading) {
        return SlotState::loading;
    }
    return at(slot).pinned ? SlotState::pinned : SlotState::resident;
}

int32_t SlotPool::victim(bool prefetch) const {
    int32_t best = none;
    for (int32_t i = 0; i < n_slots(); ++i) {
        const Slot & slot = at(i);
        if (slot.key == none) {
            return i;
        }
        if (slot.loading || slot.pinned || (prefetch && expected(slot))) {
            continue;
        }
        if (best == none || std::make_tuple(expected(slot), slot.last_use) <
                                std::make_tuple(expected(at(best)), at(best).last_use)) {
            best = i;
        }
    }
    return best;
}

int32_t SlotPool::take(int32_t key, bool prefetch) {
    const int32_t i = victim(prefetch);
    if (i == none) {
        return none;
    }
    Slot & slot = at(i);
    if (slot.key != none) {
        slot_of_[index(slot.key)] = none;
    }
    slot = Slot{};
    slot.key             = key;
    slot.loading         = true;
    slot.unused_prefetch = prefetch;
    slot.last_use        = ++clock_;
    slot.expected_window = prefetch ? window_ : 0;
    slot_of_[index(key)] = i;
    return i;
}

void SlotPool::unpin_all() {
    for (Slot & slot : slots_) {
        slot.pinned = false;
    }
}

void SlotPool::use(int32_t slot) {
    at(slot).last_use        = ++clock_;
    at(slot).expected_window = 0;
    at(slot).unused_prefetch = false;
}

void SlotPool::expect(int32_t slot) {
    at(slot).expected_window = window_;
}

} // namespace edge
