#include "hook/draft_experts.h"

#include "slots/slot_cache.h"
#include "util/error.h"
#include "util/faults.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>

namespace edge {

namespace {

constexpr float out_of_reach = -1e30F; // finite, so that nothing becomes NaN
constexpr float least_score = -1e20F; // for experts that a router excludes with -INF: still above out_of_reach
constexpr size_t piece = size_t{ 4 } << 20; // bytes per read

ggml_context_ptr make_context(size_t n_tensors) {
    ggml_init_params params{};
    params.mem_size = ggml_tensor_overhead() * n_tensors;
    params.no_alloc = true;
    return ggml_context_ptr(ggml_init(params));
}

ggml_backend_buffer_ptr allocate(ggml_context * ctx, ggml_backend_buffer_type_t buft, const char * what) {
    fault_point(Fault::allocation);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft));
    if (!buffer) {
        throw Error(EDGE_ERR_MEMORY, std::string("cannot allocate ") + what + " on " + ggml_backend_buft_name(buft));
    }
    ggml_backend_buffer_clear(buffer.get(), 0);
    return buffer;
}

// Return true if the device of this buffer type can multiply with experts of this type. Q8_1 and Q8_K are activation
// types.
bool multiplies(ggml_backend_buffer_type_t buft, ggml_type type, const ggml_tensor & like) {
    const bool weights = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 ||
                         (ggml_is_quantized(type) && type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K);
    if (!weights) {
        return false;
    }
    ggml_context_ptr ctx = make_context(4);
    ggml_tensor * op =
        ggml_mul_mat_id(ctx.get(), ggml_new_tensor_3d(ctx.get(), type, like.ne[0], like.ne[1], like.ne[2]),
                        ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, like.ne[0], 1, 1),
                        ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, 1));
    ggml_backend_dev_t device = ggml_backend_buft_get_device(buft);
    return device == nullptr || ggml_backend_dev_supports_op(device, op);
}

void require_type(ggml_backend_buffer_type_t buft, const edge_draft_tensor & tensor, const ggml_tensor & like) {
    const bool known =
        tensor.type >= 0 && tensor.type < GGML_TYPE_COUNT && ggml_blck_size(static_cast<ggml_type>(tensor.type)) > 0;
    if (!known || like.ne[0] % ggml_blck_size(static_cast<ggml_type>(tensor.type)) != 0 ||
        !multiplies(buft, static_cast<ggml_type>(tensor.type), like)) {
        throw Error(EDGE_ERR_UNSUPPORTED, std::string("draft experts for ") + like.name + " cannot be of type " +
                                              std::to_string(tensor.type));
    }
}

// Some architectures exclude experts with -INF.
ggml_tensor * finite(ggml_context * ctx, ggml_tensor * probs) {
    return ggml_clamp(ctx, probs, least_score, -least_score);
}

void read(std::ifstream & file, const std::string & path, uint64_t offset, ggml_tensor * into) {
    std::vector<char> bytes(std::min(piece, ggml_nbytes(into)));
    file.seekg(static_cast<std::streamoff>(offset));
    for (size_t done = 0; done < ggml_nbytes(into);) {
        const size_t n = std::min(bytes.size(), ggml_nbytes(into) - done);
        if (!file.read(bytes.data(), static_cast<std::streamsize>(n))) {
            throw Error(EDGE_ERR_ARGUMENT, path + " ends within " + into->name);
        }
        ggml_backend_tensor_set(into, bytes.data(), done, n);
        done += n;
    }
}

} // namespace

