#pragma once

#include "cpu/balancer.h"
#include "edge_speq.h"
#include "prefetch/router_predictor.h"
#include "util/link.h"
#include "slots/slot_store.h"
#include "slots/slot_pool.h"
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
    uint64_t link_bytes_per_s = 0;     // 0: the link as it is
    bool     deterministic    = false; // no worker: transfers take virtual time, on the decoding thread
    uint64_t block_ns         = 0;     // virtual time that a block computes
    bool     splits_always    = false; // demand_hybrid fetches even where copies run beside nothing: for tests
};

// Keeps a bounded set of experts on the compute device: demand loads on the decoding thread, prefetches on a worker
// thread. One mutex guards the pools, the orders and the counters; copies run outside it, into slots that are marked
// loading and so belong to the thread that copies. The worker has at most one expert's copies under way, so a
// demanded copy waits for no more than that.
class SlotCache {
public:
    SlotCache(const ExpertTable & table, const std::vector<int32_t> & slots, ggml_backend_buffer_type_t buft, const TransferParams & params);
    ~SlotCache();
    SlotCache(const SlotCache &) = delete;
    SlotCache & operator=(const SlotCache &) = delete;

    // The experts ids[0..n) of this block are about to be read: takes a slot for each, pins it, and writes it to
    // slots[0..n). The device has finished every earlier block. On return they are resident, or under way where copies
    // run beside the caller: await_fetches(), or hold_for_fetches() the backend.
    void demand(int32_t block, const int32_t * ids, int32_t n, int32_t * slots);
    // The same for a block whose missing experts may be computed on the CPU, by the balancer's choice: the slot of those is none.
    void demand_hybrid(int32_t block, const int32_t * ids, int32_t n, int32_t * slots);
    bool fetching() const { return !fetches_.slots.empty() || !fetches_.late.empty(); }
    bool hold_for_fetches(ggml_backend_t backend) { return fetches_.late.empty() && demand_link_.holds(backend); }
    void await_fetches();
    // What orders ask for of this block, else what the gate can_predict of it from the rows [n_embd] that enter the block
    // before it, is sent as far as the link would idle.
    void prefetch_next_layer(int32_t block, const float * rows, int32_t n_tokens);
    bool can_prefetch_next_layer(int32_t block) const;
    bool link_idles_first() const { return nanoseconds(link_free_ - Clock::now()) < cpu_left_ns_; } // before the CPU's part, by estimate
    void use_router_predictor(std::unique_ptr<RouterPredictor> predictor);
    // Before the first block: what an expert takes on each side, where some are fetched beside the CPU at all.
    void calibrate_costs(CpuExperts & cpu);
    // The CPU's part of that block took so long.
    void computed(int32_t block, size_t n_experts, size_t n_pairs, double ns);
    const Balancer & balancer() const { return balancer_; }
    void learn_cpu_again() { balancer_.learn_cpu_again(); }
    bool fetches_some() const; // whether demand_hybrid ever fetches
    void end_step();

    // Whether every expert is in a slot, so that nothing is ever evicted. Not in virtual time, which passes block by block.
    bool all_resident() const;
    // The experts ids[0..n) of this block were read, all of them in slots.
    void used(int32_t block, const int32_t * ids, int32_t n);

    // The slot of an expert that a graph without slots copies from, pinned until the step ends; none unless it is there.
    int32_t pin_resident(int32_t block, int32_t expert);
    Link & demand_link() { return demand_link_; } // the decoding thread's
    // Whether a graph without slots, n_pairs of whose tokens and experts are this block's, takes less time with copies of those
    // that are in no slot than on the CPU, by estimate.
    bool gpu_offload_is_faster(int32_t block, int32_t n_pairs) const;

    // A graph without slots copies experts of this block to the device, a matrix each after the other; wanted: [n_expert], by how
    // many tokens each was. Those that are wanted clearly more than others are to be sent to the others' slots, and lend() lends
    // either of both until end_admission() says that all matrices have been. Without that the slots are free once the step ends.
    struct Admission {
        int32_t slot;
        int32_t evicted;
        int32_t admitted;
    };
    const std::vector<Admission> & begin_admission(int32_t block, const float * wanted);
    void end_admission();

    // Takes over scores() and replaces the outstanding orders, of which at most byte_budget bytes are begun. margin: what
    // absent experts' priorities are less by. sound: whether all scores were numbers.
    int32_t prefetch(const edge_prefetch_request * requests, int32_t n, uint64_t byte_budget, float margin = 0.0F, bool * finite = nullptr);
    void drain();

    // Other slot counts, while no graph runs: the experts of most worth that fit are loaded again. When the new slots
    // cannot be allocated there are none, serving() is false, until a resize succeeds.
    void resize(const std::vector<int32_t> & slots);
    bool has_slots() const { return store_ != nullptr; }

