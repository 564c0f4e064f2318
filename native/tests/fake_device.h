// A device on the CPU whose copies and kernels run on their own streams, as a GPU's do, in no order but the one that
// streams and events impose: whatever the code under test forgets to wait for is read too early.
#pragma once

#include "ggml-backend-impl.h"
#include "ggml-backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace fake {

// A sleep takes at least 60 us; a copy may take less.
inline void pass(int us) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(us);
    while (std::chrono::steady_clock::now() < end) {
        std::this_thread::yield();
    }
}

// Can be recorded any number of times. As in CUDA, a wait is for the last record before it.
class Event {
public:
    uint64_t record() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return ++recorded_;
    }
    uint64_t last() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return recorded_;
    }
    void reach(uint64_t record) {
        const std::lock_guard<std::mutex> lock(mutex_); // held: the event may be freed as soon as the waiter returns
        reached_ = std::max(reached_, record);
        changed_.notify_all();
    }
    bool await(uint64_t record) { // returns whether there was anything to wait for
        std::unique_lock<std::mutex> lock(mutex_);
        const bool next_use = reached_ < record;
        changed_.wait(lock, [&] { return reached_ >= record; });
        return next_use;
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    uint64_t recorded_ = 0;
    uint64_t reached_ = 0;
};

// Runs work in order on its own thread. Everything pushed runs before the stream is destroyed.
class Stream {
public:
    Stream() : thread_([this] { run(); }) {}
    ~Stream() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }
    Stream(const Stream &) = delete;
    Stream & operator=(const Stream &) = delete;

    void push(std::function<void()> work) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            queue_.push_back(std::move(work));
        }
        changed_.notify_all();
    }
    void synchronize() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return queue_.empty() && !busy_; });
    }

private:
    void run() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            changed_.wait(lock, [this] { return stop_ || !queue_.empty(); });
            if (queue_.empty()) {
                return;
            }
            const std::function<void()> work = std::move(queue_.front());
            queue_.pop_front();
            busy_ = true;
            lock.unlock();
            work();
            lock.lock();
            busy_ = false;
            changed_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> queue_;
    bool busy_ = false;
    bool stop_ = false;
    std::thread thread_; // last: it uses the others
};

// The parts of a GPU that edge::Link and edge::SlotStore use: memory, page-locked host memory, streams with
// asynchronous copies, events.
class Device {
public:
    std::atomic<int> copy_us{ 0 }; // duration of half a copy from page-locked memory

    Device() {
        memory_ = page_locked_ = *ggml_backend_cpu_buffer_type();
        memory_.device = page_locked_.device = &device_;
        device_.context = this;
        describe(device_.iface);
        device_.iface.init_backend = open;
        device_.iface.event_new = [](ggml_backend_dev_t device) { return new ggml_backend_event{ device, new Event }; };
        device_.iface.event_free = [](ggml_backend_dev_t, ggml_backend_event_t event) {
            delete &of(event);
            delete event;
        };
        device_.iface.event_synchronize = [](ggml_backend_dev_t device, ggml_backend_event_t event) {
            of(device).waits_ += of(event).await(of(event).last()) ? 1 : 0;
        };
    }
    Device(const Device &) = delete;
    Device & operator=(const Device &) = delete;

    ggml_backend_buffer_type_t memory() { return &memory_; }
    ggml_backend_buffer_type_t page_locked() { return &page_locked_; }
    ggml_backend_t open_stream() { return ggml_backend_dev_init(&device_, nullptr); }
    uint64_t host_waits() const { return waits_; } // host waits for an event that had not been reached
    static Stream & stream(ggml_backend_t backend) { return *static_cast<Stream *>(backend->context); }

private:
    static Device & of(ggml_backend_dev_t device) { return *static_cast<Device *>(device->context); }
    static Event & of(ggml_backend_event_t event) { return *static_cast<Event *>(event->context); }

    static void describe(ggml_backend_device_i & iface) {
        iface.get_name = iface.get_description = [](ggml_backend_dev_t) { return "fake"; };
        iface.get_memory = [](ggml_backend_dev_t, size_t * free, size_t * total) {
            *free = *total = size_t{ 1 } << 30;
        };
        iface.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
        iface.get_props = [](ggml_backend_dev_t, ggml_backend_dev_props * props) {
            *props = {};
            props->type = GGML_BACKEND_DEVICE_TYPE_GPU;
            props->caps.async = props->caps.events = props->caps.host_buffer = true;
        };
        iface.get_buffer_type = [](ggml_backend_dev_t device) { return of(device).memory(); };
        iface.get_host_buffer_type = [](ggml_backend_dev_t device) { return of(device).page_locked(); };
    }

    static ggml_backend_t open(ggml_backend_dev_t device, const char *) {
        auto * backend = new ggml_backend{};
        backend->device = device;
        backend->context = new Stream;
        backend->iface.get_name = [](ggml_backend_t) { return "fake"; };
        backend->iface.free = [](ggml_backend_t closed) {
            delete &stream(closed);
            delete closed;
        };
        backend->iface.synchronize = [](ggml_backend_t synchronized) { stream(synchronized).synchronize(); };
        backend->iface.set_tensor_async = copy;
        backend->iface.event_record = [](ggml_backend_t recorder, ggml_backend_event_t event) {
            const uint64_t record = of(event).record();
            stream(recorder).push([event, record] { of(event).reach(record); });
        };
        backend->iface.event_wait = [](ggml_backend_t waiter, ggml_backend_event_t event) {
            const uint64_t record = of(event).last();
            stream(waiter).push([event, record] { of(event).await(record); });
        };
        return backend;
    }

    // In two halves, so that a read in between sees neither the old nor the new.
    static void copy(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
        char * to = static_cast<char *>(tensor->data) + offset;
        const char * from = static_cast<const char *>(data);
        const Device & device = of(backend->device);
        stream(backend).push([to, from, size, &device] {
            const size_t half = size / 2;
            std::memcpy(to, from, half);
            pass(device.copy_us);
            std::memcpy(to + half, from + half, size - half);
        });
    }

    ggml_backend_device device_{};
    ggml_backend_buffer_type memory_{};
    ggml_backend_buffer_type page_locked_{};
    std::atomic<uint64_t> waits_{ 0 };
};

} // namespace fake
