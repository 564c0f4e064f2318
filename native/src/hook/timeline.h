#pragma once

#include "edge_speq.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace edge {

// Spans of the decoding thread, for a picture of a step. Keeps and allocates nothing before begin().
class Timeline {
public:
    void begin(size_t capacity) { // drops earlier spans; 0 stops recording
        spans_.clear();
        spans_.reserve(capacity);
        capacity_ = capacity;
    }
    const std::vector<edge_span> & spans() const { return spans_; }

    // Ends when it is destroyed.
    class Span {
    public:
        Span(Timeline & timeline, int32_t kind, int32_t block)
            : timeline_(timeline), span_{ kind, block, timeline.on() ? now() : 0, 0 } {}
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
        edge_span span_;
    };

private:
    bool on() const { return spans_.size() < capacity_; }
    static uint64_t now() {
        const auto since = std::chrono::steady_clock::now().time_since_epoch();
        return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(since).count());
    }

    std::vector<edge_span> spans_;
    size_t capacity_ = 0;
};

} // namespace edge
