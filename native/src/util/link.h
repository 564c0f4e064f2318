#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace edge {

// A link slower than the real one: bytes arrive one after another at this rate, whichever thread sends them.
class Throttle {
public:
    using Time = std::chrono::steady_clock::time_point;

    explicit Throttle(uint64_t bytes_per_s) : bytes_per_s_(bytes_per_s) {} // 0: no throttle

    bool on() const { return bytes_per_s_ > 0; }
    Time reserve(size_t bytes); // when bytes sent now will have arrived
    static void wait_until(Time time);

private:
    const uint64_t bytes_per_s_;
    std::mutex     mutex_;
    Time           free_{};
};

// One thread's way from host memory into the compute device. On a device with asynchronous copies it has a backend
// instance of its own (its own stream): page-locked bytes are sent as they lie, others through a ring of page-locked
// cells. Elsewhere a copy is done when send() returns.
class Link {
public:
    using Ticket = uint64_t; // numbers marks from 1 on

    // At most in_flight marks are under way; a further one waits for the oldest.
    Link(ggml_backend_dev_t device, Throttle & throttle, size_t in_flight);
    ~Link();
    Link(const Link &) = delete;
    Link & operator=(const Link &) = delete;

    // A marked send can be awaited by its ticket, with everything before it. Marks cost an event each, 1 to 2 us.
    void send(ggml_tensor * to, size_t offset, const void * from, size_t bytes, bool page_locked, bool mark);
    Ticket last() const { return sent_; }
    void wait(Ticket ticket); // everything up to it has arrived
    void wait();              // everything has, marked or not

    size_t free_marks() const { return cells_.size() - static_cast<size_t>(sent_ - arrived_); } // before one has to be waited for
    Throttle::Time due() const { return due_; } // of the last send, over a link that is emulated
    bool is_emulated() const { return throttle_.on(); }
    bool asynchronous() const { return backend_ != nullptr; } // page-locked bytes travel while the caller goes on
    // What the backend is given from now on runs after everything sent so far has arrived. False: wait() for it instead,
    // since copies are synchronous or the slower link that is emulated is nothing that a device could wait for.
    bool holds(ggml_backend_t backend);

    // Copies within an asynchronous device beside what a backend runs: those from now on begin when all is done that it was
    // given so far; what it is given from now on begins when they are.
    void after(ggml_backend_t backend);
    void before(ggml_backend_t backend);
    void copy(const ggml_tensor * from, ggml_tensor * to) { ggml_backend_tensor_copy_async(backend_.get(), backend_.get(), from, to); }

    // Whether the tensor's bytes are page-locked for this device.
    static bool page_locked(ggml_backend_dev_t device, const ggml_tensor * tensor);

private:
    struct Cell {
        ggml_backend_event_ptr  event;
        ggml_backend_buffer_ptr memory; // page-locked, made at first use
        Throttle::Time          due{};
    };

    Cell & cell_of(Ticket ticket) { return cells_[static_cast<size_t>(ticket % cells_.size())]; }
    Cell & next_cell();
    void mark(Cell & cell);
    void send_staged(ggml_tensor * to, size_t offset, const void * from, size_t bytes);
    void reserve(size_t bytes);
    void * staging(Cell & cell);

    ggml_backend_dev_t device_;
    ggml_backend_ptr   backend_; // null: copies are synchronous
    ggml_backend_event_ptr before_event_; // for before()
    ggml_backend_event_ptr after_event_; // for after()
    Throttle &         throttle_;
    std::vector<Cell>  cells_;
    Ticket             sent_ = 0;
    Ticket             arrived_ = 0;
    Throttle::Time     due_{}; // of the last send
};

} // namespace edge
