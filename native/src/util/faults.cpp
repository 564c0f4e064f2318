#include "util/faults.h"

#include "edge_speq.h"
#include "util/error.h"

#include <array>
#include <atomic>
#include <string>

namespace edge {

namespace {

std::array<std::atomic<int64_t>, n_faults> left{}; // events until the failing one, 0 if unarmed

const char * name_of(Fault kind) {
    switch (kind) {
        case Fault::allocation:
            return "an allocation";
        case Fault::copy:
            return "a copy into a slot";
        case Fault::routing:
            return "reading the routing";
    }
    return "an unknown event";
}

} // namespace

void arm_fault(Fault kind, int64_t nth) { left[static_cast<size_t>(kind)] = nth; }

void fault_point(Fault kind) {
    std::atomic<int64_t> & counter = left[static_cast<size_t>(kind)];
    if (counter.load(std::memory_order_relaxed) <= 0) {
        return;
    }
    if (counter.fetch_sub(1) == 1) {
        throw Error(kind == Fault::allocation ? EDGE_ERR_MEMORY : EDGE_ERR_BACKEND,
                    std::string(name_of(kind)) + " failed (injected)");
    }
}

} // namespace edge
