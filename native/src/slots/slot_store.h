#pragma once

#include "util/expert_table.h"
#include "util/link.h"

#include "ggml-cpp.h"

#include <array>
#include <cstdint>
#include <vector>

namespace edge {

constexpr int prefetch_marks = 2; // per expert that the worker sends

// The memory behind the slots: per group one tensor [ne0, ne1, n_slots] for each weight, on the compute device. Zeroed
// at allocation, since kernels may read past a row's end, and filled by copies from host weights.
class SlotStore {
public:
    SlotStore(const ExpertTable & table, const std::vector<int32_t> & slots, ggml_backend_buffer_type_t buft);

    ggml_tensor * tensor(int32_t group, Role role) const { return tensors_[static_cast<size_t>(group)][role]; }
    uint64_t bytes() const;

    // Send gate, up and down of one expert to a slot as one operation, with marks on its last `marks` matrices.
    // Thread-safe for distinct slots and links.
    void send(Link & link, const ExpertBlock & block, int32_t expert, int32_t slot, int marks) const;
    bool page_locked(const ExpertBlock & block) const { return Link::page_locked(device_, block.weights[role_down]); }
    void fill(int32_t group, int32_t slot, uint8_t byte) const;
    double read_ns_per_byte() const; // measured on the device, overwrites the slots; 0 with a single slot

private:
    ggml_backend_dev_t device_;
    ggml_context_ptr ctx_;
    ggml_backend_buffer_ptr buffer_;
    std::vector<std::array<ggml_tensor *, n_roles>> tensors_;
};

} // namespace edge
