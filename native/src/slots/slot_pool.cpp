#include "slots/slot_pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace edge {

SlotPool::SlotPool(int32_t n_slots, int32_t n_keys)
    : slots_(index(n_slots)), slot_of_(index(n_keys), none), scores_(index(n_keys), 0.0F),
      expected_(index(n_slots), 0.0F) {
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

// Test the exponent bits, since comparing integers vectorises.
bool SlotPool::score(int32_t first, const float * values, int32_t n) {
    constexpr uint32_t exponent = 0x7F800000U; // all ones in infinities and NaNs
    float * scores = scores_.data() + index(first);
    uint32_t odd = 0;
    for (int32_t i = 0; i < n; ++i) {
        uint32_t bits = 0;
        std::memcpy(&bits, values + i, sizeof bits);
        odd |= static_cast<uint32_t>((bits & exponent) == exponent);
    }
    std::copy(values, values + n, scores);
    if (odd != 0) {
        std::replace_if(scores, scores + n, [](float value) { return !std::isfinite(value); }, 0.0F);
    }
    return odd == 0;
}

void SlotPool::forget_expected() { std::fill(expected_.begin(), expected_.end(), 0.0F); }

bool SlotPool::evicted_before(int32_t a, int32_t b) const {
    const float worth_a = total_score(a);
    const float worth_b = total_score(b);
    return worth_a < worth_b || (worth_a == worth_b && at(a).last_use < at(b).last_use);
}

int32_t SlotPool::victim(float max_score) const {
    int32_t best = none;
    for (int32_t i = 0; i < n_slots(); ++i) {
        const Slot & slot = at(i);
        if (!slot.loading && !slot.pinned && (best == none || evicted_before(i, best))) {
            best = i;
        }
    }
    return best != none && (max_score == any_score || total_score(best) < max_score) ? best : none;
}

int32_t SlotPool::take(int32_t key, float max_score) {
    int32_t i = none;
    if (!free_.empty()) {
        i = free_.back();
        free_.pop_back();
    } else if ((i = victim(max_score)) == none) {
        return none;
    } else {
        slot_of_[index(at(i).key)] = none;
    }
    Slot & slot = at(i);
    slot = Slot{};
    slot.key = key;
    slot.loading = true;
    slot.last_use = ++clock_;
    expected_[index(i)] = 0.0F;
    slot_of_[index(key)] = i;
    return i;
}

int32_t SlotPool::prefetch(int32_t key, float expectation) {
    return mark_prefetch(take(key, scores_[index(key)] + expectation), expectation);
}

int32_t SlotPool::take_for_next_layer(int32_t key, float expectation) {
    return mark_prefetch(take(key, any_score), expectation);
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
    expected_[index(slot)] = 0.0F;
    free_.push_back(slot);
}

void SlotPool::reassign(int32_t slot, int32_t key) {
    slot_of_[index(at(slot).key)] = none;
    at(slot) = Slot{};
    at(slot).key = key;
    at(slot).loading = true;
    expected_[index(slot)] = 0.0F;
    slot_of_[index(key)] = slot;
    touch(slot);
    pin(slot);
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
    at(slot).last_use = ++clock_;
    at(slot).unused_prefetch = false;
    expected_[index(slot)] = 0.0F;
}

std::vector<int32_t> SlotPool::highest_scored(int32_t n) const {
    std::vector<int32_t> held;
    for (int32_t slot = 0; slot < n_slots(); ++slot) {
        if (at(slot).key != none && !at(slot).loading) {
            held.push_back(slot);
        }
    }
    std::sort(held.begin(), held.end(), [this](int32_t a, int32_t b) { return evicted_before(b, a); });
    held.resize(std::min(held.size(), index(std::max(n, 0))));
    std::vector<int32_t> keys;
    for (const int32_t slot : held) {
        keys.push_back(key_of(slot));
    }
    return keys;
}

} // namespace edge
