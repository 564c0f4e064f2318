// SlotCache on a device whose copies overlap with the caller: a slot that a kernel reads holds the demanded expert,
// whatever was prefetched, cancelled, failed or requested by another thread meanwhile. Run under TSan as well as ASan
// and UBSan.
#include "check.h"
#include "fake_device.h"
#include "labelled_model.h"
#include "scripted_predictor.h"
#include "slots/slot_cache.h"
#include "util/error.h"
#include "util/faults.h"
#include "warm_cache.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cinttypes>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

using namespace labelled;

namespace {

constexpr uint64_t no_budget = UINT64_MAX;

struct Conditions {
    unsigned seed;
    int steps;
    bool page_locked = true; // otherwise weights are in pageable memory and are staged
    bool faults = false;
    uint64_t link_bytes_per_s = 0;
};

// Counts what happened, so that a campaign without any event is noticed.
struct Tally {
    std::atomic<uint64_t> reads{ 0 };
    std::atomic<uint64_t> wrong{ 0 };
    int held = 0; // kernels that the device held until their experts had arrived
    int cancelled = 0;
    int failed = 0;
    int unended = 0; // steps without an end_step()
    int resized = 0;
    edge_counters counters{};
};

// Steps over all blocks as edge_hook runs them, with everything that may happen in between.
class Campaign {
public:
    Campaign(fake::Device & device, const Model & model, const Conditions & conditions, Tally & tally)
        : device_(device), model_(model), conditions_(conditions), tally_(tally), random_(conditions.seed),
          slot_cache_(model.table, some_slots(), device.memory(), over_link(conditions.link_bytes_per_s)),
          compute_(device.open_stream()) {
        slot_cache_.use_router_predictor(std::make_unique<edge::RouterPredictor>(nullptr, model.table));
    }

    void run() {
        std::atomic<bool> done{ false };
        std::thread policy([&] { change_minds(done); });
        for (int i = 0; i < conditions_.steps; ++i) {
            step(i);
        }
        slot_cache_.end_step();
        done = true;
        policy.join();
        slot_cache_.drain();
        check_rest();
        tally_.counters = slot_cache_.counters();
    }

private:
    int32_t below(unsigned n) { return static_cast<int32_t>(random_() % n); }
    bool one_in(unsigned n) { return random_() % n == 0; }
    std::vector<int32_t> some_slots() { return { 13 + below(7), 13 + below(5) }; } // 12 of a block and one to load into

    // Another thread sends requests and reads states.
    void change_minds(const std::atomic<bool> & done) {
        std::mt19937 random(conditions_.seed + 7);
        const auto any = [&](unsigned n) { return static_cast<int32_t>(random() % n); };
        std::vector<uint8_t> states(n_blocks * n_expert);
        while (!done) {
            std::vector<edge_prefetch_request> requests;
            for (int32_t n = any(6); n > 0; --n) {
                requests.push_back({ any(n_blocks), any(n_expert), any(n_blocks + 1), static_cast<float>(any(3)) });
            }
            slot_cache_.prefetch(requests.data(), static_cast<int32_t>(requests.size()), any(4) ? no_budget : 0,
                                 static_cast<float>(any(2)));
            slot_cache_.counters();
            slot_cache_.costs();
            slot_cache_.states(states.data());
            fake::pass(any(300));
        }
    }

    // Demands of each block: of few experts in one block, of all in another, changing over time.
    void choose_routing(int number) {
        for (Experts & ids : routing_) {
            ids.resize(4 * static_cast<size_t>(1 + below(3)));
            const unsigned width = one_in(2) ? 6 : n_expert;
            std::generate(ids.begin(), ids.end(), [&] { return (below(width) + number / 20) % n_expert; });
        }
    }

    void step(int number) {
        choose_routing(number);
        device_.copy_us = below(one_in(4) ? 300 : 40);
        if (conditions_.faults && one_in(3)) {
            edge::arm_fault(edge::Fault::copy, 1 + below(40));
        }
        pending_ = -1;
        bool whole = true;
        for (int32_t block = 0; block < n_blocks && whole; ++block) {
            whole = !one_in(20) && run_block(block);
            tally_.cancelled += whole ? 0 : 1;
        }
        ggml_backend_synchronize(compute_.get());
        edge::arm_fault(edge::Fault::copy, 0);
        if (whole || one_in(2)) {
            slot_cache_.end_step();
        } else {
            ++tally_.unended;
        }
        if (one_in(10)) {
            ++tally_.resized;
            slot_cache_.resize(some_slots());
        }
    }

