#include "util/link.h"

#include "edge_speq.h"
#include "util/error.h"
#include "util/faults.h"

#include <algorithm>
#include <cstring>
#include <thread>

namespace edge {

namespace {

constexpr size_t cell_bytes = 512u << 10; // of staging: small enough to overlap with its own copy

bool copies_asynchronously(ggml_backend_dev_t device) {
    if (device == nullptr) { // plain host memory belongs to no device
        return false;
    }
    ggml_backend_dev_props props{};
    ggml_backend_dev_get_props(device, &props);
    return ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU && props.caps.async && props.caps.events &&
           ggml_backend_dev_host_buffer_type(device) != nullptr; // for the staging cells
}

} // namespace

Throttle::Time Throttle::reserve(size_t bytes) {
    const std::chrono::nanoseconds span(
        static_cast<int64_t>(1e9 * static_cast<double>(bytes) / static_cast<double>(bytes_per_s_)));
    const std::lock_guard<std::mutex> lock(mutex_);
    free_ = std::max(free_, std::chrono::steady_clock::now()) + span;
    return free_;
}

void Throttle::wait_until(Time time) {
    constexpr std::chrono::microseconds oversleep(80); // longest oversleep to expect; the rest is spun
    const auto left = time - std::chrono::steady_clock::now();
    if (left > oversleep) {
        std::this_thread::sleep_for(left - oversleep);
    }
    while (std::chrono::steady_clock::now() < time) {
        std::this_thread::yield();
    }
}

bool Link::page_locked(ggml_backend_dev_t device, const ggml_tensor * tensor) {
    const ggml_backend_buffer_t buffer = tensor->view_src ? tensor->view_src->buffer : tensor->buffer;
    return device && buffer && ggml_backend_buffer_get_type(buffer) == ggml_backend_dev_host_buffer_type(device);
}

Link::Link(ggml_backend_dev_t device, Throttle & throttle, size_t in_flight)
    : device_(device), throttle_(throttle), cells_(in_flight) {
    if (!copies_asynchronously(device)) {
        return;
    }
    backend_.reset(ggml_backend_dev_init(device, nullptr));
    for (Cell & cell : cells_) {
        cell.event.reset(ggml_backend_event_new(device));
    }
    before_event_.reset(ggml_backend_event_new(device));
    after_event_.reset(ggml_backend_event_new(device));
    if (!backend_ || !before_event_ || !after_event_ || !cells_.front().event) {
        throw Error(EDGE_ERR_BACKEND, std::string("cannot open a transfer stream on ") + ggml_backend_dev_name(device));
    }
}

Link::~Link() {
    if (backend_) {
        ggml_backend_synchronize(backend_.get());
    }
}

void * Link::staging(Cell & cell) {
    if (!cell.memory) {
        fault_point(Fault::allocation);
        cell.memory.reset(ggml_backend_buft_alloc_buffer(ggml_backend_dev_host_buffer_type(device_), cell_bytes));
    }
    if (!cell.memory) {
        throw Error(EDGE_ERR_MEMORY, "cannot allocate page-locked memory for transfers");
    }
    return ggml_backend_buffer_get_base(cell.memory.get());
}

bool Link::holds(ggml_backend_t backend) {
    if (!backend_ || throttle_.on()) {
        return false;
    }
    before(backend);
    return true;
}

void Link::after(ggml_backend_t backend) {
    ggml_backend_event_record(after_event_.get(), backend);
    ggml_backend_event_wait(backend_.get(), after_event_.get());
}

void Link::before(ggml_backend_t backend) {
    ggml_backend_event_record(before_event_.get(), backend_.get());
    ggml_backend_event_wait(backend, before_event_.get());
}

Link::Cell & Link::next_cell() {
    if (sent_ - arrived_ == cells_.size()) {
        wait(arrived_ + 1);
    }
    return cell_of(sent_ + 1);
}

void Link::mark(Cell & cell) {
    if (backend_) {
        ggml_backend_event_record(cell.event.get(), backend_.get());
    }
    cell.due = due_;
    ++sent_;
}

void Link::reserve(size_t bytes) {
    if (throttle_.on()) {
        due_ = throttle_.reserve(bytes);
    }
}

void Link::send(ggml_tensor * to, size_t offset, const void * from, size_t bytes, bool page_locked, bool marked) {
    fault_point(Fault::copy);
    if (backend_ && !page_locked) {
        for (size_t done = 0; done < bytes; done += cell_bytes) {
            send_staged(to, offset + done, static_cast<const char *>(from) + done, std::min(cell_bytes, bytes - done));
        }
        return;
    }
    Cell * const cell = marked ? &next_cell() : nullptr;
    if (backend_) {
        ggml_backend_tensor_set_async(backend_.get(), to, from, offset, bytes);
    } else {
        ggml_backend_tensor_set(to, from, offset, bytes);
    }
    reserve(bytes);
    if (cell) {
        mark(*cell);
    }
}

// Always marked: the cell's memory is free again when its copy has arrived.
void Link::send_staged(ggml_tensor * to, size_t offset, const void * from, size_t bytes) {
    Cell & cell = next_cell();
    void * const staged = staging(cell);
    std::memcpy(staged, from, bytes);
    ggml_backend_tensor_set_async(backend_.get(), to, staged, offset, bytes);
    reserve(bytes);
    mark(cell);
}

void Link::wait(Ticket ticket) {
    if (ticket <= arrived_) {
        return;
    }
    Cell & cell = cell_of(ticket); // the last to arrive: sends keep their order
    if (backend_) {
        ggml_backend_event_synchronize(cell.event.get());
    }
    if (throttle_.on()) {
        Throttle::wait_until(cell.due);
    }
    arrived_ = ticket;
}

void Link::wait() {
    if (backend_) {
        ggml_backend_synchronize(backend_.get());
    }
    if (throttle_.on()) {
        Throttle::wait_until(due_);
    }
    arrived_ = sent_;
}

} // namespace edge
