// Admission from prefill: its graphs copy experts to the device anyway, and the text after it demands many of them.
#include "slots/slot_cache.h"

#include <algorithm>

namespace edge {

namespace {

// This threshold saves as many misses as admitting at every gain, with a third fewer copies.
bool clearly_more(float wanted, float held) { return wanted > 1.5F * held + 1.0F; }

} // namespace

int32_t SlotCache::pin_resident(int32_t number, int32_t expert) {
    const ExpertBlock & block = block_at(number);
    const Lock lock(mutex_);
    if (number == admission_block_) {
        const auto admission = std::find_if(admissions_.begin(), admissions_.end(), [expert](const Admission & s) {
            return s.evicted == expert || s.admitted == expert;
        });
        if (admission != admissions_.end()) {
            return admission->slot; // pinned
        }
    }
    const int32_t slot = has_slots() ? pool(block).find(block.first_key + expert) : SlotPool::none;
    if (slot == SlotPool::none || pool(block).loading(slot)) {
        return SlotPool::none;
    }
    if (pool(block).state(block.first_key + expert) != SlotState::pinned) {
        pool(block).pin(slot);
    }
    return slot;
}

// Admissions stay within the block, so that no other block loses experts that the rest of the prefill needs. Experts
// that are loading stay.
const std::vector<SlotCache::Admission> & SlotCache::begin_admission(int32_t number, const float * wanted) {
    const ExpertBlock & block = block_at(number);
    const Lock lock(mutex_);
    drop_admissions();
    if (!has_slots() || clock_) {
        return admissions_;
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
    for (size_t i = 0; i < std::min(held.size(), absent.size()) && clearly_more(wanted[absent[i]], wanted[held[i]]);
         ++i) {
        const int32_t slot = slots.find(block.first_key + held[i]);
        slots.reassign(slot, block.first_key + absent[i]);
        admissions_.push_back({ slot, held[i], absent[i] });
    }
    admission_block_ = number;
    for (int32_t expert = 0; expert < table_.n_expert; ++expert) {
        const int32_t key = block.first_key + expert;
        const int32_t slot = slots.find(key);
        if (slot != SlotPool::none && wanted[expert] > 0) {
            prefill_uses_.push_back({ wanted[expert], block.group, slot, key });
        }
    }
    return admissions_;
}

void SlotCache::end_admission() {
    const Lock lock(mutex_);
    for (const Admission & admission : admissions_) {
        pool(block_at(admission_block_)).loaded(admission.slot);
    }
    admissions_.clear();
    admission_block_ = -1;
    loaded_.notify_all();
}

// A slot that got only some of an expert's matrices holds nothing.
void SlotCache::drop_admissions() {
    for (const Admission & admission : admissions_) {
        pool(block_at(admission_block_)).drop(admission.slot);
    }
    admissions_.clear();
    admission_block_ = -1;
}

// Experts used by prefill count as used, the most used ones last.
void SlotCache::complete_prefill() {
    drop_admissions();
    std::stable_sort(prefill_uses_.begin(), prefill_uses_.end(),
                     [](const PrefillUse & a, const PrefillUse & b) { return a.weight < b.weight; });
    for (const PrefillUse & w : prefill_uses_) {
        SlotPool & slots = pools_[static_cast<size_t>(w.group)];
        if (slots.find(w.key) == w.slot) {
            slots.touch(w.slot);
        }
    }
    prefill_uses_.clear();
}

} // namespace edge
