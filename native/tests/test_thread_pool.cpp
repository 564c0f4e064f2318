// Threads that share a job: each chunk once, whoever was asleep or late; and none of them computes while there is nothing to do.
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
    edge::ThreadPool workers(n_threads);
    CHECK(workers.n_threads() == n_threads);
    std::mt19937 random(seed);
    std::vector<int> done; // plain numbers: two threads on one chunk, or a chunk after run() returned, are races
    for (int job = 0; job < 3000; ++job) {
        const size_t n = random() % 40;
        done.assign(n, 0);
        const auto count = [&](size_t chunk) { ++done[chunk]; };
        if (random() % 8 == 0) {
            workers.wake();
        }
        workers.run(n, count);
        for (const int times : done) {
            CHECK(times == 1);
        }
        if (random() % 64 == 0) { // they fall asleep
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 400));
        }
    }
}

// More than the word that they are counted in has room for.
void there_may_be_millions() {
    edge::ThreadPool workers(3);
    std::vector<uint8_t> done((size_t{ 1 } << 20) + 12345);
    const auto count = [&](size_t chunk) { ++done[chunk]; };
    workers.run(done.size(), count);
    CHECK(std::all_of(done.begin(), done.end(), [](uint8_t times) { return times == 1; }));
}

void all_threads_take_part() {
    edge::ThreadPool workers(3);
    std::vector<std::thread::id> by(64);
    for (int attempt = 0; attempt < 50; ++attempt) {
        const auto note = [&](size_t chunk) {
            by[chunk] = std::this_thread::get_id();
            std::this_thread::sleep_for(200us);
        };
        workers.run(by.size(), note);
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

void nobody_computes_while_there_is_nothing_to_do() {
    edge::ThreadPool workers(4);
    const auto nothing = [](size_t) {};
    workers.run(16, nothing);
    std::this_thread::sleep_for(20ms);
    const double before = cpu_seconds();
    std::this_thread::sleep_for(300ms);
    CHECK(cpu_seconds() - before < 0.1); // three threads that looked out all the time: 0.9 s, or what the cores give
}

} // namespace

int main() {
    for (const size_t n_threads : { 1, 2, 3, 8 }) {
        each_chunk_is_done_once(n_threads, static_cast<unsigned>(n_threads));
    }
    there_may_be_millions();
    all_threads_take_part();
    nobody_computes_while_there_is_nothing_to_do();
    std::puts("workers: ok");
    return 0;
}
