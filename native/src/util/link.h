#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace edge {

// Emulates a slower link: bytes arrive one after another at this rate, whichever thread sends them.
class Throttle {
public:
    using Time = std::chrono::steady_clock::time_point;

    explicit Throttle(uint64_t bytes_per_s) : bytes_per_s_(bytes_per_s) {} // 0: no throttle

    bool on() const { return bytes_per_s_ > 0; }
    Time reserve(size_t bytes); // when bytes sent now will have arrived
    static void wait_until(Time time);

private:
    const uint64_t bytes_per_s_;
    std::mutex mutex_;
    Time free_{};
};

// One thread's path from host memory to the compute device. On a device with asynchronous copies it has its own backend
// instance, and so its own stream: page-locked bytes are sent in place, others through a ring of page-locked cells.
// Otherwise a copy is done when send() returns.
class Link {
public:
    using Ticket = uint64_t; // numbers marks from 1 on

    // in_flight: marks at most; a further one waits for the oldest.
    Link(ggml_backend_dev_t device, Throttle & throttle, size_t in_flight);
    ~Link();
    Link(const Link &) = delete;
    Link & operator=(const Link &) = delete;

    // A marked send, and everything before it, can be awaited by its ticket. A mark costs an event, 1 to 2 us.
    void send(ggml_tensor * to, size_t offset, const void * from, size_t bytes, bool page_locked, bool mark);
    Ticket last() const { return sent_; }
    void wait(Ticket ticket); // everything up to it has arrived
    void wait(); // everything has arrived, marked or not

    // Marks that fit before one has to be awaited.
    size_t free_marks() const { return cells_.size() - static_cast<size_t>(sent_ - arrived_); }
    Throttle::Time due() const { return due_; } // of the last send over an emulated link
    bool is_emulated() const { return throttle_.on(); }
    bool asynchronous() const { return backend_ != nullptr; } // page-locked bytes are copied while the caller continues
    // Make the backend's later work run after everything sent so far has arrived. False: wait() instead, because copies
    // are synchronous or the link is emulated, for which a device cannot wait.
    bool holds(ggml_backend_t backend);

    // Copies within an asynchronous device, in parallel with a backend's work: after() starts later copies when the
    // backend's work so far is done; before() starts the backend's later work when the copies so far are done.
    void after(ggml_backend_t backend);
    void before(ggml_backend_t backend);
    void copy(const ggml_tensor * from, ggml_tensor * to) {
        ggml_backend_tensor_copy_async(backend_.get(), backend_.get(), from, to);
    }

    // Return true if the tensor's bytes are page-locked for this device.
    static bool page_locked(ggml_backend_dev_t device, const ggml_tensor * tensor);

private:
    struct Cell {
        ggml_backend_event_ptr event;
        ggml_backend_buffer_ptr memory; // page-locked, allocated at first use
        Throttle::Time due{};
    };

    Cell & cell_of(Ticket ticket) { return cells_[static_cast<size_t>(ticket % cells_.size())]; }
    Cell & next_cell();
    void mark(Cell & cell);
    void send_staged(ggml_tensor * to, size_t offset, const void * from, size_t bytes);
    void reserve(size_t bytes);
    void * staging(Cell & cell);

    ggml_backend_dev_t device_;
    ggml_backend_ptr backend_; // null: copies are synchronous
    ggml_backend_event_ptr before_event_; // of before()
    ggml_backend_event_ptr after_event_; // of after()
    Throttle & throttle_;
    std::vector<Cell> cells_;
    Ticket sent_ = 0;
    Ticket arrived_ = 0;
    Throttle::Time due_{}; // of the last send
};

} // namespace edge
