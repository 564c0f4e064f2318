#include "slots/slot_store.h"

#include "edge_speq.h"
#include "util/error.h"
#include "util/faults.h"
#include "util/stopwatch.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <string>

namespace edge {

SlotStore::SlotStore(const ExpertTable & table, const std::vector<int32_t> & slots, ggml_backend_buffer_type_t buft)
    : device_(ggml_backend_buft_get_device(buft)) {
    ggml_init_params params{};
    params.mem_size = ggml_tensor_overhead() * table.groups.size() * n_roles;
    params.no_alloc = true;
    ctx_.reset(ggml_init(params));

    for (size_t g = 0; g < table.groups.size(); ++g) {
        const BlockWeights & like = table.blocks[static_cast<size_t>(table.groups[g].blocks.front())].weights;
        std::array<ggml_tensor *, n_roles> group{};
        for (size_t role = 0; role < like.size(); ++role) {
            if (like[role]) {
                group[role] =
                    ggml_new_tensor_3d(ctx_.get(), like[role]->type, like[role]->ne[0], like[role]->ne[1], slots[g]);
                ggml_format_name(group[role], "edge_slots-%zu-%zu", g, role);
            }
        }
        tensors_.push_back(group);
    }
    fault_point(Fault::allocation);
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_.get(), buft));
    if (!buffer_) {
        throw Error(EDGE_ERR_MEMORY, std::string("cannot allocate the expert slots on ") +
                                         ggml_backend_buft_name(buft) +
                                         "; ask for fewer (a smaller resident share or VRAM budget)");
    }
    ggml_backend_buffer_clear(buffer_.get(), 0);
    ggml_backend_buffer_set_usage(buffer_.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
}

uint64_t SlotStore::bytes() const { return ggml_backend_buffer_get_size(buffer_.get()); }

void SlotStore::send(Link & link, const ExpertBlock & block, int32_t expert, int32_t slot, int marks) const {
    const auto & group = tensors_[static_cast<size_t>(block.group)];
    auto left = std::count_if(group.begin(), group.end(), [](const ggml_tensor * t) { return t != nullptr; });
    for (size_t role = 0; role < group.size(); ++role) {
        if (group[role]) {
            const ggml_tensor * weight = block.weights[role];
            const size_t bytes = weight->nb[2];
            link.send(group[role], bytes * static_cast<size_t>(slot),
                      static_cast<const char *>(weight->data) + bytes * static_cast<size_t>(expert), bytes,
                      Link::page_locked(device_, weight), left <= marks);
            --left;
        }
    }
}

void SlotStore::fill(int32_t group, int32_t slot, uint8_t byte) const {
    for (ggml_tensor * tensor : tensors_[static_cast<size_t>(group)]) {
        if (tensor) {
            const std::vector<uint8_t> pattern(tensor->nb[2], byte);
            ggml_backend_tensor_set(tensor, pattern.data(), tensor->nb[2] * static_cast<size_t>(slot), tensor->nb[2]);
        }
    }
}

// Copy some slots onto others: half of the moved bytes are reads, and kernels, which only read, take as long per byte.
double SlotStore::read_ns_per_byte() const {
    constexpr int64_t most_bytes = 256 << 20;
    ggml_tensor * slots = tensors_.front()[role_down];
    const auto per_slot = static_cast<int64_t>(slots->nb[2]);
    const int64_t n = std::min(slots->ne[2] / 2, std::max<int64_t>(1, most_bytes / per_slot));
    if (n == 0) {
        return 0;
    }
    const ggml_context_ptr ctx(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
    const auto view = [&](int64_t first) {
        ggml_tensor * some = ggml_view_3d(ctx.get(), slots, slots->ne[0], slots->ne[1], n, slots->nb[1], slots->nb[2],
                                          static_cast<size_t>(first * per_slot));
        ggml_backend_view_init(some);
        return some;
    };
    ggml_tensor * from = view(0);
    ggml_tensor * to = view(n);
    return least_ns([&] { ggml_backend_tensor_copy(from, to); }) / static_cast<double>(2 * n * per_slot);
}

} // namespace edge
