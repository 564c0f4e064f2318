#include "slots/slot_cache.h"

#include "util/error.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>

namespace edge {

namespace {

constexpr size_t demand_in_flight = 8; // staged pieces; page-locked ones of a layer are sent together and awaited once

} // namespace

SlotCache::SlotCache(const ExpertTable & table, const std::vector<int32_t> & slots, ggml_backend_buffer_type_t buft,
                     const TransferParams & params)
    : table_(table), buft_(buft), throttle_(params.deterministic ? 0 : params.link_bytes_per_s),
      demand_link_(ggml_backend_buft_get_device(buft), throttle_, demand_in_flight),
      prefetch_link_(ggml_backend_buft_get_device(buft), throttle_, prefetch_marks),
      balancer_(params.link_bytes_per_s,
                params.splits_always || (demand_link_.asynchronous() && !params.deterministic)),
      splits_always_(params.splits_always),
      shared_scores_(table.blocks.size() * static_cast<size_t>(table.n_expert), 0.0F),
      slot_of_(static_cast<size_t>(table.n_expert), SlotPool::none) {
    demanded_.reserve(slot_of_.size());
    missing_.reserve(slot_of_.size());
    loading_.reserve(slot_of_.size());
    if (params.deterministic) {
        clock_.emplace(params.link_bytes_per_s, params.block_ns);
    }
    make_slots(slots);
    forget_next_layer_requests();
    if (!clock_) {
        worker_ = std::thread([this] { work(); });
    }
}

SlotCache::~SlotCache() {
    {
        const Lock lock(mutex_);
        stop_ = true;
    }
    requested_.notify_all();
    if (worker_.joinable()) {
        worker_.join();
    }
    demand_link_.wait(); // before the slots are freed
}

void SlotCache::make_slots(const std::vector<int32_t> & slots) {
    pools_.clear();
    for (size_t g = 0; g < table_.groups.size(); ++g) {
        pools_.emplace_back(slots[g], static_cast<int32_t>(table_.groups[g].blocks.size()) * table_.n_expert);
    }
    store_.reset(); // first, since both may not fit at once
    store_ = std::make_unique<SlotStore>(table_, slots, buft_);
}

// Every earlier block has run: its slots may be reused, and requests that were due by now are dropped.
void SlotCache::begin_block(int32_t block) {
    for (SlotPool & pool : pools_) {
        pool.unpin_all();
    }
    if (block <= last_block_ || last_block_ < 0) {
        ++counters_.steps;
    }
    last_block_ = block;
    if (clock_) {
        clock_->compute_block();
        run_virtual_requests();
    }
    requests_.erase(
        std::remove_if(requests_.begin(), requests_.end(), [block](const Request & o) { return o.deadline <= block; }),
        requests_.end());
    loaded_.notify_all(); // drain() waits for requests that may all be gone now
}

void SlotCache::hit(const ExpertBlock & block, int32_t slot) {
    SlotPool & slots = pool(block);
    if (slots.loading(slot)) {
        ++counters_.misses;
        ++counters_.late;
        ++counters_.fetched;
    } else {
        ++counters_.hits;
    }
    if (slots.prefetched_unused(slot)) {
        ++counters_.prefetched_used;
        prefetched_used_bytes_ += expert_bytes(block.group);
    }
    slots.use(slot);
    slots.pin(slot);
}

void SlotCache::require_expert(int32_t expert) const {
    if (expert < 0 || expert >= table_.n_expert) {
        throw Error(EDGE_ERR_INTERNAL, "the router of block " + std::to_string(last_block_) + " chose expert " +
                                           std::to_string(expert) + " of " + std::to_string(table_.n_expert));
    }
}

// Residents first: once pinned, they cannot be evicted by this block's own misses.
void SlotCache::find_missing(const ExpertBlock & block, const int32_t * ids, int32_t n) {
    demanded_.clear();
    missing_.clear();
    std::fill(slot_of_.begin(), slot_of_.end(), SlotPool::none);
    for (int32_t i = 0; i < n; ++i) {
        require_expert(ids[i]);
        if (std::find(demanded_.begin(), demanded_.end(), ids[i]) != demanded_.end()) {
            continue;
        }
        demanded_.push_back(ids[i]);
        int32_t & slot = slot_of_[static_cast<size_t>(ids[i])];
        slot = pool(block).find(block.first_key + ids[i]);
        if (slot != SlotPool::none) {
            hit(block, slot);
            claim_next_layer(block.group, slot);
        } else {
            missing_.push_back(ids[i]);
        }
    }
}

int32_t SlotCache::take_for_demand(Lock & lock, const ExpertBlock & block, int32_t key) {
    SlotPool & slots = pool(block);
    int32_t slot = slots.take(key, SlotPool::any_score);
    while (slot == SlotPool::none) { // only a copy in flight can stand in the way: the floor counts it
        if (!complete_virtual_flight() && !await_next_layer()) {
            demand_waits_ = true;
            loaded_.wait(lock);
        }
        slot = slots.take(key, SlotPool::any_score);
    }
    if (std::exchange(demand_waits_, false)) {
        requested_.notify_one();
    }
    count_fetch(block, slot);
    return slot;
}

void SlotCache::count_fetch(const ExpertBlock & block, int32_t slot) {
    ++counters_.misses;
    ++counters_.fetched;
    counters_.bytes_fetched += expert_bytes(block.group);
    pool(block).use(slot);
    pool(block).pin(slot);
}

// Send every missing expert of the block. If copies do not overlap with the caller, they have arrived on return.
void SlotCache::load_missing(Lock & lock, const ExpertBlock & block) {
    SlotPool & slots = pool(block);
    loading_.clear();
    for (const int32_t expert : missing_) {
        int32_t & slot = slot_of_[static_cast<size_t>(expert)];
        slot = slots.find(block.first_key + expert);
        if (slot != SlotPool::none) { // the worker began to load it while take_for_demand() waited
            hit(block, slot);
            continue;
        }
        slot = take_for_demand(lock, block, block.first_key + expert);
        loading_.push_back(expert);
        if (clock_) {
            clock_->wait_until(clock_->transfer(clock_->now(), expert_bytes(block.group)));
        }
    }
    if (loading_.empty()) {
        return;
    }
    begin_fetches();
    lock.unlock();
    send_loading(block);
    lock.lock();
    if (defers()) {
        if (!store_->page_locked(block)) { // this thread copied them into staging memory
            counters_.stall_ns += static_cast<uint64_t>(nanoseconds(Clock::now() - fetches_.sent));
        }
        fetches_sent(taken_, expert_bytes(block.group));
        return;
    }
    for (const int32_t slot : taken_) {
        slots.loaded(slot);
    }
    loaded_.notify_all();
}

// Copy to the assigned slots, without a lock. If one copy fails, all of them are dropped.
void SlotCache::send_loading(const ExpertBlock & block) {
    taken_.clear();
    for (const int32_t expert : loading_) {
        taken_.push_back(slot_of_[static_cast<size_t>(expert)]);
    }
    try {
        for (size_t i = 0; i < loading_.size(); ++i) {
            store_->send(demand_link_, block, loading_[i], taken_[i], i + 1 == loading_.size() ? 1 : 0);
        }
        if (!defers()) {
            demand_link_.wait();
        }
    } catch (...) {
        demand_link_.wait();
        const Lock lock(mutex_);
        for (const int32_t slot : taken_) {
            pool(block).drop(slot);
        }
        ++counters_.failed;
        loaded_.notify_all();
        throw;
    }
}

// Wait for demanded experts that prefetches bring. Those whose prefetch failed become missing_.
void SlotCache::complete_late(Lock & lock, const ExpertBlock & block) {
    const auto arrived = [&] {
        return std::none_of(demanded_.begin(), demanded_.end(), [&](int32_t expert) {
            const int32_t slot = pool(block).find(block.first_key + expert);
            return slot != SlotPool::none && pool(block).loading(slot) && !is_on_demand_link(block.group, slot);
        });
    };
    if (clock_ && !arrived()) {
        complete_virtual_flight();
    }
    if (!arrived()) {
        const auto began = Clock::now();
        loaded_.wait(lock, arrived);
        counters_.stall_ns += defers() ? static_cast<uint64_t>(nanoseconds(Clock::now() - began)) : 0;
    }
    missing_.clear();
    for (const int32_t expert : demanded_) {
        if (pool(block).find(block.first_key + expert) == SlotPool::none) {
            missing_.push_back(expert); // counted as a late miss, and counted again as a plain one
            --counters_.misses;
            --counters_.late;
            --counters_.fetched;
            --counters_.prefetched_used;
            prefetched_used_bytes_ -= expert_bytes(block.group);
        }
    }
}

void SlotCache::demand(int32_t number, const int32_t * ids, int32_t n, int32_t * out) {
    const ExpertBlock & block = block_at(number);
    complete_fetches(); // the device is past them
    note_block_began(number);
    Lock lock(mutex_);
    begin_block(number);
    complete_next_layer();
    fetches_.group = block.group;
    cpu_left_ns_ = 0;
    const auto started = Clock::now();
    const uint64_t virtual_started = clock_ ? clock_->now() : 0;
    const uint64_t misses_before = counters_.misses;
    find_missing(block, ids, n);
    score_prediction(number);
    while (true) {
        load_missing(lock, block);
        complete_late(lock, block);
        if (missing_.empty()) {
            break;
        }
    }
    if (clock_) {
        counters_.stall_ns += clock_->now() - virtual_started;
        run_virtual_requests(); // what arrived, or could begin, while this block waited
    } else if (!defers() && counters_.misses != misses_before) {
        counters_.stall_ns += static_cast<uint64_t>(nanoseconds(Clock::now() - started));
    }
    ready_ = Clock::now();
    for (int32_t i = 0; i < n; ++i) {
        out[i] = slot_of_[static_cast<size_t>(ids[i])];
    }
}

bool SlotCache::gpu_offload_is_faster(int32_t number, int32_t n_pairs) const {
    const ExpertBlock & block = block_at(number);
    const Lock lock(mutex_);
    if (!has_slots() || !demand_link_.asynchronous() || !store_->page_locked(block)) {
        return false; // a copying thread is no faster than computing threads
    }
    const double experts = table_.n_expert, used = table_.n_expert_used;
    // Expected number of distinct experts, were all equally likely.
    const double wanted = experts * (1 - std::pow(1 - used / experts, n_pairs / used));
    const auto n = std::min(static_cast<size_t>(std::lround(wanted)), static_cast<size_t>(n_pairs));
    const SlotPool & slots = pools_[static_cast<size_t>(block.group)];
    const double absent =
        1 - static_cast<double>(slots.n_slots() - slots.n_free()) / static_cast<double>(slots.n_keys());
    const uint64_t bytes = expert_bytes(block.group);
    return absent * balancer_.link_ns(n, bytes) < balancer_.cpu_ns(n, static_cast<size_t>(n_pairs), bytes);
}

bool SlotCache::all_resident() const {
    const Lock lock(mutex_);
    return !clock_ && store_ && n_in_flight_ == 0 &&
           std::all_of(pools_.begin(), pools_.end(), [](const SlotPool & pool) { return pool.full(); });
}

void SlotCache::used(int32_t number, const int32_t * ids, int32_t n) {
    const Lock lock(mutex_);
    begin_block(number);
    find_missing(block_at(number), ids, n);
}

bool SlotCache::fetches_some() const {
    return splits_always_ || (balancer_.overlaps() && store_ && store_->page_locked(table_.blocks.front()));
}

void SlotCache::end_step() {
    complete_fetches();
    const Lock lock(mutex_);
    await_next_layer();
    complete_prefill();
    for (SlotPool & pool : pools_) {
        pool.unpin_all();
    }
    last_block_ = -1;
    predicted_block_ = -1;
    forget_next_layer_requests();
    ready_ = {};
}

void SlotCache::resize(const std::vector<int32_t> & slots) {
    end_step(); // may have been left out: copies in flight to slots that are about to be freed
    Lock lock(mutex_);
    requests_.clear();
    forget_next_layer_requests();
    complete_virtual_flight();
    loaded_.wait(lock, [this] { return n_in_flight_ == 0; });
    std::vector<std::vector<int32_t>> kept;
    for (size_t g = 0; g < pools_.size(); ++g) {
        kept.push_back(pools_[g].highest_scored(slots[g]));
    }
    make_slots(slots);
    commit_scores();
    for (size_t g = 0; g < kept.size(); ++g) {
        refill(static_cast<int32_t>(g), kept[g]);
    }
}

// Keys come in order of falling score. The last is loaded first, so that it is evicted first among equals. A failed
// copy leaves the rest to demand.
void SlotCache::refill(int32_t group, const std::vector<int32_t> & keys) {
    SlotPool & slots = pools_[static_cast<size_t>(group)];
    for (auto key = keys.rbegin(); key != keys.rend(); ++key) {
        const int32_t number =
            table_.groups[static_cast<size_t>(group)].blocks[static_cast<size_t>(*key / table_.n_expert)];
        const int32_t slot = slots.take(*key, SlotPool::any_score);
        try {
            store_->send(demand_link_, block_at(number), *key % table_.n_expert, slot, 0);
            demand_link_.wait();
        } catch (...) {
            demand_link_.wait();
            slots.drop(slot);
            ++counters_.failed;
            return;
        }
        slots.loaded(slot);
        counters_.bytes_fetched += expert_bytes(group);
    }
}

uint64_t SlotCache::bytes() const {
    const Lock lock(mutex_);
    return store_ ? store_->bytes() : 0;
}

edge_counters SlotCache::counters() const {
    const Lock lock(mutex_);
    edge_counters out = counters_;
    out.bytes_wasted = prefetched_bytes_ - prefetched_used_bytes_;
    return out;
}

void SlotCache::states(uint8_t * out) const {
    const Lock lock(mutex_);
    for (const ExpertBlock & block : table_.blocks) {
        const SlotPool & slots = pools_[static_cast<size_t>(block.group)];
        for (int32_t expert = 0; expert < table_.n_expert; ++expert) {
            *out++ = static_cast<uint8_t>(slots.state(block.first_key + expert));
        }
    }
}

void SlotCache::poison_free_slots() {
    const Lock lock(mutex_);
    for (size_t g = 0; store_ && g < pools_.size(); ++g) {
        for (int32_t slot = 0; slot < pools_[g].n_slots(); ++slot) {
            if (pools_[g].key_of(slot) == SlotPool::none) {
                // NaN as f32, f16, bf16 and as a quantization block's scale
                store_->fill(static_cast<int32_t>(g), slot, 0xFF);
            }
        }
    }
}

} // namespace edge
