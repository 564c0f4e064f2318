#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edge {

enum class SlotState : uint8_t { absent = 0, loading = 1, resident = 2, pinned = 3 };

// Which expert lies in which slot of one group. Pure bookkeeping: no ggml, no lock, no copy; the owner
// serialises access. Keys are dense expert numbers 0..n_keys-1 of the group (block-major).
//
// A slot's life: free -> loading -> resident -> free. Pinned slots (read by the graph that is running)
// and loading slots are never victims. Victims are the least recently used; those that foresight expects
// in the coming step go last.
class SlotPool {
public:
    static constexpr int32_t none = -1;

    SlotPool(int32_t n_slots, int32_t n_keys);

    int32_t find(int32_t key) const { return slot_of_[index(key)]; } // slot or none, loading ones included
    SlotState state(int32_t key) const;
    bool loading(int32_t slot) const { return at(slot).loading; }
    int32_t key_of(int32_t slot) const { return at(slot).key; }
    int32_t n_slots() const { return static_cast<int32_t>(slots_.size()); }

    // Takes a slot for key, evicting if it must; the slot is loading until loaded(). none: every slot is
    // pinned, loading or, for a prefetch, expected.
    int32_t take(int32_t key, bool prefetch);
    void loaded(int32_t slot) { at(slot).loading = false; }

    void pin(int32_t slot) { at(slot).pinned = true; }
    void unpin_all();
    void use(int32_t slot);              // the graph reads it now: most recent, no longer expected
    void expect(int32_t slot);           // foresight: keep until used or until forget_expected()
    void forget_expected() { ++window_; }

    bool prefetched_unused(int32_t slot) const { return at(slot).unused_prefetch; }

private:
    struct Slot {
        int32_t  key             = none;
        uint64_t last_use        = 0;
        uint64_t expected_window = 0;
        bool     loading         = false;
        bool     pinned          = false;
        bool     unused_prefetch = false;
    };

    static size_t index(int32_t i) { return static_cast<size_t>(i); }
    Slot & at(int32_t slot) { return slots_[index(slot)]; }
    const Slot & at(int32_t slot) const { return slots_[index(slot)]; }
    bool expected(const Slot & slot) const { return slot.expected_window == window_; }
    int32_t victim(bool prefetch) const;

    std::vector<Slot>    slots_;
    std::vector<int32_t> slot_of_;
    uint64_t             clock_  = 0;
    uint64_t             window_ = 1;
};

} // namespace edge
