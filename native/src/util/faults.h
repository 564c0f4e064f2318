#pragma once

#include <cstdint>

namespace edge {

// Failures on demand, for tests of what a failed allocation, copy or read leaves behind. Always compiled in: an
// unarmed check is one relaxed load beside a copy of at least kilobytes.
enum class Fault : int { allocation = 0, copy = 1, routing = 2 };
constexpr int n_faults = 3;

void arm_fault(Fault kind, int64_t nth); // the nth event of this kind from now on fails, once; 0: none
void fault_point(Fault kind);            // throws Error when its turn has come

} // namespace edge
