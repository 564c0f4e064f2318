// The part of edge_hook that serves one block after another while a graph runs.
#include "hook/hook.h"

#include "util/error.h"
#include "util/faults.h"

#include "ggml-backend.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <utility>

namespace {

bool is_route(const ggml_tensor * node) {
    return node->op == GGML_OP_CPY && std::strncmp(node->name, edge::route_prefix, sizeof(edge::route_prefix) - 1) == 0;
}

} // namespace

// Called before the following nodes are sent to the backend; copies queued here run before them. Returning false ends
// the graph with status "aborted" (patch 0005); end_step() then throws the error.
bool edge_hook::eval(ggml_backend_t backend, ggml_tensor * node, bool ask) noexcept {
    const bool is_output = split_block_ >= 0 && node == chains_[static_cast<size_t>(split_block_)].output;
    if (ask) {
        return is_output || (experts_ == EDGE_EXPERTS_OWN && !device_only_ && is_route(node));
    }
    try {
        if (cancelled_) {
            throw edge::Error(EDGE_ERR_CANCELLED, "cancelled");
        }
        if (is_output) {
            send_computed(backend);
            return true;
        }
        int number = -1;
        if (std::sscanf(node->name + sizeof(edge::route_prefix) - 1, "%d", &number) != 1) {
            throw edge::Error(EDGE_ERR_INTERNAL, std::string("unexpected node name ") + node->name);
        }
        edge::fault_point(edge::Fault::routing);
        if (number == 0) {
            splits_ = splits_this_step();
        }
        splits_ && find_chain(node, number) ? serve_hybrid(backend, node, number) : serve(backend, node, number);
        ++n_served_;
        return true;
    } catch (const edge::Error & e) {
        status_ = e.status;
        error_ = e.what();
    } catch (const std::exception & e) {
        status_ = EDGE_ERR_INTERNAL;
        error_ = e.what();
    }
    cancel_split();
    return false;
}

void edge_hook::serve(ggml_backend_t backend, ggml_tensor * route, int32_t number) {
    prefetch_next_layer(); // while the device computes the previous block
    await_copies(number - 1);
    ggml_backend_tensor_get_async(backend, route, routing_of(number), 0, ggml_nbytes(route));
    if (can_predict_next(route, number)) {
        read_rows_for(number + 1, backend, chains_[static_cast<size_t>(number)].input);
    }
    await_device(backend, number);
    {
        const edge::Timeline::Span span(timeline_, EDGE_SPAN_DECIDE, number);
        slot_cache_->demand(number, routing_of(number), static_cast<int32_t>(ggml_nelements(route)), slots_of(number));
    }
    // The link is emulated: the host holds the device.
    if (slot_cache_->fetching() && !slot_cache_->hold_for_fetches(backend)) {
        prefetch_next_layer();
        await_copies(number);
    }
    ggml_backend_tensor_set_async(backend, route, slots_of(number), 0, ggml_nbytes(route));
}

// The only wait of a block: everything up to its routing has run.
void edge_hook::await_device(ggml_backend_t backend, int32_t number) {
    const edge::Timeline::Span span(timeline_, EDGE_SPAN_DEVICE, number);
    ggml_backend_synchronize(backend);
}

void edge_hook::await_copies(int32_t number) {
    if (slot_cache_->fetching()) {
        const edge::Timeline::Span span(timeline_, EDGE_SPAN_COPIES, number);
        slot_cache_->await_fetches();
    }
}

void edge_hook::end_step() {
    cancel_split();
    admission_block_ = -1;
    if (experts_ != EDGE_EXPERTS_OWN) {
        end_draft_step();
    } else if (device_only_) {
        end_device_only_step();
    } else if (slot_cache_) {
        slot_cache_->end_step();
        switch_to_device_only();
        n_tokens_ = n_served_ == table_.blocks.size() ? width_ : 0;
        n_served_ = 0;
    } else {
        n_tokens_ = width_;
    }
    if (!slot_cache_ && routing_ == host_routing_ && n_tokens_ > 0) {
        ggml_backend_tensor_get(leaf_, host_routing_, 0, ggml_nbytes(leaf_));
    }
    cancelled_ = false;
    if (status_ != EDGE_OK) {
        throw edge::Error(std::exchange(status_, EDGE_OK), std::exchange(error_, {}));
    }
}
