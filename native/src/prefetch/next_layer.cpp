// The part of SlotCache that prefetches for the next block, on the decoding thread, while that would wait anyway.
#include "slots/slot_cache.h"

#include <algorithm>
#include <iterator>

namespace edge {

namespace {

constexpr float follow = 0.02F; // smoothing of a block's precision
constexpr float too_poor = 0.35F; // precision under which no bytes are spent
constexpr uint32_t seldom = 16; // a prediction that is not worth its cost is retried every 16th time
constexpr double demands = 0.8; // probability that the next block demands copies, which wrong prefetches delay

// Smallest fraction of a copy that must fall into the link's idle time. A right prefetch saves what has been copied
// when the block demands it; a wrong one delays the block's demands by the rest.
double least_idle(double precision) { return 1 - precision / (precision + (1 - precision) * demands); }

} // namespace

void SlotCache::use_router_predictor(std::unique_ptr<RouterPredictor> predictor) {
    const Lock lock(mutex_);
    router_predictor_ = std::move(predictor);
    router_absent_precision_.assign(table_.blocks.size(), {});
    request_precision_.assign(table_.blocks.size(), {});
}

void SlotCache::forget_next_layer_requests() {
    next_layer_requests_.clear();
    requested_blocks_.assign(table_.blocks.size(), false);
}

bool SlotCache::can_prefetch_next_layer(int32_t block) const {
    return router_predictor_ && !clock_ && router_predictor_->can_predict(block) &&
           (!demand_link_.asynchronous() || store_->page_locked(block_at(block)));
}

// Of the current source of predictions for that block.
SlotCache::Precision & SlotCache::next_layer_precision(int32_t number) {
    return (predicted_by_request_ ? request_precision_ : router_absent_precision_)[static_cast<size_t>(number)];
}

// Experts of that block that may be sent: as many as the link is idle for until the block knows its experts.
size_t SlotCache::next_layer_room(int32_t number) {
    const double precision = next_layer_precision(number).value;
    if (precision < too_poor) {
        return 0;
    }
    const double backlog = std::max(0.0, nanoseconds(link_free_ - Clock::now()));
    const double idle = block_ns_ + std::max(0.0, cpu_left_ns_ - backlog);
    const double room = idle / balancer_.link_ns(1, expert_bytes(block_at(number).group)) + 1 - least_idle(precision);
    const size_t marks = demand_link_.free_marks(); // one is for the demands of that block
    return std::min(static_cast<size_t>(room), marks > 0 ? marks - 1 : 0);
}

// Return true if prefetch requests predict this block better than its router. If so, predicted_ becomes the requested
// absent experts of this block, best first.
bool SlotCache::predict_from_requests(int32_t number) {
    const Lock lock(mutex_);
    Precision & requested = request_precision_[static_cast<size_t>(number)];
    const bool is_worse = requested.value < router_absent_precision_[static_cast<size_t>(number)].value;
    predicted_by_request_ =
        requested_blocks_[static_cast<size_t>(number)] && (!is_worse || ++requested.skipped % seldom == 0);
    if (!predicted_by_request_) {
        return false;
    }
    const auto others = [number](const Request & request) { return request.block != number; };
    const auto first = std::partition(next_layer_requests_.begin(), next_layer_requests_.end(), others);
    std::sort(first, next_layer_requests_.end(), [](const Request & a, const Request & b) {
        return a.priority != b.priority ? a.priority > b.priority : a.expert < b.expert;
    });
    predicted_.clear();
    std::transform(first, next_layer_requests_.end(), std::back_inserter(predicted_),
                   [](const Request & request) { return request.expert; });
    next_layer_requests_.erase(first, next_layer_requests_.end());
    return true;
}

// Fill in predicted_ from the router predictor if that takes less time than this thread would wait. Retry rarely if its
// predictions are poor.
bool SlotCache::predict_from_router(int32_t number, const float * rows, int32_t n_tokens) {
    Precision & precision = router_absent_precision_[static_cast<size_t>(number)];
    if (precision.value < too_poor && ++precision.skipped % seldom != 0) {
        return false;
    }
    const double backlog = std::max(0.0, nanoseconds(link_free_ - Clock::now()));
    if (predictor_ns_ > block_ns_ + std::max(backlog, cpu_left_ns_) && ++predictor_skipped_ % seldom != 0) {
        return false;
    }
    const auto asked = Clock::now();
    router_predictor_->predict(number, rows, n_tokens, predicted_);
    predictor_ns_ += (predictor_ns_ > 0 ? follow : 1) * (nanoseconds(Clock::now() - asked) - predictor_ns_);
    return true;
}

void SlotCache::prefetch_next_layer(int32_t number, const float * rows, int32_t n_tokens) {
    if (!predict_from_requests(number) && !predict_from_router(number, rows, n_tokens)) {
        return;
    }
    const ExpertBlock & block = block_at(number);
    const size_t first = next_layer_copies_.size();
    {
        const Lock lock(mutex_);
        if (!has_slots() || last_block_ != number - 1) {
            return;
        }
        predicted_block_ = number;
        pin_predicted(block);
        take_predicted(number, next_layer_room(number));
    }
    send_next_layer(block, first);
}

// Residents stay until the block begins; absent ones are noted.
void SlotCache::pin_predicted(const ExpertBlock & block) {
    predicted_absent_.clear();
    for (const int32_t expert : predicted_) {
        const int32_t slot = pool(block).find(block.first_key + expert);
        if (slot == SlotPool::none) {
            predicted_absent_.push_back(expert);
        } else if (pool(block).state(block.first_key + expert) == SlotState::resident) {
            pool(block).pin(slot);
        }
    }
}

void SlotCache::take_predicted(int32_t number, size_t room) {
    const ExpertBlock & block = block_at(number);
    const uint64_t bytes = expert_bytes(block.group);
    const float expectation = predicted_by_request_ ? next_layer_precision(number).value : router_precision_;
    for (const int32_t expert : predicted_absent_) {
        if (room == 0 || (predicted_by_request_ && bytes > byte_budget_)) {
            return;
        }
        if (pool(block).find(block.first_key + expert) != SlotPool::none) { // predicted twice
            continue;
        }
        const int32_t slot = pool(block).take_for_next_layer(block.first_key + expert, expectation);
        if (slot == SlotPool::none) {
            return;
        }
        --room;
        byte_budget_ -= predicted_by_request_ ? bytes : 0;
        count_prefetch(bytes);
        next_layer_copies_.push_back({ block.group, slot, 0, {} });
    }
}

// Send next_layer_copies_ from `first` on. A failed one is dropped and counted; later ones are uncounted, and demands
// fetch them.
void SlotCache::send_next_layer(const ExpertBlock & block, size_t first) {
    size_t sent = first;
    try {
        for (; sent < next_layer_copies_.size(); ++sent) {
            NextLayerCopy & one = next_layer_copies_[sent];
            const int32_t expert = pool(block).key_of(one.slot) - block.first_key;
            store_->send(demand_link_, block, expert, one.slot, 1);
            note_sent(1, expert_bytes(block.group));
            one.ticket = demand_link_.last();
            one.due = link_free_;
        }
    } catch (const std::exception &) {
        demand_link_.wait();
        const Lock lock(mutex_);
        ++counters_.failed;
        for (size_t i = sent; i < next_layer_copies_.size(); ++i) {
            pool(block).drop(next_layer_copies_[i].slot);
            if (i > sent) {
                uncount_prefetch(expert_bytes(block.group));
            }
        }
        next_layer_copies_.resize(sent);
    }
}

// The block has begun: demanded_ holds its experts.
void SlotCache::score_prediction(int32_t number) {
    if (predicted_block_ != number || predicted_.empty()) {
        return;
    }
    const auto came_true = [this](int32_t expert) {
        return std::find(demanded_.begin(), demanded_.end(), expert) != demanded_.end();
    };
    const auto part_of = [&](const std::vector<int32_t> & experts) {
        return static_cast<float>(std::count_if(experts.begin(), experts.end(), came_true)) /
               static_cast<float>(experts.size());
    };
    if (!predicted_by_request_) {
        router_precision_ += follow * (part_of(predicted_) - router_precision_);
    }
    if (!predicted_absent_.empty()) {
        Precision & precision = next_layer_precision(number);
        precision.judged += 1;
        precision.value += std::max(follow, 1 / precision.judged) * (part_of(predicted_absent_) - precision.value);
    }
    SlotPool & slots = pool(block_at(number));
    for (const int32_t expert : predicted_absent_) {
        const int32_t slot = slots.find(block_at(number).first_key + expert);
        if (slot != SlotPool::none && slots.prefetched_unused(slot)) {
            slots.demote(slot);
        }
    }
    predicted_block_ = -1;
}

} // namespace edge
