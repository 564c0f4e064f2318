#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>

namespace edge {

// Return the smallest duration of act after prepare, in nanoseconds: other load on the machine only adds to it.
template <typename Act, typename Prepare> double least_ns(const Act & act, const Prepare & prepare) {
    constexpr int times = 4; // the first wakes threads and touches pages
    double least = HUGE_VAL;
    for (int i = 0; i < times; ++i) {
        prepare();
        const auto began = std::chrono::steady_clock::now();
        act();
        least =
            std::min(least, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - began).count());
    }
    return least;
}

template <typename Act> double least_ns(const Act & act) {
    return least_ns(act, [] {});
}

} // namespace edge
