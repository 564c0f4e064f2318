// What a prompt leaves in slots: experts that travel to the device for it anyway, and that the text after it will want.
#include "residency.h"

#include <algorithm>

namespace edge {

namespace {

// As many misses are spared as with every swap that has something for it, with a third fewer copies (docs/performance.md).
bool clearly_more(float wanted, float held) { return wanted > 1.5F * held + 1.0F; }

} // namespace

int32_t Residency::lend(int32_t number, int32_t expert) {
    const ExpertBlock & block = block_at(number);
    const Lock lock(mutex_);
    if (number == swaps_block_) {
        const auto swap = std::find_if(swaps_.begin(), swaps_.end(), [expert](const Swap & s) { return s.gone == expert || s.expert == expert; });
        if (swap != swaps_.end()) {
            return swap->slot; // pinned
        }
    }
    const int32_t slot = serving() ? pool(block).find(block.first_key + expert) : SlotPool::none;
    if (slot == SlotPool::none || pool(block).loading(slot)) {
        return SlotPool::none;
    }
    if (pool(block).state(block.first_key + expert) != SlotState::pinned) {
        pool(block).pin(slot);
    }
    return slot;
}

// Within the block, so that no other block lends less to the rest of the prompt. Experts that something is bringing stay.
const std::vector<Residency::Swap> & Residency::begin_swaps(int32_t number, const float * wanted) {
    const ExpertBlock & block = block_at(number);
    const Lock lock(mutex_);
    drop_swaps();
    if (!serving() || clock_) {
        return swaps_;
    }
    SlotPool & slots = pool(block);
    std::vector<int32_t> held, absent;
    for (int32_t expert = 0; expert < table_.n_expert; ++expert) {
        const SlotState state = slots.state(block.first_key + expert);
        if (state == SlotState::absent) {
            absent.push_back(expert);
        } else if (state != SlotState::loading) {
            held.push_back(expert);
        }
    }
    std::stable_sort(held.begin(), held.end(), [wanted](int32_t a, int32_t b) { return wanted[a] < wanted[b]; });
    std::stable_sort(absent.begin(), absent.end(), [wanted](int32_t a, int32_t b) { return wanted[a] > wanted[b]; });
    for (size_t i = 0; i < std::min(held.size(), absent.size()) && clearly_more(wanted[absent[i]], wanted[held[i]]); ++i) {
        const int32_t slot = slots.find(block.first_key + held[i]);
        slots.give(slot, block.first_key + absent[i]);
        swaps_.push_back({ slot, held[i], absent[i] });
    }
    swaps_block_ = number;
    for (int32_t expert = 0; expert < table_.n_expert; ++expert) {
        const int32_t key  = block.first_key + expert;
        const int32_t slot = slots.find(key);
        if (slot != SlotPool::none && wanted[expert] > 0) {
            wanted_by_prompt_.push_back({ wanted[expert], block.group, slot, key });
        }
    }
    return swaps_;
}

void Residency::end_swaps() {
    const Lock lock(mutex_);
    for (const Swap & swap : swaps_) {
        pool(block_at(swaps_block_)).loaded(swap.slot);
    }
    swaps_.clear();
    swaps_block_ = -1;
    loaded_.notify_all();
}

// Slots that got only some of an expert's matrices hold nothing.
void Residency::drop_swaps() {
    for (const Swap & swap : swaps_) {
        pool(block_at(swaps_block_)).drop(swap.slot);
    }
    swaps_.clear();
    swaps_block_ = -1;
}

// What the prompt wanted counts as used, the most wanted last.
void Residency::settle_swaps() {
    drop_swaps();
    std::stable_sort(wanted_by_prompt_.begin(), wanted_by_prompt_.end(), [](const Wanted & a, const Wanted & b) { return a.weight < b.weight; });
    for (const Wanted & w : wanted_by_prompt_) {
        SlotPool & slots = pools_[static_cast<size_t>(w.group)];
        if (slots.find(w.key) == w.slot) {
            slots.touch(w.slot);
        }
    }
    wanted_by_prompt_.clear();
}

} // namespace edge
