#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace edge {

enum class SlotState : uint8_t { absent = 0, loading = 1, resident = 2, pinned = 3 };

// Which expert is in which slot of one group. Pure bookkeeping: no ggml, no lock, no copy; the owner serialises access.
// Keys are dense expert numbers 0..n_keys-1 of the group, block-major.
//
// Life of a slot: free -> loading -> resident -> free. Pinned slots, which the running graph reads, and loading slots
// are never evicted. The total score of a slot is its key's long-term score plus its expectation for the coming step.
// Eviction takes the lowest total score, the least recently used slot among equals.
class SlotPool {
public:
    static constexpr int32_t none = -1;
    static constexpr float any_score = std::numeric_limits<float>::infinity();

    SlotPool(int32_t n_slots, int32_t n_keys);

    int32_t find(int32_t key) const { return slot_of_[index(key)]; } // slot or none; includes loading slots
    SlotState state(int32_t key) const;
    bool loading(int32_t slot) const { return at(slot).loading; }
    int32_t key_of(int32_t slot) const { return at(slot).key; }
    int32_t n_slots() const { return static_cast<int32_t>(slots_.size()); }
    int32_t n_keys() const { return static_cast<int32_t>(slot_of_.size()); }

    // Take a slot for key, if necessary by evicting one with a total score under max_score. It is loading until
    // loaded() or drop(). none: every slot is pinned, loading or scores too high.
    int32_t take(int32_t key, float max_score);
    int32_t prefetch(int32_t key, float expectation); // take() at the key's own total score, marked as a prefetch
    int32_t take_for_next_layer(int32_t key, float expectation); // take() at any score, marked as a prefetch
    void loaded(int32_t slot) { at(slot).loading = false; }
    void drop(int32_t slot); // nothing arrived: free it
    void reassign(int32_t slot, int32_t key); // to another key, pinned and loading until loaded() or drop()
    void touch(int32_t slot) { at(slot).last_use = ++clock_; } // most recent, though no graph read it

    void pin(int32_t slot);
    void unpin_all();
    void use(int32_t slot); // the graph reads it now: most recent, expectation met
    // Expect uses of a slot, until use() or forget_expected().
    void expect(int32_t slot, float expectation) { expected_[index(slot)] = expectation; }
    void forget_expected();
    void demote(int32_t slot) {
        at(slot).last_use = 0;
        expect(slot, 0.0F);
    } // unused: evicted next among equals
    void score(int32_t key, float value) { scores_[index(key)] = value; }
    // Score keys first to first + n - 1. False if some values were not finite; they count as 0.
    bool score(int32_t first, const float * values, int32_t n);
    float score_of(int32_t key) const { return scores_[index(key)]; }

    bool prefetched_unused(int32_t slot) const { return at(slot).unused_prefetch; }
    int32_t n_free() const { return static_cast<int32_t>(free_.size()); }
    bool full() const { return free_.empty() && n_slots() == n_keys(); } // holds all keys, so nothing is ever evicted
    std::vector<int32_t> highest_scored(int32_t n) const; // keys of at most n resident experts, by falling score

private:
    struct Slot {
        int32_t key = none;
        uint64_t last_use = 0;
        bool loading = false;
        bool pinned = false;
        bool unused_prefetch = false;
    };

    static size_t index(int32_t i) { return static_cast<size_t>(i); }
    Slot & at(int32_t slot) { return slots_[index(slot)]; }
    const Slot & at(int32_t slot) const { return slots_[index(slot)]; }
    float total_score(int32_t slot) const { return scores_[index(at(slot).key)] + expected_[index(slot)]; }
    bool evicted_before(int32_t a, int32_t b) const;
    int32_t victim(float max_score) const;
    int32_t mark_prefetch(int32_t slot, float expectation);

    std::vector<Slot> slots_;
    std::vector<int32_t> free_; // slots without a key
    std::vector<int32_t> pinned_; // may hold duplicates
    std::vector<int32_t> slot_of_;
    std::vector<float> scores_;
    std::vector<float> expected_; // of each slot; apart from Slot, since a step sets hundreds of them in a cold cache
    uint64_t clock_ = 0;
};

} // namespace edge
