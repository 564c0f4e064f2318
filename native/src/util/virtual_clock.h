#pragma once

#include <algorithm>
#include <cstdint>

namespace edge {

// Time of deterministic mode, in nanoseconds: blocks take block_ns to compute, and bytes cross one link at a fixed
// rate, one transfer after another.
class VirtualClock {
public:
    VirtualClock(uint64_t bytes_per_s, uint64_t block_ns) : bytes_per_s_(bytes_per_s), block_ns_(block_ns) {}

    uint64_t now() const { return now_; }
    void compute_block() { now_ += block_ns_; }
    void wait_until(uint64_t time) { now_ = std::max(now_, time); }

    // Earliest begin of a transfer.
    uint64_t begin(uint64_t requested_at) const { return std::max(link_free_, requested_at); }
    uint64_t transfer(uint64_t requested_at, uint64_t bytes) { // begins it and returns its arrival
        link_free_ = begin(requested_at) +
                     static_cast<uint64_t>(1e9 * static_cast<double>(bytes) / static_cast<double>(bytes_per_s_));
        return link_free_;
    }

private:
    uint64_t bytes_per_s_;
    uint64_t block_ns_;
    uint64_t now_ = 0;
    uint64_t link_free_ = 0;
};

} // namespace edge
