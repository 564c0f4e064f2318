#pragma once

#include "cpu/balancer.h"
#include "edge_speq.h"
#include "prefetch/router_predictor.h"
#include "slots/slot_pool.h"
#include "slots/slot_store.h"
#include "util/link.h"
#include "util/virtual_clock.h"

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace edge {

class CpuExperts;

struct TransferParams {
    uint64_t link_bytes_per_s = 0; // 0: no throttle
    bool deterministic = false; // no worker thread: transfers take virtual time on the decoding thread
    uint64_t block_ns = 0; // virtual time in which a block computes, nanoseconds
    // For tests: demand_hybrid() fetches even if copies do not overlap with the caller.
    bool splits_always = false;
};

// Keeps a bounded set of experts on the compute device: demand loads on the decoding thread, prefetches on a worker
// thread. One mutex guards pools, requests and counters. Copies run outside it, into slots marked as loading, which
// belong to the copying thread. The worker has at most one expert's copies in flight, so a demanded copy waits for no
// more than that.
class SlotCache {
public:
    SlotCache(const ExpertTable & table, const std::vector<int32_t> & slots, ggml_backend_buffer_type_t buft,
              const TransferParams & params);
    ~SlotCache();
    SlotCache(const SlotCache &) = delete;
    SlotCache & operator=(const SlotCache &) = delete;

    // Serve the experts ids[0..n) of a block that is about to run: assign a slot to each, pin it and write it to
    // slots[0..n). The device must have finished every earlier block. On return they are resident or, if copies overlap
    // with the caller, in flight: call await_fetches(), or hold_for_fetches() on the backend.
    void demand(int32_t block, const int32_t * ids, int32_t n, int32_t * slots);
    // The same, but the balancer may leave missing experts to the CPU; their slot is none.
    void demand_hybrid(int32_t block, const int32_t * ids, int32_t n, int32_t * slots);
    bool fetching() const { return !fetches_.slots.empty() || !fetches_.late.empty(); }
    bool hold_for_fetches(ggml_backend_t backend) { return fetches_.late.empty() && demand_link_.holds(backend); }
    void await_fetches();
    // Send experts of the next block while the link would be idle: experts that prefetch requests name, otherwise
    // experts that the router predictor finds from the rows [n_embd] that enter the block before it.
    void prefetch_next_layer(int32_t block, const float * rows, int32_t n_tokens);
    bool can_prefetch_next_layer(int32_t block) const;
    // Return true if the link will be idle before the CPU's part is done, by estimate.
    bool link_idles_first() const { return nanoseconds(link_free_ - Clock::now()) < cpu_left_ns_; }
    void use_router_predictor(std::unique_ptr<RouterPredictor> predictor);
    // Measure, before the first block, what one expert costs on either side. Nothing if demand_hybrid() never fetches.
    void calibrate_costs(CpuExperts & cpu);
    // Report how long the CPU's part of a block took, in nanoseconds.
    void computed(int32_t block, size_t n_experts, size_t n_pairs, double ns);
    const Balancer & balancer() const { return balancer_; }
    void learn_cpu_again() { balancer_.learn_cpu_again(); }
    bool fetches_some() const; // true if demand_hybrid() ever fetches
    void end_step();

    // Return true if every expert is resident, so that nothing is ever evicted. False in deterministic mode, whose time
    // passes block by block.
    bool all_resident() const;
    // Record that the experts ids[0..n) of a block were read, all of them from slots.
    void used(int32_t block, const int32_t * ids, int32_t n);

    // Return the slot of a resident expert, pinned until the step ends; none if it is not resident.
    int32_t pin_resident(int32_t block, int32_t expert);
    Link & demand_link() { return demand_link_; } // of the decoding thread
    // Return true if a graph without slots is estimated to run faster when it copies absent experts to the device than
    // when the CPU computes them. n_pairs: (token, expert) pairs of the block.
    bool gpu_offload_is_faster(int32_t block, int32_t n_pairs) const;

    // Choose the experts of a block that prefill admits into slots. wanted: [n_expert] weighted count of the tokens
    // that use each. Experts wanted clearly more than others take over the others' slots. The caller then copies them
    // matrix by matrix; until end_admission() reports that all matrices are there, pin_resident() finds both the old
    // and the new expert in the slot. Slots whose admission never ends are free once the step ends.
    struct Admission {
        int32_t slot;
        int32_t evicted;
        int32_t admitted;
    };
    const std::vector<Admission> & begin_admission(int32_t block, const float * wanted);
    void end_admission();

    // Commit scores() and replace the outstanding requests, of which at most byte_budget bytes are begun. margin:
    // subtracted from the priorities of absent experts. finite: whether all scores were.
    int32_t prefetch(const edge_prefetch_request * requests, int32_t n, uint64_t byte_budget, float margin = 0.0F,
                     bool * finite = nullptr);
    void drain();

    // Replace the slot counts while no graph runs, and reload the experts of highest score that fit. If the new slots
    // cannot be allocated, has_slots() is false until a resize succeeds.
    void resize(const std::vector<int32_t> & slots);
    bool has_slots() const { return store_ != nullptr; }

    float * scores() { return shared_scores_.data(); } // [n_blocks, n_expert], written by the caller between steps
    edge_counters counters() const;
    edge_costs costs() const; // measured by demand_hybrid()
    void states(uint8_t * out) const;
    void poison_free_slots();
    uint64_t bytes() const;
    const SlotStore & store() const { return *store_; }

private:
    struct Request {
        int32_t block;
        int32_t expert;
        int32_t deadline;
        float priority;
        uint64_t requested_at; // virtual time
    };
    using Clock = std::chrono::steady_clock;
    // An expert of the next block, in flight behind the running block's demands.
    struct NextLayerCopy {
        int32_t group;
        int32_t slot;
        Link::Ticket ticket;
        Clock::time_point due; // by estimate
    };
    // A prefetch whose copies have begun.
    struct InFlight {
        int32_t group;
        int32_t slot;
        Link::Ticket ticket;
        uint64_t arrives_at; // virtual time
    };
    // Fraction of the predicted absent experts that were then demanded.
    struct Precision {
        float value = 0.6F;
        float judged = 3; // predictions scored, starting with the weight of the prior
        uint32_t skipped = 0;
    };
    using Lock = std::unique_lock<std::mutex>;

    static double nanoseconds(Clock::duration span) {
        return static_cast<double>(std::chrono::duration_cast<std::chrono::nanoseconds>(span).count());
    }

    SlotPool & pool(const ExpertBlock & block) { return pools_[static_cast<size_t>(block.group)]; }
    const ExpertBlock & block_at(int32_t block) const { return table_.blocks[static_cast<size_t>(block)]; }
    uint64_t expert_bytes(int32_t group) const { return table_.groups[static_cast<size_t>(group)].expert_bytes; }

    void make_slots(const std::vector<int32_t> & slots);
    void begin_block(int32_t block);
    void require_expert(int32_t expert) const;
    void find_missing(const ExpertBlock & block, const int32_t * ids, int32_t n);
    void hit(const ExpertBlock & block, int32_t slot);
    void load_missing(Lock & lock, const ExpertBlock & block);
    void send_loading(const ExpertBlock & block);
    void complete_late(Lock & lock, const ExpertBlock & block);
    int32_t take_for_demand(Lock & lock, const ExpertBlock & block, int32_t key);
    void count_fetch(const ExpertBlock & block, int32_t slot);
    bool defers() const; // whether demanded copies overlap with the caller
    bool is_on_demand_link(int32_t group, int32_t slot) const; // loading over the demand link
    void complete_next_layer();
    bool await_next_layer();
    std::vector<NextLayerCopy>::const_iterator find_next_layer(int32_t group, int32_t slot) const;
    bool claim_next_layer(int32_t group, int32_t slot);
    double remaining_ns(int32_t group, int32_t slot) const;
    void begin_fetches();
    void fetches_sent(const std::vector<int32_t> & slots, uint64_t bytes);
    size_t next_layer_room(int32_t block);
    bool is_for_next_layer(const edge_prefetch_request & request) const;
    void forget_next_layer_requests();
    bool predict_from_requests(int32_t block);
    bool predict_from_router(int32_t block, const float * rows, int32_t n_tokens);
    Precision & next_layer_precision(int32_t block);
    void pin_predicted(const ExpertBlock & block);
    void take_predicted(int32_t block, size_t room);
    void send_next_layer(const ExpertBlock & block, size_t first);
    void score_prediction(int32_t block);
    void count_prefetch(uint64_t bytes);
    void uncount_prefetch(uint64_t bytes); // it was counted, but never begun
    void note_block_began(int32_t number);
    void note_sent(size_t n_experts, uint64_t bytes);
    bool has_arrived(int32_t slot, int32_t key) const;
    void await_late();
    void use_late(const ExpertBlock & block, int32_t slot);
    void note_costs();
    int32_t find_absent(const ExpertBlock & block, const int32_t * ids, int32_t n);
    void take_for_fetches(const ExpertBlock & block);
    void complete_fetches();
    void mark_arrived();
    void refill(int32_t group, const std::vector<int32_t> & keys);
    void drop_admissions();
    void complete_prefill();

    bool commit_scores(); // returns whether all were finite
    std::optional<InFlight> begin_prefetch(const Request & request);
    bool send(const Request & request, InFlight & flight);
    void finish(const InFlight & flight, bool arrived);
    void work();
    void run_virtual_requests();
    bool complete_virtual_flight();

    const ExpertTable & table_;
    ggml_backend_buffer_type_t buft_;
    Throttle throttle_;
    Link demand_link_;
    Link prefetch_link_;
    Balancer balancer_; // of the decoding thread
    bool splits_always_;
    std::unique_ptr<SlotStore> store_;
    std::vector<float> shared_scores_;

    mutable std::mutex mutex_; // guards the members below, up to prefetched_used_bytes_
    std::condition_variable loaded_;
    std::condition_variable requested_;
    std::vector<SlotPool> pools_;
    std::vector<Request> requests_; // of the worker, most urgent last
    std::vector<Request> next_layer_requests_; // of the decoding thread: for blocks that it prefetches itself
    std::vector<bool> requested_blocks_; // with such requests: the router predictor is not asked
    std::optional<VirtualClock> clock_; // deterministic mode only
    std::optional<InFlight> virtual_flight_;
    uint64_t byte_budget_ = 0; // remaining
    int32_t n_in_flight_ = 0; // prefetches begun and not finished
    bool stop_ = false;
    bool demand_waits_ = false; // for a slot: no prefetch may begin
    int32_t last_block_ = -1;
    edge_counters counters_{};
    edge_costs costs_{};
    std::unique_ptr<RouterPredictor> router_predictor_;
    std::vector<int32_t> predicted_; // experts of predicted_block_, most likely first
    std::vector<int32_t> predicted_absent_; // those of them in no slot
    int32_t predicted_block_ = -1;
    bool predicted_by_request_ = false;
    float router_precision_ = 0.7F; // of the router predictor, recent
    std::vector<Precision> router_absent_precision_; // of the router predictor, per block
    std::vector<Precision> request_precision_; // of prefetch requests, per block
    // Use of a resident expert by a prefill graph.
    struct PrefillUse {
        float weight;
        int32_t group;
        int32_t slot;
        int32_t key;
    };
    std::vector<PrefillUse> prefill_uses_;
    std::vector<Admission> admissions_; // of admission_block_, in flight
    int32_t admission_block_ = -1;
    uint64_t prefetched_bytes_ = 0;
    uint64_t prefetched_used_bytes_ = 0;

    // The members below belong to the decoding thread, without the mutex.
    std::vector<int32_t> slot_of_; // of the demanded block, by expert
    std::vector<int32_t> demanded_; // distinct experts of that block
    std::vector<int32_t> missing_;
    std::vector<int32_t> loading_; // its experts that the demand link brings
    std::vector<Miss> misses_; // of demand_hybrid(): the fetched ones first

    // Copies that the running block waits for and that nobody has awaited yet.
    struct Fetches {
        int32_t group = 0;
        bool queued = false; // behind a prefetch
        size_t n_sent = 0; // of slots: the others were prefetched
        Link::Ticket ticket = 0;
        std::vector<int32_t> slots;
        std::vector<std::pair<int32_t, int32_t>> late; // slot and key of experts in flight on the prefetch link
        Clock::time_point sent;
        Clock::time_point idle_since; // when nothing but these copies was left to wait for
    };
    Fetches fetches_;
    std::vector<NextLayerCopy> next_layer_copies_;
    std::vector<int32_t> taken_; // destination slots of the block's demands
    double cpu_left_ns_ = 0; // estimated CPU time of the running block, from when its experts are known
    double predictor_ns_ = 0; // average duration of a prediction
    uint32_t predictor_skipped_ = 0;
    Clock::time_point link_free_{}; // by estimate
    Clock::time_point ready_{}; // when the last block had all its experts
    double block_ns_ = 0; // average time from then until the next block knows its experts

    std::thread worker_;
};

} // namespace edge
