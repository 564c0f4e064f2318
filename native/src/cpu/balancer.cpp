#include "cpu/balancer.h"

#include <algorithm>
#include <cmath>

namespace edge {

namespace {

constexpr double cpu_start = 15e3; // ns: threads woken, a graph of a few nodes begun and ended
constexpr double link_start = 8e3; // ns: copies queued, their end noticed
constexpr double weight = 0.1; // smoothing of averages
constexpr double falling = 0.2; // weight of a measurement below the estimate
constexpr double rising = 0.05; // weight of one above it
constexpr int first_ones = 8; // first measurements, of which the smallest is believed

constexpr uint32_t period = 2048; // blocks, of which the first
constexpr uint32_t computed_only = 12; // measure the CPU's rate alone,
constexpr uint32_t fetched_only = 16; // those up to this one the link's rate,
constexpr uint32_t divided = 20; // and those up to this one their contention
constexpr double least_cost = 1e-3; // ns per byte: a rate above 1 TB/s is a measurement error
constexpr double most_contention = 2;

} // namespace

void Balancer::Cost::follow(double measurement) {
    measured = std::min(measured + 1, 1000);
    const bool lower = measurement < value;
    value += (measured == 1 || (lower && measured <= first_ones) ? 1
              : lower                                            ? falling
                                                                 : rising) *
             (measurement - value);
}

Balancer::Balancer(uint64_t link_bytes_per_s, bool overlaps)
    : overlaps_(overlaps), link_is_known_(link_bytes_per_s > 0),
      link_byte_{ link_bytes_per_s > 0 ? 1e9 / static_cast<double>(link_bytes_per_s) : 1.0 / 12.5 } {}

double Balancer::cpu_ns(size_t n_computed, size_t pairs, uint64_t expert_bytes) const {
    if (n_computed == 0) {
        return 0;
    }
    const auto further = static_cast<double>(pairs - n_computed);
    return cpu_start + static_cast<double>(expert_bytes) *
                           (static_cast<double>(n_computed) * cpu_byte_.value + further * pair_byte_.value);
}

double Balancer::link_ns(size_t n_fetched, uint64_t expert_bytes) const {
    return n_fetched == 0
               ? 0
               : link_start + static_cast<double>(n_fetched) * static_cast<double>(expert_bytes) * link_byte_.value;
}

double Balancer::device_ns(size_t n_experts, uint64_t expert_bytes) const {
    return static_cast<double>(n_experts) * static_cast<double>(expert_bytes) * device_byte_;
}

double Balancer::block_ns(double cpu, double link, double device, double contention) {
    return std::max(cpu + contention * std::min(cpu, link), link + device);
}

// pairs: of the experts that are not fetched.
double Balancer::split_ns(const std::vector<Miss> & missing, uint64_t expert_bytes, size_t fetched, size_t pairs,
                          double contention, const Around & around) const {
    const double link = fetched > 0 ? around.link + link_ns(fetched, expert_bytes) : 0;
    return block_ns(cpu_ns(missing.size() - fetched, pairs, expert_bytes), link, around.device, contention);
}

// Return how many of the first experts to fetch, from least to most.
size_t Balancer::best_split(const std::vector<Miss> & missing, uint64_t expert_bytes, size_t least, size_t most,
                            double contention, const Around & around) const {
    size_t pairs = 0; // of the experts that the CPU computes
    for (size_t i = least; i < missing.size(); ++i) {
        pairs += static_cast<size_t>(missing[i].pairs);
    }
    size_t best = least;
    double least_ns = HUGE_VAL;
    for (size_t fetched = least; fetched <= most; ++fetched) {
        const double ns = split_ns(missing, expert_bytes, fetched, pairs, contention, around);
        if (ns < least_ns) {
            best = fetched;
            least_ns = ns;
        }
        pairs -= fetched < missing.size() ? static_cast<size_t>(missing[fetched].pairs) : 0;
    }
    return best;
}

size_t Balancer::split(std::vector<Miss> & missing, uint64_t expert_bytes, const Around & around) {
    if (!overlaps_ || missing.empty()) {
        return 0;
    }
    std::sort(missing.begin(), missing.end(), [](const Miss & a, const Miss & b) {
        return a.pairs != b.pairs ? a.pairs > b.pairs : a.score != b.score ? a.score > b.score : a.expert < b.expert;
    });
    const size_t n = missing.size();
    const size_t best = best_split(missing, expert_bytes, 0, n, contention_.value, around);
    size_t pairs = 0;
    for (size_t i = best; i < n; ++i) {
        pairs += static_cast<size_t>(missing[i].pairs);
    }
    const double all_fetched = split_ns(missing, expert_bytes, n, 0, contention_.value, around);
    gain_ += weight * (all_fetched - split_ns(missing, expert_bytes, best, pairs, contention_.value, around) - gain_);
    const uint32_t turn = blocks_++ % period;
    if (turn < fetched_only) {
        return turn < computed_only ? 0 : n;
    }
    return turn < divided && n > 1 ? best_split(missing, expert_bytes, 1, n - 1, 0, around) : best;
}

void Balancer::calibrate(const CostCalibration & measured) {
    const auto bytes = static_cast<double>(measured.expert_bytes);
    const auto per_byte = [&](double ns) { return Cost{ std::max(least_cost, ns / bytes), first_ones }; };
    cpu_byte_ = per_byte(measured.cpu - cpu_start);
    pair_byte_ = per_byte(measured.cpu_pair);
    if (!link_is_known_) {
        link_byte_ = per_byte(measured.link - link_start);
    }
    const double shared = std::min(measured.cpu, link_ns(measured.n_fetched, measured.expert_bytes));
    contention_ = { std::clamp((measured.cpu_shared - measured.cpu) / shared, 0.0, most_contention), first_ones };
    device_byte_ = measured.device_byte;
    blocks_ = divided;
}

void Balancer::learn_cpu_again() {
    blocks_ = 0;
    cpu_byte_.measured = pair_byte_.measured = 0;
}

void Balancer::computed(size_t n_experts, size_t n_pairs, uint64_t expert_bytes, double ns, double link_ns) {
    const double alone = cpu_ns(n_experts, n_pairs, expert_bytes);
    const double shared = std::min(alone, link_ns);
    if (shared > alone / 4) {
        contention_.follow(std::clamp((ns - alone) / shared, 0.0, most_contention));
        return;
    }
    const double measured = std::max(0.0, ns - contention_.value * shared - cpu_start);
    if (n_pairs == n_experts) {
        cpu_byte_.follow(
            std::max(least_cost, measured / (static_cast<double>(n_experts) * static_cast<double>(expert_bytes))));
    } else { // one measurement for two unknowns: scale both by the error of their sum
        const double factor = std::clamp(measured / (alone - cpu_start), 0.25, 4.0);
        cpu_byte_.follow(std::max(least_cost, cpu_byte_.value * factor));
        pair_byte_.follow(std::max(least_cost, pair_byte_.value * factor));
    }
}

void Balancer::fetched(size_t n_experts, uint64_t expert_bytes, double ns, bool is_exact) {
    if (link_is_known_) {
        return;
    }
    const double per_byte =
        std::max(1.0, ns - link_start) / (static_cast<double>(n_experts) * static_cast<double>(expert_bytes));
    if (is_exact || per_byte < link_byte_.value) {
        link_byte_.follow(std::max(least_cost, per_byte));
    }
}

} // namespace edge