DraftExperts::DraftExperts(const ExpertTable & table, ggml_backend_buffer_type_t buft, int32_t max_width,
                           bool has_slots)
    : table_(table), buft_(buft) {
    if (has_slots) {
        const auto n_blocks = static_cast<int64_t>(table_.blocks.size());
        ctx_ = make_context(3);
        mask_ = ggml_new_tensor_2d(ctx_.get(), GGML_TYPE_F32, table_.n_expert, n_blocks);
        slots_ = ggml_new_tensor_3d(ctx_.get(), GGML_TYPE_I32, 1, table_.n_expert, n_blocks);
        unrestricted_ = ggml_new_tensor_3d(ctx_.get(), GGML_TYPE_I32, table_.n_expert_used, max_width, n_blocks);
        buffer_ = allocate(ctx_.get(), buft_, "the routers' mask");
        unknown_.assign(static_cast<size_t>(ggml_nelements(unrestricted_)), -1);
        host_mask_.resize(static_cast<size_t>(ggml_nelements(mask_)));
        host_slots_.resize(host_mask_.size());
    }
}

void DraftExperts::load(const char * path, const edge_draft_tensor * tensors, int32_t n) {
    std::vector<std::array<ggml_tensor *, n_roles>> tensors_by_block(table_.blocks.size());
    ggml_context_ptr ctx = make_context(static_cast<size_t>(n));
    std::vector<ggml_tensor *> made;
    for (int32_t i = 0; i < n; ++i) {
        const edge_draft_tensor & tensor = tensors[i];
        const bool known = tensor.block >= 0 && static_cast<size_t>(tensor.block) < tensors_by_block.size() &&
                           tensor.role >= 0 && tensor.role < n_roles;
        const ggml_tensor * like =
            known ? table_.blocks[static_cast<size_t>(tensor.block)].weights[static_cast<size_t>(tensor.role)]
                  : nullptr;
        if (like == nullptr ||
            tensors_by_block[static_cast<size_t>(tensor.block)][static_cast<size_t>(tensor.role)] != nullptr) {
            throw Error(EDGE_ERR_ARGUMENT, "the model has no such expert tensor, or the draft experts name it twice");
        }
        require_type(buft_, tensor, *like);
        made.push_back(
            ggml_new_tensor_3d(ctx.get(), static_cast<ggml_type>(tensor.type), like->ne[0], like->ne[1], like->ne[2]));
        ggml_format_name(made.back(), "edge_twin-%d-%d", tensor.block, tensor.role);
        tensors_by_block[static_cast<size_t>(tensor.block)][static_cast<size_t>(tensor.role)] = made.back();
    }
    for (size_t b = 0; b < tensors_by_block.size(); ++b) {
        for (size_t role = 0; role < n_roles; ++role) {
            if ((tensors_by_block[b][role] == nullptr) != (table_.blocks[b].weights[role] == nullptr)) {
                throw Error(EDGE_ERR_ARGUMENT,
                            std::string("the draft experts lack ") + table_.blocks[b].weights[role]->name);
            }
        }
    }
    ggml_backend_buffer_ptr buffer = allocate(ctx.get(), buft_, "the draft experts");
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    std::ifstream file(std::filesystem::u8path(path), std::ios::binary);
    if (!file) {
        throw Error(EDGE_ERR_ARGUMENT, std::string("cannot read ") + path);
    }
    for (int32_t i = 0; i < n; ++i) {
        read(file, path, tensors[i].offset, made[static_cast<size_t>(i)]);
    }
    tensors_ = std::move(tensors_by_block);
    tensor_buffer_ = std::move(buffer); // before the context whose tensors it holds
    tensor_ctx_ = std::move(ctx);
}

void DraftExperts::find_residents(SlotCache & slot_cache) {
    size_t at = 0;
    for (int32_t block = 0; block < static_cast<int32_t>(table_.blocks.size()); ++block) {
        int32_t * slots = host_slots_.data() + at;
        int32_t some = 0;
        for (int32_t expert = 0; expert < table_.n_expert; ++expert, ++at) {
            slots[expert] = slot_cache.pin_resident(block, expert);
            host_mask_[at] = slots[expert] == SlotPool::none ? out_of_reach : 0.0F;
            some = slots[expert] == SlotPool::none ? some : slots[expert];
        }
        std::replace(slots, slots + table_.n_expert, SlotPool::none, some); // never chosen; if it were, a pinned one
    }
}

