#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace edge {

// Threads that compute in parallel with the caller, for jobs of about 10 us, hundreds per step. Waking a sleeping
// thread takes as long as such a job. Threads that never sleep take power from the computing threads of a laptop. So
// threads spin for a moment after a job, then sleep until the caller announces work.
class ThreadPool {
public:
    using Chunk = void (*)(void * job, size_t chunk);

    explicit ThreadPool(size_t n_threads); // includes the caller; fewer if the system gives no more
    ~ThreadPool();
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool & operator=(const ThreadPool &) = delete;

    size_t n_threads() const { return threads_.size() + 1; }
    void wake(); // sleeping threads spin for a job that comes within some 100 us

    // Run each chunk once, on all threads including the caller's, and return when all are done. One caller at a time.
    void run(size_t n_chunks, Chunk chunk, void * job);
    template <typename F> void run(size_t n_chunks, const F & each) {
        run(n_chunks, [](void * job, size_t chunk) { (*static_cast<const F *>(job))(chunk); }, const_cast<F *>(&each));
    }

private:
    void share(size_t n_chunks);
    uint64_t take_part();
    bool look_out(uint64_t seen, uint64_t & heard);
    void sleep(uint64_t seen, uint64_t heard);
    void work();

    // Number of the job, its chunks and the next chunk in one word: a thread that is late for one job takes a chunk of
    // the next.
    std::atomic<uint64_t> next_{ 0 };
    std::atomic<size_t> finished_{ 0 }; // chunks
    // Of that job. Read by threads that have a chunk of it, written when all chunks are finished.
    Chunk chunk_ = nullptr;
    void * job_ = nullptr;
    size_t first_ = 0; // chunk of the caller that is number 0 in next_

    std::atomic<bool> stop_{ false };
    std::atomic<int> asleep_{ 0 };
    std::atomic<uint64_t> calls_{ 0 };
    std::mutex mutex_; // of sleeping threads
    std::condition_variable called_;
    std::vector<std::thread> threads_;
};

} // namespace edge
