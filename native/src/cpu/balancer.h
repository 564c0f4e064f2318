#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edge {

// A missing expert of the running block.
struct Miss {
    int32_t expert;
    int32_t pairs; // tokens that are routed to it
    float score; // of the expert, for a slot
};

// Waiting times of a block besides its own misses, in nanoseconds.
struct Around {
    double link = 0; // until the link is free
    double device = 0; // the device computes the block's experts once all fetched ones are there
};

// Cost of one expert, in nanoseconds, measured before the first block.
struct CostCalibration {
    uint64_t expert_bytes;
    double cpu; // to compute it for one token
    double cpu_pair; // for each further token
    double cpu_shared; // for one token while the link is busy
    size_t n_fetched; // with this many experts
    double link; // to fetch it
    double device_byte; // to read a byte of its weights on the device; 0: unknown
};

// Chooses which of a block's missing experts are fetched and which the CPU computes meanwhile, so that both are done as
// early as possible: it minimises max(T_cpu, T_link + T_gpu), the objective of MoE-SpAc's workload balancer (arXiv
// 2603.09983). All experts of a block have equal bytes. For any number of fetches it is therefore best to fetch the
// ones that cost the CPU most. Trying every number solves the integer program exactly. Among equals the highest score
// is fetched. T_gpu is the same for every split, since the device computes all pairs, those of the CPU's experts with a
// placeholder slot.
//
// Costs are measured while loading, if possible, and learned while running. Most blocks follow the measured costs. In
// every period of blocks a few are only computed, a few only fetched, and a few split as if there were no contention.
// So every cost is measured again even while it is not in use. CPU and link share the memory, so CPU time grows by a
// learned fraction of the time in which both are busy.
class Balancer {
public:
    // link_bytes_per_s: 0 if unknown. Without overlap, with synchronous copies, nothing is fetched.
    Balancer(uint64_t link_bytes_per_s, bool overlaps);

    // Move the experts to fetch to the front and return their number.
    size_t split(std::vector<Miss> & missing, uint64_t expert_bytes, const Around & around = {});

    // Learn from a block's CPU part, which took ns while transfers took link_ns, and from fetches, which took ns, or
    // less if that is not exact.
    void computed(size_t n_experts, size_t n_pairs, uint64_t expert_bytes, double ns, double link_ns);
    void fetched(size_t n_experts, uint64_t expert_bytes, double ns, bool is_exact);

    // Start from measured costs; no block has to measure them then.
    void calibrate(const CostCalibration & measured);

    // Measure the CPU's cost again, after a time in which it computed nothing.
    void learn_cpu_again();

    // Nanoseconds until the last of them is done. pairs: of the n_computed experts.
    double cpu_ns(size_t n_computed, size_t pairs, uint64_t expert_bytes) const;
    double link_ns(size_t n_fetched, uint64_t expert_bytes) const;
    double device_ns(size_t n_experts, uint64_t expert_bytes) const; // reading their weights
    static double block_ns(double cpu, double link, double device, double contention); // all three in parallel

    // Recent nanoseconds per block that splitting saves against fetching everything.
    double gain_ns() const { return gain_; }
    bool overlaps() const { return overlaps_; }
    double cpu_bytes_per_s() const { return 1e9 / cpu_byte_.value; }
    double link_bytes_per_s() const { return 1e9 / link_byte_.value; }
    double device_bytes_per_s() const { return device_byte_ > 0 ? 1e9 / device_byte_ : 0; }
    double contention() const { return contention_.value; }

private:
    // A cost that follows its measurements, falls faster than it rises, and starts at the smallest of the first ones:
    // later blocks neither wake threads nor read pages for the first time.
    struct Cost {
        double value;
        int measured = 0; // up to first_ones
        void follow(double measurement);
    };

    double split_ns(const std::vector<Miss> & missing, uint64_t expert_bytes, size_t fetched, size_t pairs,
                    double contention, const Around & around) const;
    size_t best_split(const std::vector<Miss> & missing, uint64_t expert_bytes, size_t least, size_t most,
                      double contention, const Around & around) const;

    bool overlaps_;
    bool link_is_known_;
    uint32_t blocks_ = 0; // split so far
    Cost cpu_byte_{ 1.0 / 15 }; // ns: the weights of one expert are read once
    Cost pair_byte_{ 0.5 / 15 }; // ns: each further token of an expert
    Cost link_byte_; // ns
    Cost contention_{ 0.2, 4 }; // CPU time grows by this fraction of the time shared with the link
    double device_byte_ = 0; // ns; 0: not measured
    double gain_ = 0;
};

} // namespace edge