void DraftExperts::write_slot_table(SlotCache & slot_cache) {
    find_residents(slot_cache);
    ggml_backend_tensor_set(slots_, host_slots_.data(), 0, ggml_nbytes(slots_));
}

bool DraftExperts::restrict_to_residents(SlotCache & slot_cache) {
    find_residents(slot_cache);
    for (auto row = host_mask_.begin(); row != host_mask_.end(); row += table_.n_expert) {
        if (std::count(row, row + table_.n_expert, 0.0F) < table_.n_expert_used) {
            return false;
        }
    }
    ggml_backend_tensor_set(mask_, host_mask_.data(), 0, ggml_nbytes(mask_));
    ggml_backend_tensor_set(slots_, host_slots_.data(), 0, ggml_nbytes(slots_));
    return true;
}

ggml_tensor * DraftExperts::restrict_router(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * probs,
                                            int32_t block) const {
    const auto at = static_cast<size_t>(block);
    keep_unrestricted(ctx, gf, ggml_argsort_top_k(ctx, probs, table_.n_expert_used), block);
    return ggml_add(ctx, finite(ctx, probs),
                    ggml_view_2d(ctx, mask_, mask_->ne[0], 1, mask_->nb[1], at * mask_->nb[1]));
}

void DraftExperts::keep_unrestricted(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * ids, int32_t block) const {
    ggml_tensor * wanted = ggml_view_2d(ctx, unrestricted_, unrestricted_->ne[0], ids->ne[1], unrestricted_->nb[1],
                                        static_cast<size_t>(block) * unrestricted_->nb[2]);
    ggml_build_forward_expand(gf, ggml_cpy(ctx, ids, wanted));
}

void DraftExperts::forget(ggml_tensor * ids) const {
    ggml_backend_tensor_set(ids, unknown_.data(), 0, ggml_nbytes(ids)); // not every backend can fill
}

ggml_tensor * DraftExperts::slots_of(ggml_context * ctx, ggml_tensor * ids, int32_t block) const {
    ggml_tensor * table =
        ggml_view_2d(ctx, slots_, 1, slots_->ne[1], slots_->nb[1], static_cast<size_t>(block) * slots_->nb[2]);
    ggml_tensor * found = ggml_get_rows(ctx, table, ggml_reshape_1d(ctx, ids, ggml_nelements(ids)));
    return ggml_reshape_2d(ctx, found, ids->ne[0], ids->ne[1]);
}

void DraftExperts::read_unrestricted(int32_t * ids) const {
    ggml_backend_tensor_get(unrestricted_, ids, 0, ggml_nbytes(unrestricted_));
}

uint64_t DraftExperts::bytes() const {
    uint64_t bytes = 0;
    for (const ggml_backend_buffer_ptr * buffer : { &tensor_buffer_, &buffer_ }) {
        bytes += *buffer ? ggml_backend_buffer_get_size(buffer->get()) : 0;
    }
    return bytes;
}

ggml_tensor * within_budget(ggml_context * ctx, ggml_tensor * probs, int32_t budget) {
    const int64_t n_expert = probs->ne[0];
    probs = finite(ctx, probs);
    ggml_tensor * by_expert = ggml_cont(ctx, ggml_transpose(ctx, probs)); // [n_tokens, n_expert]
    ggml_tensor * mass = ggml_reshape_2d(ctx, ggml_sum_rows(ctx, by_expert), n_expert, 1);
    ggml_tensor * chosen = ggml_argsort_top_k(ctx, mass, budget); // [budget, 1]
    ggml_tensor * nothing = ggml_reshape_2d(ctx, ggml_fill(ctx, mass, out_of_reach), 1, n_expert);
    ggml_tensor * zeros = ggml_fill(ctx, ggml_view_2d(ctx, mass, 1, budget, mass->nb[0], 0), 0.0F);
    ggml_tensor * mask = ggml_set_rows(ctx, nothing, zeros, ggml_reshape_1d(ctx, ggml_cont(ctx, chosen), budget));
    return ggml_add(ctx, probs, ggml_reshape_2d(ctx, mask, n_expert, 1));
}

} // namespace edge