    // False if it failed, which ends the graph.
    bool run_block(int32_t number) {
        const Experts & ids = routing_[static_cast<size_t>(number)];
        bool whole = true;
        const edge_counters before = slot_cache_.counters();
        try {
            prefetch_next_layer();
            some_ = one_in(2);
            if (some_ ? one_in(2) : !one_in(4)) { // a demand completes what was not awaited
                slot_cache_.await_fetches();
            }
            ggml_backend_synchronize(compute_.get());
            demand(number, ids);
            const edge_counters after = slot_cache_.counters();
            CHECK(after.hits - before.hits + after.misses - before.misses == n_distinct(ids));
            launch(number, ids);
        } catch (const edge::Error &) {
            ++tally_.failed;
            whole = false;
        }
        const edge_counters now = slot_cache_.counters();
        CHECK(now.misses == now.fetched + now.cpu_computed && now.prefetched_used <= now.prefetched);
        CHECK(now.bytes_wasted <= now.bytes_fetched);
        return whole;
    }

    static size_t n_distinct(Experts ids) {
        std::sort(ids.begin(), ids.end());
        return static_cast<size_t>(std::unique(ids.begin(), ids.end()) - ids.begin());
    }

    void demand(int32_t number, const Experts & ids) {
        const auto demanded = some_ ? &edge::SlotCache::demand_hybrid : &edge::SlotCache::demand;
        slots_.resize(ids.size());
        (slot_cache_.*demanded)(number, ids.data(), static_cast<int32_t>(ids.size()), slots_.data());
        if (number + 1 < n_blocks && slot_cache_.can_prefetch_next_layer(number + 1)) {
            pending_ = number + 1;
        }
        if (slot_cache_.fetching() && slot_cache_.hold_for_fetches(compute_.get())) {
            ++tally_.held;
        } else if (slot_cache_.fetching()) {
            prefetch_next_layer();
            slot_cache_.await_fetches();
        }
    }

    // Once per block: three of four predictions are right.
    void prefetch_next_layer() {
        const int32_t number = std::exchange(pending_, -1);
        if (number < 0) {
            return;
        }
        const Experts & wanted = routing_[static_cast<size_t>(number)];
        std::vector<float> predictions;
        for (int32_t n = below(9); n > 0; --n) {
            const auto prediction = static_cast<float>(one_in(4) ? below(n_expert) : wanted[random_() % wanted.size()]);
            if (std::find(predictions.begin(), predictions.end(), prediction) == predictions.end()) {
                predictions.push_back(prediction);
            }
        }
        slot_cache_.prefetch_next_layer(number, predictions.data(), static_cast<int32_t>(predictions.size()));
    }

    // The kernel reads what has a slot; the rest is computed here meanwhile.
    void launch(int32_t number, const Experts & ids) {
        const int32_t group = model_.table.blocks[static_cast<size_t>(number)].group;
        std::vector<Read> reads;
        Experts left;
        for (size_t i = 0; i < ids.size(); ++i) {
            if (slots_[i] == edge::SlotPool::none) {
                left.push_back(ids[i]);
            } else {
                reads.push_back({ number, group, ids[i], slots_[i] });
            }
        }
        CHECK(some_ || left.empty());
        const int us = below(one_in(3) ? 400 : 60);
        fake::Device::stream(compute_.get()).push([this, reads, us, store = &slot_cache_.store()] {
            look(*store, reads, "begins");
            fake::pass(us);
            look(*store, reads, "ends");
        });
        if (!some_) {
            return;
        }
        if (one_in(2)) {
            prefetch_next_layer();
        }
        if (!left.empty()) {
            fake::pass(below(200));
            slot_cache_.computed(number, n_distinct(left), left.size(), 1e3 * (1 + below(300)));
        }
        slot_cache_.await_fetches();
    }

