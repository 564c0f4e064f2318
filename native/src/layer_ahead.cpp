// The part of Residency that looks one block ahead, on the decoding thread, while that waits for something else anyway.
#include "residency.h"

#include <algorithm>
#include <iterator>

namespace edge {

namespace {

constexpr float follow   = 0.02F; // of one block's precision
constexpr float too_poor = 0.35F; // precision below which bytes are not spent on it
constexpr uint32_t seldom = 16; // times: what is not worth it is looked at again
constexpr double demands = 0.8;   // chance that the coming block demands copies, which wrong ones delay

// What part of a copy has to fall into the link's idle time, at least. One that comes true saves what has travelled by the time
// that the block asks for it; one that does not delays what it asks for by the rest.
double least_idle(double precision) {
    return 1 - precision / (precision + (1 - precision) * demands);
}

} // namespace

void Residency::use_gate(std::unique_ptr<Gate> gate) {
    const Lock lock(mutex_);
    gate_ = std::move(gate);
    absent_precision_.assign(table_.blocks.size(), {});
    ordered_precision_.assign(table_.blocks.size(), {});
}

void Residency::forget_ordered() {
    ordered_ahead_.clear();
    ordered_blocks_.assign(table_.blocks.size(), false);
}

bool Residency::looks_ahead_to(int32_t block) const {
    return gate_ && !clock_ && gate_->foresees(block) && (!demand_link_.asynchronous() || store_->page_locked(block_at(block)));
}

// Of those that foretell that block at present.
Residency::Precision & Residency::precision_ahead(int32_t number) {
    return (foreseen_by_order_ ? ordered_precision_ : absent_precision_)[static_cast<size_t>(number)];
}

// How many experts of that block may be sent: as many as the link is idle for until the block knows its own.
size_t Residency::room_ahead(int32_t number) {
    const double precision = precision_ahead(number).value;
    if (precision < too_poor) {
        return 0;
    }
    const double backlog = std::max(0.0, nanoseconds(link_free_ - Clock::now()));
    const double idle = block_ns_ + std::max(0.0, cpu_left_ns_ - backlog);
    const double room = idle / balancer_.link_ns(1, expert_bytes(block_at(number).group)) + 1 - least_idle(precision);
    const size_t marks = demand_link_.free_marks(); // one is for the demands of that block
    return std::min(static_cast<size_t>(room), marks > 0 ? marks - 1 : 0);
}

// Whether this block's experts were ordered, by who knows them better than the gate; foreseen_ are then those of this block that
// are in no slot, the best first.
bool Residency::finds_ordered(int32_t number) {
    const Lock lock(mutex_);
    Precision & ordered = ordered_precision_[static_cast<size_t>(number)];
    const bool is_worse = ordered.value < absent_precision_[static_cast<size_t>(number)].value;
    foreseen_by_order_  = ordered_blocks_[static_cast<size_t>(number)] && (!is_worse || ++ordered.skipped % seldom == 0);
    if (!foreseen_by_order_) {
        return false;
    }
    const auto others = [number](const Order & order) { return order.block != number; };
    const auto first = std::partition(ordered_ahead_.begin(), ordered_ahead_.end(), others);
    std::sort(first, ordered_ahead_.end(), [](const Order & a, const Order & b) {
        return a.priority != b.priority ? a.priority > b.priority : a.expert < b.expert;
    });
    foreseen_.clear();
    std::transform(first, ordered_ahead_.end(), std::back_inserter(foreseen_), [](const Order & order) { return order.expert; });
    ordered_ahead_.erase(first, ordered_ahead_.end());
    return true;
}

// Fills in foreseen_ if that is worth what the gate takes: less than this thread would wait, and seldom where guesses come to nothing.
bool Residency::asks_gate(int32_t number, const float * rows, int32_t n_tokens) {
    Precision & precision = absent_precision_[static_cast<size_t>(number)];
    if (precision.value < too_poor && ++precision.skipped % seldom != 0) {
        return false;
    }
    const double backlog = std::max(0.0, nanoseconds(link_free_ - Clock::now()));
    if (gate_ns_ > block_ns_ + std::max(backlog, cpu_left_ns_) && ++gate_skipped_ % seldom != 0) {
        return false;
    }
    const auto asked = Clock::now();
    gate_->predict(number, rows, n_tokens, foreseen_);
    gate_ns_ += (gate_ns_ > 0 ? follow : 1) * (nanoseconds(Clock::now() - asked) - gate_ns_);
    return true;
}

void Residency::look_ahead(int32_t number, const float * rows, int32_t n_tokens) {
    if (!finds_ordered(number) && !asks_gate(number, rows, n_tokens)) {
        return;
    }
    const ExpertBlock & block = block_at(number);
    const size_t first = ahead_.size();
    {
        const Lock lock(mutex_);
        if (!serving() || last_block_ != number - 1) {
            return;
        }
        foreseen_block_ = number;
        keep_foreseen(block);
        take_foreseen(number, room_ahead(number));
    }
    send_ahead(block, first);
}

// Those in slots stay there until the block begins, and the others are noted.
void Residency::keep_foreseen(const ExpertBlock & block) {
    foreseen_absent_.clear();
    for (const int32_t expert : foreseen_) {
        const int32_t slot = pool(block).find(block.first_key + expert);
        if (slot == SlotPool::none) {
            foreseen_absent_.push_back(expert);
        } else if (pool(block).state(block.first_key + expert) == SlotState::resident) {
            pool(block).pin(slot);
        }
    }
}

void Residency::take_foreseen(int32_t number, size_t room) {
    const ExpertBlock & block = block_at(number);
    const uint64_t bytes = expert_bytes(block.group);
    const float expectation = foreseen_by_order_ ? precision_ahead(number).value : foresight_precision_;
    for (const int32_t expert : foreseen_absent_) {
        if (room == 0 || (foreseen_by_order_ && bytes > byte_budget_)) {
            return;
        }
        if (pool(block).find(block.first_key + expert) != SlotPool::none) { // foreseen twice
            continue;
        }
        const int32_t slot = pool(block).take_ahead(block.first_key + expert, expectation);
        if (slot == SlotPool::none) {
            return;
        }
        --room;
        byte_budget_ -= foreseen_by_order_ ? bytes : 0;
        count_prefetch(bytes);
        ahead_.push_back({ block.group, slot, 0, {} });
    }
}

// Those of ahead_ from the first on. One that fails is dropped and counted, those after it never were: the demand fetches them.
void Residency::send_ahead(const ExpertBlock & block, size_t first) {
    size_t sent = first;
    try {
        for (; sent < ahead_.size(); ++sent) {
            Ahead & one = ahead_[sent];
            const int32_t expert = pool(block).key_of(one.slot) - block.first_key;
            store_->send(demand_link_, block, expert, one.slot, 1);
            note_sent(1, expert_bytes(block.group));
            one.ticket = demand_link_.last();
            one.due    = link_free_;
        }
    } catch (const std::exception &) {
        demand_link_.wait();
        const Lock lock(mutex_);
        ++counters_.failed;
        for (size_t i = sent; i < ahead_.size(); ++i) {
            pool(block).drop(ahead_[i].slot);
            if (i > sent) {
                forget_prefetch(expert_bytes(block.group));
            }
        }
        ahead_.resize(sent);
    }
}

// The block has begun: wanted_ are its experts.
void Residency::judge_foresight(int32_t number) {
    if (foreseen_block_ != number || foreseen_.empty()) {
        return;
    }
    const auto came_true = [this](int32_t expert) { return std::find(wanted_.begin(), wanted_.end(), expert) != wanted_.end(); };
    const auto part_of = [&](const std::vector<int32_t> & experts) {
        return static_cast<float>(std::count_if(experts.begin(), experts.end(), came_true)) / static_cast<float>(experts.size());
    };
    if (!foreseen_by_order_) {
        foresight_precision_ += follow * (part_of(foreseen_) - foresight_precision_);
    }
    if (!foreseen_absent_.empty()) {
        Precision & precision = precision_ahead(number);
        precision.judged += 1;
        precision.value += std::max(follow, 1 / precision.judged) * (part_of(foreseen_absent_) - precision.value);
    }
    SlotPool & slots = pool(block_at(number));
    for (const int32_t expert : foreseen_absent_) {
        const int32_t slot = slots.find(block_at(number).first_key + expert);
        if (slot != SlotPool::none && slots.prefetched_unused(slot)) {
            slots.regret(slot);
        }
    }
    foreseen_block_ = -1;
}

} // namespace edge
