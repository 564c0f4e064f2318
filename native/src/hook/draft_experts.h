#pragma once

#include "edge_speq.h"
#include "util/expert_table.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <array>
#include <cstdint>
#include <vector>

namespace edge {

class SlotCache;

// Lets a model draft for itself, in its own context and KV cache, at a fraction of its bytes: with low-bit copies of
// its experts on the compute device (as MoE-SpeQ does), or with routers restricted to resident experts. Neither asks
// the host while a graph runs.
class DraftExperts {
public:
    DraftExperts(const ExpertTable & table, ggml_backend_buffer_type_t buft, int32_t max_width, bool has_slots);

    // Read the experts from a file, each tensor at its offset. Throws if one is missing, unknown or does not fit.
    void load(const char * path, const edge_draft_tensor * tensors, int32_t n);
    bool is_loaded() const { return tensor_buffer_ != nullptr; }
    ggml_tensor * tensor(int32_t block, Role role) const {
        return tensors_[static_cast<size_t>(block)][static_cast<size_t>(role)];
    }

    // Write each expert's slot to the device, for graphs that look slots up. Slots must not change meanwhile.
    void write_slot_table(SlotCache & slot_cache);
    // Restrict the routers to the experts resident now, which are pinned until the step ends. False if a block has too
    // few.
    bool restrict_to_residents(SlotCache & slot_cache);
    // Return probs with absent experts out of reach; the router's unrestricted choice is kept for routing().
    ggml_tensor * restrict_router(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * probs, int32_t block) const;
    // Keep the ids of an unrestricted router.
    void keep_unrestricted(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * ids, int32_t block) const;
    void clear_unrestricted() const { forget(unrestricted_); }
    // Set ids, [n_expert_used, max_width, n_blocks], to -1, which a graph that ends early leaves in place.
    void forget(ggml_tensor * ids) const;
    ggml_tensor * slots_of(ggml_context * ctx, ggml_tensor * ids, int32_t block) const; // ids: contiguous

    void read_unrestricted(int32_t * ids) const; // [n_blocks, max_width, n_expert_used] of the last graph
    uint64_t bytes() const;

private:
    void find_residents(SlotCache & slot_cache);

    const ExpertTable & table_;
    ggml_backend_buffer_type_t buft_;
    ggml_context_ptr tensor_ctx_;
    ggml_backend_buffer_ptr tensor_buffer_;
    std::vector<std::array<ggml_tensor *, n_roles>> tensors_; // per block
    ggml_context_ptr ctx_; // of the tensors below
    ggml_backend_buffer_ptr buffer_;
    ggml_tensor * mask_ = nullptr; // [n_expert, n_blocks] F32: 0, or far below any score
    ggml_tensor * slots_ = nullptr; // [1, n_expert, n_blocks] I32
    ggml_tensor * unrestricted_ = nullptr; // [n_expert_used, max_width, n_blocks] I32
    std::vector<int32_t> unknown_; // ids of -1
    std::vector<float> host_mask_;
    std::vector<int32_t> host_slots_;
};

// Return probs [n_expert, n_tokens] of a verify step with experts out of reach, except the `budget` ones with the
// largest sum over its tokens (MoE-Spec, arXiv 2602.16052).
ggml_tensor * within_budget(ggml_context * ctx, ggml_tensor * probs, int32_t budget);

} // namespace edge
