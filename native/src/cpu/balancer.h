#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edge {

// A missing expert of the block that runs.
struct Miss {
    int32_t expert;
    int32_t pairs; // tokens that are routed to it
    float   score; // what a slot for it is worth
};

// What a block has to wait for besides its own misses, in nanoseconds.
struct Around {
    double link   = 0; // until the link is free
    double device = 0; // that the device computes the block's experts, from when all that are fetched are there
};

// What one expert takes, in nanoseconds, measured before the first block.
struct CostCalibration {
    uint64_t expert_bytes;
    double   cpu;         // to compute it for one token,
    double   cpu_pair;    // for one more,
    double   cpu_shared;  // and for one while the link
    size_t   n_fetched;   // brings so many
    double   link;        // to fetch it
    double   device_byte; // to read a byte of its weights there; 0: not known
};

// Which of a block's missing experts are fetched, and which the CPU computes meanwhile: so that the later of the two is
// done as early as possible, max(T_cpu, T_link + T_gpu), the objective of MoE-SpAc's workload balancer (arXiv 2603.09983). All
// experts of a block have the same bytes, so for any number of fetches the best to fetch are those that cost the CPU
// most; trying every number solves the integer program exactly. Among equals the most worth is fetched. T_gpu is the same for
// every split, as the device computes all pairs, those of the CPU's experts with an arbitrary slot; it is time that the CPU has.
//
// Costs are measured while loading, where that can be, and learned while it runs. Every so many blocks some are computed only, some fetched only and some divided as if
// both did not disturb each other, so that nothing is forgotten or given up while it is not in use; in between all follow
// what is measured. CPU and link share the memory, so the CPU's time grows by a part, also learned, of the time that both run.
class Balancer {
public:
    // The link's rate if it is known. Without overlap, where copies are synchronous, nothing is fetched.
    Balancer(uint64_t link_bytes_per_s, bool overlaps);

    // Moves those to fetch to the front and says how many they are.
    size_t split(std::vector<Miss> & missing, uint64_t expert_bytes, const Around & around = {});

    // What took ns: the CPU's part of a block, while bytes travelled for link_ns; and fetches, which may have taken less
    // when that is not exact.
    void computed(size_t n_experts, size_t n_pairs, uint64_t expert_bytes, double ns, double link_ns);
    void fetched(size_t n_experts, uint64_t expert_bytes, double ns, bool is_exact);

    // Instead of guesses; no block has to teach it then.
    void calibrate(const CostCalibration & measured);

    // As at the beginning: for when nothing is computed any more that would tell what it costs.
    void learn_cpu_again();

    // Nanoseconds until the last of them is there. pairs: of the n_computed experts.
    double cpu_ns(size_t n_computed, size_t pairs, uint64_t expert_bytes) const;
    double link_ns(size_t n_fetched, uint64_t expert_bytes) const;
    double device_ns(size_t n_experts, uint64_t expert_bytes) const; // reading their weights
    static double block_ns(double cpu, double link, double device, double contention); // all at once

    // Nanoseconds a block that splitting saves against fetching everything, of late.
    double gain_ns() const { return gain_; }
    bool overlaps() const { return overlaps_; }
    double cpu_bytes_per_s() const { return 1e9 / cpu_byte_.value; }
    double link_bytes_per_s() const { return 1e9 / link_byte_.value; }
    double device_bytes_per_s() const { return device_byte_ > 0 ? 1e9 / device_byte_ : 0; }
    double contention() const { return contention_.value; }

private:
    // A cost that follows its measurements and falls faster than it rises, to the least of the first ones: threads that had to
    // be woken and pages read for the first time are not what the next block will cost.
    struct Cost {
        double value;
        int    measured = 0; // the first ones only
        void follow(double measurement);
    };

    double split_ns(const std::vector<Miss> & missing, uint64_t expert_bytes, size_t fetched, size_t pairs, double contention, const Around & around) const;
    size_t best_split(const std::vector<Miss> & missing, uint64_t expert_bytes, size_t least, size_t most, double contention, const Around & around) const;

    bool     overlaps_;
    bool     link_is_known_;
    uint32_t blocks_     = 0;          // split so far
    Cost     cpu_byte_{ 1.0 / 15 };    // ns: the weights of one expert are read once
    Cost     pair_byte_{ 0.5 / 15 };   // ns: each further token of an expert
    Cost     link_byte_;               // ns
    Cost     contention_{ 0.2, 4 };    // the CPU's time grows by this part of the time that it shares with the link
    double   device_byte_ = 0;         // ns: 0 where it was not measured
    double   gain_       = 0;
};

} // namespace edge
