#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace edge {

// Threads that compute beside the caller, for jobs of some 10 us, hundreds a step. Waking a thread that sleeps takes as long as such a
// job, and threads that never sleep take a laptop's power from those that compute. So after a job they look out for the next one
// for a moment, then sleep, until the caller says that work is coming.
class ThreadPool {
public:
    using Chunk = void (*)(void * job, size_t chunk);

    explicit ThreadPool(size_t n_threads); // the caller among them; fewer where the system gives no more
    ~ThreadPool();
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool & operator=(const ThreadPool &) = delete;

    size_t n_threads() const { return threads_.size() + 1; }
    void wake(); // those that sleep look out for a job that comes within some 100 us

    // Each chunk once, on all threads, the caller's among them; on return all are done. One caller at a time.
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

    // The job's number, its chunks and the next of them, in one word: a thread that is late for one job takes a chunk of the next.
    std::atomic<uint64_t> next_{ 0 };
    std::atomic<size_t>   finished_{ 0 }; // chunks
    Chunk                 chunk_ = nullptr; // of that job: read by who has a chunk of it, written when all are finished
    void *                job_   = nullptr;
    size_t                first_ = 0; // of the chunks that are numbered from 0 on in the word

    std::atomic<bool>        stop_{ false };
    std::atomic<int>         asleep_{ 0 };
    std::atomic<uint64_t>    calls_{ 0 };
    std::mutex               mutex_; // of sleeping
    std::condition_variable  called_;
    std::vector<std::thread> threads_;
};

} // namespace edge
