#include "cpu/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <system_error>

namespace edge {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds after_a_job(30); // spin until the next job of the same block
constexpr std::chrono::microseconds after_a_call(300); // spin after wake() announced one
constexpr int bits = 20;
constexpr uint64_t mask = (uint64_t{ 1 } << bits) - 1;
constexpr size_t most_at_once = size_t{ 1 } << (bits - 1); // chunks: each thread counts one further when none is left

uint64_t number(uint64_t word) { return word >> (2 * bits); }
uint64_t n_chunks_of(uint64_t word) { return (word >> bits) & mask; }
uint64_t chunk_of(uint64_t word) { return word & mask; }

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

} // namespace

ThreadPool::ThreadPool(size_t n_threads) {
    threads_.reserve(n_threads);
    try {
        for (size_t i = 1; i < n_threads; ++i) {
            threads_.emplace_back([this] { work(); });
        }
    } catch (const std::system_error &) { // a limit of the process or the system: fewer threads do
    }
}

ThreadPool::~ThreadPool() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    called_.notify_all();
    for (std::thread & thread : threads_) {
        thread.join();
    }
}

void ThreadPool::wake() {
    ++calls_; // spinning threads keep spinning
    if (asleep_ > 0) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
        } // a thread that checked before this waits by now
        called_.notify_all();
    }
}

void ThreadPool::run(size_t n_chunks, Chunk chunk, void * job) {
    if (threads_.empty() || n_chunks < 2) {
        for (size_t i = 0; i < n_chunks; ++i) {
            chunk(job, i);
        }
        return;
    }
    chunk_ = chunk;
    job_ = job;
    for (first_ = 0; first_ < n_chunks; first_ += most_at_once) {
        share(std::min(n_chunks - first_, most_at_once));
    }
}

void ThreadPool::share(size_t n_chunks) {
    finished_.store(0, std::memory_order_relaxed);
    next_.store((number(next_) + 1) << (2 * bits) | static_cast<uint64_t>(n_chunks) << bits);
    wake();
    take_part();
    for (int turn = 1; finished_.load(std::memory_order_acquire) < n_chunks; ++turn) {
        turn % 4096 ? relax() : std::this_thread::yield(); // there may be fewer cores than threads
    }
}

// Take chunks until none is left. Return the number of the finished job.
uint64_t ThreadPool::take_part() {
    while (true) {
        const uint64_t word = next_.fetch_add(1);
        if (chunk_of(word) >= n_chunks_of(word)) {
            return number(word);
        }
        chunk_(job_, first_ + static_cast<size_t>(chunk_of(word)));
        finished_.fetch_add(1, std::memory_order_release);
    }
}

// Spin and sleep until there is another job than `seen`. False if there will be none.
bool ThreadPool::look_out(uint64_t seen, uint64_t & heard) {
    auto until = Clock::now() + after_a_job;
    for (int turn = 1; number(next_) == seen && !stop_; ++turn) {
        relax();
        if (turn % 32 == 0 && calls_ == heard && Clock::now() > until) {
            sleep(seen, heard);
        }
        if (calls_ != heard) {
            heard = calls_;
            until = Clock::now() + after_a_call;
        }
    }
    return !stop_;
}

void ThreadPool::sleep(uint64_t seen, uint64_t heard) {
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_; // before the check, so that a later job or call sees this thread asleep
    called_.wait(lock, [&] { return number(next_) != seen || stop_ || calls_ != heard; });
    --asleep_;
}

void ThreadPool::work() {
    uint64_t heard = 0; // value of calls_
    for (uint64_t seen = 0; look_out(seen, heard);) {
        seen = take_part();
    }
}

} // namespace edge
