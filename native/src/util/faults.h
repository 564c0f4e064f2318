#pragma once

#include <cstdint>

namespace edge {

// Failures on demand, for tests of what a failed allocation, copy or read leaves behind. Always compiled in: an unarmed
// check is one relaxed load beside a copy of kilobytes.
enum class Fault : int { allocation = 0, copy = 1, routing = 2 };
constexpr int n_faults = 3;

void arm_fault(Fault kind, int64_t nth); // fail the nth event of this kind from now on, once; 0 disarms
void fault_point(Fault kind); // throws Error at its turn

} // namespace edge
