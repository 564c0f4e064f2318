#include "slots.h"

#include <algorithm>

namespace edge {

SlotPool::SlotPool(int32_t n_slots, int32_t n_keys)
    : slots_(index(n_slots)), slot_of_(index(n_keys), none), scores_(index(n_keys), 0.0F) {
    free_.reserve(slots_.size());
    pinned_.reserve(slots_.size());
    for (int32_t slot = n_slots - 1; slot >= 0; --slot) {
        free_.push_back(slot);
    }
}

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

float SlotPool::worth(const Slot & slot) const {
    return scores_[index(slot.key)] + (slot.expected_window == window_ ? slot.expectation : 0.0F);
}

bool SlotPool::cheaper(const Slot & a, const Slot & b) const {
    const float worth_a = worth(a);
    const float worth_b = worth(b);
    return worth_a < worth_b || (worth_a == worth_b && a.last_use < b.last_use);
}

int32_t SlotPool::victim(float price) const {
    int32_t best = none;
    for (int32_t i = 0; i < n_slots(); ++i) {
        const Slot & slot = at(i);
        if (!slot.loading && !slot.pinned && (best == none || cheaper(slot, at(best)))) {
            best = i;
        }
    }
    return best != none && (price == any_price || worth(at(best)) < price) ? best : none;
}

int32_t SlotPool::take(int32_t key, float price) {
    int32_t i = none;
    if (!free_.empty()) {
        i = free_.back();
        free_.pop_back();
    } else if ((i = victim(price)) == none) {
        return none;
    } else {
        slot_of_[index(at(i).key)] = none;
    }
    Slot & slot = at(i);
    slot = Slot{};
    slot.key             = key;
    slot.loading         = true;
    slot.last_use        = ++clock_;
    slot_of_[index(key)] = i;
    return i;
}

int32_t SlotPool::prefetch(int32_t key, float expectation) {
    return mark_prefetch(take(key, scores_[index(key)] + expectation), expectation);
}

int32_t SlotPool::take_ahead(int32_t key, float expectation) {
    return mark_prefetch(take(key, any_price), expectation);
}

int32_t SlotPool::mark_prefetch(int32_t slot, float expectation) {
    if (slot != none) {
        at(slot).unused_prefetch = true;
        expect(slot, expectation);
    }
    return slot;
}

void SlotPool::drop(int32_t slot) {
    slot_of_[index(at(slot).key)] = none;
    at(slot) = Slot{};
    free_.push_back(slot);
}

void SlotPool::pin(int32_t slot) {
    at(slot).pinned = true;
    pinned_.push_back(slot);
}

void SlotPool::unpin_all() {
    for (const int32_t slot : pinned_) {
        at(slot).pinned = false;
    }
    pinned_.clear();
}

void SlotPool::use(int32_t slot) {
    at(slot).last_use        = ++clock_;
    at(slot).expected_window = 0;
    at(slot).unused_prefetch = false;
}

void SlotPool::expect(int32_t slot, float expectation) {
    at(slot).expectation     = expectation;
    at(slot).expected_window = window_;
}

std::vector<int32_t> SlotPool::most_worth(int32_t n) const {
    std::vector<const Slot *> held;
    for (const Slot & slot : slots_) {
        if (slot.key != none && !slot.loading) {
            held.push_back(&slot);
        }
    }
    std::sort(held.begin(), held.end(), [this](const Slot * a, const Slot * b) { return cheaper(*b, *a); });
    held.resize(std::min(held.size(), index(std::max(n, 0))));
    std::vector<int32_t> keys;
    for (const Slot * slot : held) {
        keys.push_back(slot->key);
    }
    return keys;
}

} // namespace edge