    void look(const edge::SlotStore & store, const std::vector<Read> & reads, const char * when) {
        for (const Read & read : reads) {
            ++tally_.reads;
            if (!is_right(store, read) && tally_.wrong++ < 5) {
                std::fprintf(stderr, "a kernel %s: slot %d does not hold expert %d of block %d\n", when, read.slot,
                             read.expert, read.block);
            }
        }
    }

    // Nothing is in flight any more, and slots hold what their states say.
    void check_rest() {
        for (int32_t block = 0; block < n_blocks; ++block) {
            for (int32_t expert = 0; expert < n_expert; ++expert) {
                const int32_t slot = slot_cache_.pin_resident(block, expert);
                if (slot != edge::SlotPool::none) {
                    look(slot_cache_.store(),
                         { { block, model_.table.blocks[static_cast<size_t>(block)].group, expert, slot } }, "is over");
                }
            }
        }
        slot_cache_.end_step();
        std::vector<uint8_t> states(n_blocks * n_expert);
        slot_cache_.states(states.data());
        CHECK(std::count(states.begin(), states.end(), static_cast<uint8_t>(edge::SlotState::loading)) == 0);
    }

    fake::Device & device_;
    const Model & model_;
    const Conditions conditions_;
    Tally & tally_;
    std::mt19937 random_;
    edge::SlotCache slot_cache_;
    ggml_backend_ptr compute_; // destroyed before the events that it waits for
    std::array<Experts, n_blocks> routing_;
    std::vector<int32_t> slots_;
    int32_t pending_ = -1; // block that was not prefetched for yet
    bool some_ = false;
};

void every_kernel_reads_its_experts(const Conditions & conditions) {
    fake::Device device;
    const Model model(conditions.page_locked ? device.page_locked() : ggml_backend_cpu_buffer_type());
    Tally tally;
    Campaign(device, model, conditions, tally).run();
    const edge_counters & c = tally.counters;
    std::printf("seed %u: %" PRIu64 " reads, %" PRIu64
                " wrong; %d held, %d cancelled, %d failed, %d unended, %d resized; %" PRIu64
                " prefetched or requested, %" PRIu64 " used\n",
                conditions.seed, tally.reads.load(), tally.wrong.load(), tally.held, tally.cancelled, tally.failed,
                tally.unended, tally.resized, c.prefetched, c.prefetched_used);
    CHECK(tally.wrong == 0);
    CHECK(tally.reads > 0 && tally.cancelled > 0 && tally.unended > 0 && tally.resized > 0 &&
          (tally.failed > 0) == conditions.faults);
    CHECK((tally.held > 0) == (conditions.link_bytes_per_s == 0));
    CHECK(c.hits > 0 && c.fetched > 0 && c.prefetched_used > 0 && c.cpu_computed > 0);
}

// A predicted resident is not evicted for a predicted absent expert.
void predicted_residents_stay(fake::Device & device, const Model & model) {
    Warm warm(device, model, 10);
    warm.demand(0, { 0, 1, 2, 3 });
    warm.predict({ 9, 10, 11, 0, 1, 2 });
    CHECK(warm.slot_cache.counters().prefetched == 3);
    CHECK(warm.holds(1, { 0, 1, 2, 9, 10, 11 }) && !warm.holds(1, { 3 }));
    warm.demand(1, { 0, 1, 2, 9 });
    CHECK(warm.slot_cache.counters().prefetched_used == 1);
}

void wrong_predictions_are_evicted_first(fake::Device & device, const Model & model) {
    Warm warm(device, model, 12);
    warm.demand(0, { 0, 1, 2, 3 });
    warm.predict({ 12, 13, 14, 15 });
    warm.demand(1, { 0, 1, 2, 3 });
    warm.slot_cache.end_step();
    warm.predict({ 4, 5 }); // of a graph that was cancelled
    CHECK(warm.slot_cache.counters().prefetched == 4);
    CHECK(warm.holds(1, { 12, 13, 14, 15 }));
    warm.demand(0, { 4, 5, 6, 7 });
    CHECK(warm.holds(0, { 0, 1, 2, 3 }) && warm.holds(1, { 0, 1, 2, 3 }));
}

// The demand link has 8 marks, of which one is for the demands of the block itself.
void too_many_predictions_do_not_block(fake::Device & device, const Model & model) {
    Warm warm(device, model, 40);
    warm.demand(0, { 0, 1, 2, 3 });
    device.copy_us = 1000; // late enough that whoever needs a mark back waits for it
    const uint64_t next_use = device.host_waits();
    warm.predict({ 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 });
    CHECK(device.host_waits() == next_use && warm.slot_cache.counters().prefetched == 7);
    device.copy_us = 0;
    warm.demand(1, { 4, 5, 6, 15 });
}

// A slot in flight with a wrong prediction is the demand's as soon as its copy is done.
void wrong_predictions_make_room(fake::Device & device, const Model & model) {
    Warm warm(device, model, 9, 100000000); // 120 us per expert: two are in flight when the block begins
    warm.demand(0, { 0, 1, 2, 3 });
    warm.predict({ 12, 13, 14, 15 });
    CHECK(warm.slot_cache.counters().prefetched > 0);
    warm.demand(1, { 0, 1, 2, 3, 4, 5, 6, 7 });
}

void failed_predictions_are_dropped(fake::Device & device, const Model & model) {
    Warm warm(device, model, 40);
    warm.demand(0, { 0, 1, 2, 3 });
    edge::arm_fault(edge::Fault::copy, 2);
    warm.predict({ 9, 10 });
    CHECK(warm.slot_cache.counters().failed == 1 && warm.slot_cache.counters().prefetched == 1);
    CHECK(!warm.holds(1, { 9 }) && !warm.holds(1, { 10 }));
    device.copy_us = 1000;
    warm.begin_prefetch(1, 9); // into one of the same slots
    warm.demand(1, { 9 });
    device.copy_us = 0;
}

// Requests for the coming step are sent when their block is next, best first and within the byte budget, and the router
// predictor is not asked.
void requests_go_out_block_by_block(fake::Device & device, const Model & model) {
    Warm warm(device, model, 40);
    const auto request = [&](const std::vector<edge_prefetch_request> & requests, int32_t experts) {
        const int32_t n_absent = warm.slot_cache.prefetch(requests.data(), static_cast<int32_t>(requests.size()),
                                                          experts * model.table.groups[0].expert_bytes);
        CHECK(n_absent == 3);
        warm.slot_cache.drain();
        CHECK(warm.slot_cache.counters().prefetched == 0);
        warm.demand(0, { 0, 1, 2, 3 });
        warm.predict({ 14 });
    };
    request({ { 1, 0, 1, 3.0F }, { 1, 8, 1, 1.0F }, { 1, 9, 1, 2.0F }, { 1, 10, 1, 3.0F } }, 2);
    warm.slot_cache.prefetch_next_layer(1, nullptr, 0); // nothing is left
    CHECK(warm.holds(1, { 9, 10 }) && !warm.holds(1, { 8 }) && !warm.holds(1, { 14 }));
    warm.demand(1, { 0, 8, 9, 10 });
    CHECK(warm.slot_cache.counters().prefetched == 2 && warm.slot_cache.counters().prefetched_used == 2);
}

void an_expert_requested_twice_has_one_slot(fake::Device & device, const Model & model) {
    Warm warm(device, model, 13);
    const edge_prefetch_request requests[] = { { 1, 9, 1, 1.0F }, { 1, 9, 1, 2.0F } };
    warm.slot_cache.prefetch(requests, 2, no_budget);
    warm.demand(0, { 0, 1, 2, 3 });
    warm.predict({});
    CHECK(warm.slot_cache.counters().prefetched == 1);
    warm.demand(1, { 9 });
    warm.slot_cache.end_step();
    for (int32_t first = 0; first < n_expert; first += 4) { // every slot changes hands
        warm.demand(0, { first, first + 1, first + 2, first + 3 });
    }
    warm.demand(1, { 9 });
}

// Two in three requests are wrong, none of the router's predictions is.
void bad_requests_give_way_to_the_router(fake::Device & device, const Model & model) {
    Warm warm(device, model, 13);
    int by_request = 0;
    int by_router = 0;
    for (int32_t i = 0; i < 64; ++i) {
        const int32_t wanted = 4 + i % 4;
        const edge_prefetch_request requests[] = { { 1, 12, 1, 1.0F }, { 1, 13, 1, 2.0F }, { 1, wanted, 1, 3.0F } };
        warm.slot_cache.prefetch(requests, 3, no_budget);
        warm.demand(0, { 0, 1, 2, 3 });
        const uint64_t before = warm.slot_cache.counters().prefetched;
        warm.predict({ static_cast<float>(wanted) });
        by_router += warm.slot_cache.counters().prefetched - before == 1 ? 1 : 0;
        by_request += warm.slot_cache.counters().prefetched - before == 3 ? 1 : 0;
        fake::pass(300);
        warm.demand(1, { wanted });
        warm.slot_cache.end_step();
        for (int32_t first = 0; first < n_expert; first += 4) { // the next step finds none of block 1's experts
            warm.demand(0, { first, first + 1, first + 2, first + 3 });
        }
        warm.slot_cache.end_step();
    }
    CHECK(by_request >= 2 && by_router > 32 && by_request + by_router == 64);
}

// Requests without a byte budget do not count, nor do those of other blocks or of a step that is over.
void without_requests_the_router_predicts(fake::Device & device, const Model & model) {
    Warm warm(device, model, 40);
    struct Case {
        int32_t block;
        uint64_t budget;
        bool is_over;
    };
    int32_t prediction = 12;
    for (const Case & c : { Case{ 1, 0, false }, Case{ 3, no_budget, false }, Case{ 1, no_budget, true } }) {
        const edge_prefetch_request request{ c.block, 8, c.block, 1.0F };
        warm.slot_cache.prefetch(&request, 1, c.budget);
        if (c.is_over) {
            warm.slot_cache.end_step();
        }
        warm.demand(0, { 0, 1, 2, 3 });
        warm.predict({ static_cast<float>(prediction) });
        CHECK(warm.holds(1, { prediction }) && !warm.holds(1, { 8 }));
        warm.demand(1, { prediction++ });
        warm.slot_cache.end_step();
    }
}

// A block that left an expert to a prefetch must not run if that fails.
void failed_prefetches_end_the_graph(fake::Device & device, const Model & model) {
    Warm warm(device, model, 40);
    device.copy_us = 20000;
    edge::arm_fault(edge::Fault::copy, 3); // noticed at once, and dropped when the two before it have arrived
    warm.begin_prefetch(1, 9);
    const int32_t expert = 9;
    int32_t slot = edge::SlotPool::none;
    bool thrown = false;
    try {
        warm.slot_cache.demand_hybrid(1, &expert, 1, &slot);
        CHECK(warm.slot_cache.fetching() && slot != edge::SlotPool::none);
        warm.slot_cache.await_fetches();
    } catch (const edge::Error & error) {
        thrown = error.status == EDGE_ERR_BACKEND;
    }
    CHECK(thrown && !warm.holds(1, { 9 }));
    device.copy_us = 0;
    warm.slot_cache.end_step();
    warm.demand(1, { 9 });
}

// Fetches that nobody awaited are in flight to slots that are about to be freed.
void resizing_ends_a_step(fake::Device & device, const Model & model) {
    Warm warm(device, model, 40);
    device.copy_us = 100;
    const int32_t ids[] = { 8, 9, 10, 11 };
    int32_t slots[4];
    warm.slot_cache.demand(1, ids, 4, slots);
    warm.slot_cache.resize({ 9, n_expert });
    CHECK(!warm.slot_cache.fetching());
    device.copy_us = 0;
    CHECK(warm.holds(1, { 8, 9, 10, 11 }));
    warm.demand(1, { 8, 9, 10, 11 });
    warm.demand(0, { 8, 9, 10, 11 });
}

} // namespace

int main() {
    fake::Device device;
    const Model model(device.page_locked());
    for (const auto test :
         { predicted_residents_stay, wrong_predictions_are_evicted_first, wrong_predictions_make_room,
           too_many_predictions_do_not_block, failed_predictions_are_dropped, requests_go_out_block_by_block,
           an_expert_requested_twice_has_one_slot, bad_requests_give_way_to_the_router,
           without_requests_the_router_predicts, failed_prefetches_end_the_graph, resizing_ends_a_step }) {
        test(device, model);
    }
    every_kernel_reads_its_experts({ 1, 200 });
    every_kernel_reads_its_experts({ 2, 200, true, true });
    every_kernel_reads_its_experts({ 3, 200, false, true });
    every_kernel_reads_its_experts({ 4, 200, true, true, 500000000 });
    std::puts("in_flight: ok");
}