    float * scores() { return shared_scores_.data(); } // [n_blocks, n_expert], written by the caller between steps
    edge_counters counters() const;
    edge_costs costs() const; // what demand_hybrid has learned
    void states(uint8_t * out) const;
    void poison_free_slots();
    uint64_t bytes() const;
    const SlotStore & store() const { return *store_; }

private:
    struct Request {
        int32_t  block;
        int32_t  expert;
        int32_t  deadline;
        float    priority;
        uint64_t requested_at; // virtual
    };
    using Clock = std::chrono::steady_clock;
    struct NextLayerCopy { // an expert of the coming block, under way behind what was demanded
        int32_t           group;
        int32_t           slot;
        Link::Ticket      ticket;
        Clock::time_point due; // by estimate
    };
    struct InFlight { // a prefetch whose copies have begun
        int32_t      group;
        int32_t      slot;
        Link::Ticket ticket;
        uint64_t     arrives_at; // virtual
    };
    struct Precision { // of experts foretold that were in no slot: the part that came true
        float value = 0.6F;
        float judged = 3; // times, that much of an opinion at first
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
    bool defers() const; // copies of demands run beside the caller
    bool is_on_demand_link(int32_t group, int32_t slot) const; // loading by the demand link
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
    void uncount_prefetch(uint64_t bytes); // it was counted, and never begun
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

    bool commit_scores(); // whether all were numbers
    std::optional<InFlight> begin_prefetch(const Request & request);
    bool send(const Request & request, InFlight & flight);
    void finish(const InFlight & flight, bool arrived);
    void work();
    void run_virtual_requests();
    bool complete_virtual_flight();

    const ExpertTable &        table_;
    ggml_backend_buffer_type_t buft_;
    Throttle                   throttle_;
    Link                       demand_link_;
    Link                       prefetch_link_;
    Balancer                   balancer_; // the decoding thread's
    bool                       splits_always_;
    std::unique_ptr<SlotStore> store_;
    std::vector<float>         shared_scores_;

    mutable std::mutex          mutex_; // guards all below but the worker itself
    std::condition_variable     loaded_;
    std::condition_variable     requested_;
    std::vector<SlotPool>       pools_;
    std::vector<Request>          requests_; // the worker's, most urgent last
    std::vector<Request>          next_layer_requests_; // the decoding thread's: of blocks that it looks ahead to
    std::vector<bool>           requested_blocks_; // whose experts were ordered: nobody asks the gate
    std::optional<VirtualClock> clock_;  // of deterministic mode
    std::optional<InFlight>     virtual_flight_;
    uint64_t                    byte_budget_ = 0; // what is left of it
    int32_t                     n_in_flight_      = 0; // prefetches begun and not finished
    bool                        stop_        = false;
    bool                        demand_waits_ = false; // for a slot: no prefetch may begin
    int32_t                     last_block_  = -1;
    edge_counters               counters_{};
    edge_costs                  costs_{};
    std::unique_ptr<RouterPredictor>       router_predictor_;
    std::vector<int32_t>        predicted_;     // experts of that block, the likeliest first
    std::vector<int32_t>        predicted_absent_; // those that were in no slot
    int32_t                     predicted_block_ = -1;
    bool                        predicted_by_request_ = false;
    float                       router_precision_ = 0.7F; // of the gate, of late
    std::vector<Precision>      router_absent_precision_; // the gate's, of each block
    std::vector<Precision>      request_precision_; // that of orders
    struct PrefillUse { // by a prompt
        float   weight;
        int32_t group;
        int32_t slot;
        int32_t key;
    };
    std::vector<PrefillUse>         prefill_uses_; // and in slots
    std::vector<Admission>           admissions_; // of that block, under way
    int32_t                     admission_block_ = -1;
    uint64_t                    prefetched_bytes_ = 0;
    uint64_t                    prefetched_used_bytes_ = 0;

    std::vector<int32_t> slot_of_;  // of the block that is demanded: by expert
    std::vector<int32_t> demanded_;   // its distinct experts
    std::vector<int32_t> missing_;
    std::vector<int32_t> loading_;  // its experts that the demand link is to bring
    std::vector<Miss>    misses_;   // of demand_hybrid: those under way first

    // The decoding thread's: what the running block waits for, and nobody has waited for yet.
    struct Fetches {
        int32_t group  = 0;
        bool    queued = false; // behind a prefetch
        size_t  n_sent = 0;     // of slots: the others were sent ahead
        Link::Ticket ticket = 0;
        std::vector<int32_t> slots;
        std::vector<std::pair<int32_t, int32_t>> late; // slot and key of what prefetches are bringing
        Clock::time_point sent;
        Clock::time_point idle_since; // when nothing but them was left to wait for
    };
    Fetches            fetches_;
    std::vector<NextLayerCopy> next_layer_copies_;
    std::vector<int32_t> taken_;      // slots of the block that its demands are sent to
    double             cpu_left_ns_ = 0; // that the CPU will need for the running block, from when its experts are known
    double             predictor_ns_ = 0;  // that asking the gate takes, average
    uint32_t           predictor_skipped_ = 0;
    Clock::time_point  link_free_{};  // by estimate
    Clock::time_point  ready_{};      // when the last block had all its experts
    double             block_ns_ = 0; // from then until the next block knows its own, average

    std::thread worker_;
};

} // namespace edge
