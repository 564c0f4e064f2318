#pragma once

#include "edge_speq.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace edge {

// What the decoding thread did when, for a picture of a step. Nothing is kept, and nothing allocated, until begin().
class Timeline {
public:
    void begin(size_t capacity) { // drops what was kept; 0: keeps nothing any more
        spans_.clear();
        spans_.reserve(capacity);
        capacity_ = capacity;
    }
    const std::vector<edge_span> & spans() const { return spans_; }

    // What goes on until it is destroyed.
    class Span {
    public:
        Span(Timeline & timeline, int32_t kind, int32_t block) : timeline_(timeline), span_{ kind, block, timeline.on() ? now() : 0, 0 } {}
        ~Span() {
            if (timeline_.on()) {
                span_.end_ns = now();
                timeline_.spans_.push_back(span_);
            }
        }
        Span(const Span &) = delete;
        Span & operator=(const Span &) = delete;

    private:
        Timeline & timeline_;
        edge_span  span_;
    };

private:
    bool on() const { return spans_.size() < capacity_; }
    static uint64_t now() {
        const auto since = std::chrono::steady_clock::now().time_since_epoch();
        return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(since).count());
    }

    std::vector<edge_span> spans_;
    size_t                 capacity_ = 0;
};

} // namespace edge
