// Threads that share a job run each chunk once, whoever was asleep or late, and none of them spins while there is no
// work.
#include "check.h"
#include "cpu/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <random>
#include <thread>
#include <vector>

namespace {

using namespace std::chrono_literals;

double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

void each_chunk_is_done_once(size_t n_threads, unsigned seed) {
    edge::ThreadPool pool(n_threads);
    CHECK(pool.n_threads() == n_threads);
    std::mt19937 random(seed);
    std::vector<int> done; // plain numbers: two threads on one chunk, or a chunk after run() returned, are data races
    for (int job = 0; job < 3000; ++job) {
        const size_t n = random() % 40;
        done.assign(n, 0);
        const auto count = [&](size_t chunk) { ++done[chunk]; };
        if (random() % 8 == 0) {
            pool.wake();
        }
        pool.run(n, count);
        for (const int times : done) {
            CHECK(times == 1);
        }
        if (random() % 64 == 0) { // they fall asleep
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 400));
        }
    }
}

// More chunks than the packed word has room for.
void there_may_be_millions() {
    edge::ThreadPool pool(3);
    std::vector<uint8_t> done((size_t{ 1 } << 20) + 12345);
    const auto count = [&](size_t chunk) { ++done[chunk]; };
    pool.run(done.size(), count);
    CHECK(std::all_of(done.begin(), done.end(), [](uint8_t times) { return times == 1; }));
}

void all_threads_take_part() {
    edge::ThreadPool pool(3);
    std::vector<std::thread::id> by(64);
    for (int attempt = 0; attempt < 50; ++attempt) {
        const auto note = [&](size_t chunk) {
            by[chunk] = std::this_thread::get_id();
            std::this_thread::sleep_for(200us);
        };
        pool.run(by.size(), note);
        std::vector<std::thread::id> seen;
        for (const std::thread::id id : by) {
            if (std::find(seen.begin(), seen.end(), id) == seen.end()) {
                seen.push_back(id);
            }
        }
        if (seen.size() == 3) {
            return;
        }
    }
    CHECK(!"three threads never shared a job of 64 chunks");
}

void nobody_spins_while_there_is_no_work() {
    edge::ThreadPool pool(4);
    const auto nothing = [](size_t) {};
    pool.run(16, nothing);
    std::this_thread::sleep_for(20ms);
    const double before = cpu_seconds();
    std::this_thread::sleep_for(300ms);
    CHECK(cpu_seconds() - before < 0.1); // three threads that spin all the time take 0.9 s, or what the cores give
}

} // namespace

int main() {
    for (const size_t n_threads : { 1, 2, 3, 8 }) {
        each_chunk_is_done_once(n_threads, static_cast<unsigned>(n_threads));
    }
    there_may_be_millions();
    all_threads_take_part();
    nobody_spins_while_there_is_no_work();
    std::puts("thread_pool: ok");
    return 0;
}
