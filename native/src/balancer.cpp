#include "balancer.h"

#include <algorithm>

namespace edge {

namespace {

constexpr double cpu_start  = 15e3; // ns: threads woken, a graph of a few nodes begun and ended
constexpr double link_start = 8e3;  // ns: copies queued, their end noticed
constexpr double weight     = 0.1;  // of what is averaged
constexpr double falling    = 0.2;  // of a measurement below the estimate
constexpr double rising     = 0.05; // above it

constexpr uint32_t period        = 2048; // blocks, of which the first
constexpr uint32_t computed_only = 12;   // teach the CPU's rate by itself
constexpr uint32_t fetched_only  = 16;   // up to this one, the link's

} // namespace

void Balancer::Cost::follow(double measurement) {
    ++measured;
    value += std::max(measurement < value ? falling : rising, 1.0 / measured) * (measurement - value);
}

Balancer::Balancer(uint64_t link_bytes_per_s, bool overlaps)
    : overlaps_(overlaps), link_is_known_(link_bytes_per_s > 0),
      link_byte_{ link_bytes_per_s > 0 ? 1e9 / static_cast<double>(link_bytes_per_s) : 1.0 / 12.5 } {}

double Balancer::cpu_ns(size_t n_computed, size_t pairs, uint64_t expert_bytes) const {
    if (n_computed == 0) {
        return 0;
    }
    const auto further = static_cast<double>(pairs - n_computed);
    return cpu_start + static_cast<double>(expert_bytes) * (static_cast<double>(n_computed) * cpu_byte_.value + further * pair_byte_.value);
}

double Balancer::link_ns(size_t n_fetched, uint64_t expert_bytes) const {
    return n_fetched == 0 ? 0 : link_start + static_cast<double>(n_fetched) * static_cast<double>(expert_bytes) * link_byte_.value;
}

double Balancer::block_ns(double cpu, double link) const {
    return std::max(cpu + contention_.value * std::min(cpu, link), link);
}

size_t Balancer::split(std::vector<Miss> & missing, uint64_t expert_bytes) {
    if (!overlaps_ || missing.empty()) {
        return 0;
    }
    std::sort(missing.begin(), missing.end(), [](const Miss & a, const Miss & b) {
        return a.pairs != b.pairs ? a.pairs > b.pairs : a.worth != b.worth ? a.worth > b.worth : a.expert < b.expert;
    });
    const size_t n = missing.size();
    size_t pairs = 0; // of those that the CPU computes
    for (const Miss & miss : missing) {
        pairs += static_cast<size_t>(miss.pairs);
    }
    size_t best = 0;
    double least = block_ns(cpu_ns(n, pairs, expert_bytes), 0);
    for (size_t fetched = 1; fetched <= n; ++fetched) {
        pairs -= static_cast<size_t>(missing[fetched - 1].pairs);
        const double ns = block_ns(cpu_ns(n - fetched, pairs, expert_bytes), link_ns(fetched, expert_bytes));
        if (ns < least) {
            best  = fetched;
            least = ns;
        }
    }
    gain_ += weight * (link_ns(n, expert_bytes) - least - gain_);
    const uint32_t turn = blocks_++ % period;
    if (turn < fetched_only) {
        return turn < computed_only ? 0 : n;
    }
    return best;
}

void Balancer::computed(size_t n_experts, size_t n_pairs, uint64_t expert_bytes, double ns, double link_ns) {
    const double alone = cpu_ns(n_experts, n_pairs, expert_bytes);
    const double shared = std::min(alone, link_ns);
    if (shared > alone / 4) {
        contention_.follow(std::clamp((ns - alone) / shared, 0.0, 2.0));
        return;
    }
    const double per_byte = std::max(0.0, ns - contention_.value * shared - cpu_start) / static_cast<double>(expert_bytes);
    if (n_pairs == n_experts) {
        cpu_byte_.follow(per_byte / static_cast<double>(n_experts));
    } else {
        const auto further = static_cast<double>(n_pairs - n_experts);
        pair_byte_.follow(std::max(0.0, per_byte - static_cast<double>(n_experts) * cpu_byte_.value) / further);
    }
}

void Balancer::fetched(size_t n_experts, uint64_t expert_bytes, double ns, bool is_exact) {
    if (link_is_known_) {
        return;
    }
    const double per_byte = std::max(1.0, ns - link_start) / (static_cast<double>(n_experts) * static_cast<double>(expert_bytes));
    if (is_exact || per_byte < link_byte_.value) {
        link_byte_.follow(per_byte);
    }
}

} // namespace edge
