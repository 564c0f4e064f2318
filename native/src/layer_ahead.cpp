// The part of Residency that looks one block ahead: rows in, orders out, on the worker's thread.
#include "residency.h"

#include <algorithm>
#include <utility>

namespace edge {

namespace {

constexpr float follow   = 0.02F; // of one block's precision
constexpr float too_poor = 0.35F; // precision below which bytes are not spent on it

} // namespace

void Residency::use_gate(std::unique_ptr<Gate> gate) {
    const Lock lock(mutex_);
    gate_ = std::move(gate);
}

void Residency::foresee(int32_t block, const float * rows, int32_t n_tokens, size_t n_embd) {
    {
        const Lock lock(mutex_);
        if (!gate_ || clock_ || !gate_->foresees(block)) {
            return;
        }
        glimpse_.block    = block;
        glimpse_.n_tokens = n_tokens;
        glimpse_.rows.assign(rows, rows + static_cast<size_t>(n_tokens) * n_embd);
    }
    ordered_.notify_one();
}

// On the worker's thread. The block may begin meanwhile: then it is too late.
void Residency::order_foreseen(Lock & lock) {
    std::swap(glimpse_, glimpsed_);
    glimpse_.block = -1;
    lock.unlock();
    std::vector<int32_t> experts = gate_->predict(glimpsed_.block, glimpsed_.rows.data(), glimpsed_.n_tokens);
    lock.lock();
    if (!serving() || last_block_ != glimpsed_.block - 1) {
        return;
    }
    const ExpertBlock & block = block_at(glimpsed_.block);
    foreseen_block_ = glimpsed_.block;
    foreseen_ = std::move(experts);
    if (foresight_precision_ < too_poor) {
        return;
    }
    for (auto expert = foreseen_.rbegin(); expert != foreseen_.rend(); ++expert) { // the most urgent order is the last
        const int32_t slot = pool(block).find(block.first_key + *expert);
        if (slot != SlotPool::none) {
            pool(block).expect(slot, foresight_precision_);
        } else {
            orders_.push_back({ foreseen_block_, *expert, foreseen_block_, foresight_precision_, 0, true });
        }
    }
}

// The block has begun: wanted_ are its experts.
void Residency::judge_foresight(int32_t block) {
    if (foreseen_block_ != block || foreseen_.empty()) {
        return;
    }
    const auto came_true = [this](int32_t expert) { return std::find(wanted_.begin(), wanted_.end(), expert) != wanted_.end(); };
    const auto right = static_cast<float>(std::count_if(foreseen_.begin(), foreseen_.end(), came_true));
    foresight_precision_ += follow * (right / static_cast<float>(foreseen_.size()) - foresight_precision_);
    foreseen_block_ = -1;
}

} // namespace edge
