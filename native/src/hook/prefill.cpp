// The part of edge_hook that serves prefill: graphs too wide for slots, which llama.cpp runs on its stock path.
#include "hook/hook.h"

#include "ggml-backend.h"

#include <algorithm>

namespace {

// Bytes of a matrix. Smaller ones copy faster together than around others.
constexpr size_t min_bytes_to_copy_from_slot = 256 << 10;
constexpr float forgetting = 0.98F; // decay per token: the end of a prefill predicts the text after it best
constexpr float least_weight = 1e-30F; // keeps weights above 0, which means that no token uses the expert

ggml_tensor as_bytes(const ggml_tensor * whole, size_t offset, size_t bytes) {
    ggml_tensor part = *whole;
    part.type = GGML_TYPE_I8;
    part.ne[0] = static_cast<int64_t>(bytes);
    part.ne[1] = part.ne[2] = part.ne[3] = 1;
    part.nb[0] = 1;
    part.nb[1] = part.nb[2] = part.nb[3] = bytes;
    part.data = static_cast<char *>(whole->data) + offset;
    return part;
}

edge::Role role_of(const edge::ExpertBlock & block, const ggml_tensor * weight) {
    return static_cast<edge::Role>(std::find(block.weights.begin(), block.weights.end(), weight) -
                                   block.weights.begin());
}

} // namespace

// llama.cpp has a device compute with experts in host memory from 32 tokens on. A narrower graph that slots do not
// serve is a short prefill or a long one's last block, of which only the last row is wanted: copying may be faster than
// the CPU there, too.
bool edge_hook::offload(const ggml_tensor * node) noexcept {
    const int32_t number = node->op == GGML_OP_MUL_MAT_ID ? table_.find(node->src[0]) : -1;
    return number >= 0 &&
           slot_cache_->gpu_offload_is_faster(number, static_cast<int32_t>(ggml_nelements(node->src[2])));
}

// Slots of a block's group in one role, if they are on this backend's device.
ggml_tensor * edge_hook::slots_on(ggml_backend_t backend, const edge::ExpertBlock & block, edge::Role role) const {
    ggml_tensor * slots = slot_cache_->has_slots() ? slot_cache_->store().tensor(block.group, role) : nullptr;
    const bool here = slots && ggml_backend_buft_get_device(ggml_backend_buffer_get_type(slots->buffer)) ==
                                   ggml_backend_get_device(backend);
    return here ? slots : nullptr;
}

// Prefill copies all its experts to the device. Resident ones need only a copy on the device.
bool edge_hook::copy_from_slot(ggml_backend_t backend, const ggml_tensor * weight, ggml_tensor * copy, int32_t expert,
                               bool ask, bool pad) noexcept {
    const int32_t number = table_.find(weight);
    const auto in_turn = [&](int32_t edge::SlotCache::Admission::* which) {
        return number == admission_block_ &&
               std::any_of(admissions_.begin(), admissions_.end(),
                           [&](const edge::SlotCache::Admission & s) { return s.*which == expert; });
    };
    const size_t bytes = weight->nb[2];
    if (number < 0 || (bytes < min_bytes_to_copy_from_slot && !in_turn(&edge::SlotCache::Admission::admitted))) {
        return false;
    }
    const edge::ExpertBlock & block = table_.blocks[static_cast<size_t>(number)];
    ggml_tensor * slots = slots_on(backend, block, role_of(block, weight));
    const int32_t slot = slots ? slot_cache_->pin_resident(number, expert) : edge::SlotPool::none;
    if (slot == edge::SlotPool::none || ask) {
        return slot != edge::SlotPool::none;
    }
    const size_t from = static_cast<size_t>(slot) * bytes, to = static_cast<size_t>(expert) * bytes;
    if (!in_turn(&edge::SlotCache::Admission::evicted)) { // otherwise it was copied before its slot was reassigned
        copy_on_device(backend, slots, from, copy, to, bytes);
    }
    if (pad) { // kernels may read past an expert's end: values there must be finite
        copy_on_device(backend, slots, from, copy, to + bytes, std::min<size_t>(bytes, 512));
    }
    return true;
}

// On the transfer stream beside the other experts' copies, if there is one.
void edge_hook::copy_on_device(ggml_backend_t backend, ggml_tensor * from, size_t from_offset, ggml_tensor * to,
                               size_t to_offset, size_t bytes) {
    ggml_tensor part_from = as_bytes(from, from_offset, bytes), part_to = as_bytes(to, to_offset, bytes);
    if (slot_link_) {
        slot_link_->copy(&part_from, &part_to);
    } else {
        ggml_backend_tensor_copy_async(backend, backend, &part_from, &part_to);
    }
}

// Called before a weight's experts are queued for the device, and when all of them are.
void edge_hook::copied(ggml_backend_t backend, const ggml_tensor * weight, ggml_tensor * copy, const ggml_tensor * ids,
                       const int32_t * chosen, bool before) noexcept {
    const int32_t number = table_.find(weight);
    if (number < 0) {
        return;
    }
    const edge::ExpertBlock & block = table_.blocks[static_cast<size_t>(number)];
    ggml_tensor * slots = slots_on(backend, block, role_of(block, weight));
    edge::Link & link = slot_cache_->demand_link();
    if (!slots || !link.asynchronous()) {
        return;
    }
    if (!before) {
        link.before(backend);
        slot_link_ = nullptr;
        if (number == admission_block_ && --n_matrices_left_ == 0) {
            slot_cache_->end_admission();
            admission_block_ = -1;
        }
        return;
    }
    link.after(backend); // kernels still read the memory that the copy overwrites
    slot_link_ = &link;
    if (admits_from_prefill_) {
        if (number != admission_block_) {
            begin_admission(number, ids, chosen);
        }
        send_admissions(backend, weight, copy, slots);
    }
}

// Send the admitted experts to their slots first; they are then copied from there as other residents are. Evicted
// experts that the graph uses are copied before.
void edge_hook::send_admissions(ggml_backend_t backend, const ggml_tensor * weight, ggml_tensor * copy,
                                ggml_tensor * slots) {
    if (admissions_.empty()) {
        return;
    }
    const size_t bytes = weight->nb[2];
    for (const edge::SlotCache::Admission & admission : admissions_) {
        if (bytes >= min_bytes_to_copy_from_slot && prefill_weights_[static_cast<size_t>(admission.evicted)] > 0) {
            copy_on_device(backend, slots, static_cast<size_t>(admission.slot) * bytes, copy,
                           static_cast<size_t>(admission.evicted) * bytes, bytes);
        }
    }
    slot_link_->before(backend);
    for (const edge::SlotCache::Admission & admission : admissions_) {
        const char * from = static_cast<const char *>(weight->data) + static_cast<size_t>(admission.admitted) * bytes;
        ggml_backend_tensor_set_async(backend, slots, from, static_cast<size_t>(admission.slot) * bytes, bytes);
    }
    slot_link_->after(backend);
}

void edge_hook::begin_admission(int32_t number, const ggml_tensor * ids, const int32_t * chosen) {
    const auto & weights = table_.blocks[static_cast<size_t>(number)].weights;
    admission_block_ = number;
    n_matrices_left_ = static_cast<int32_t>(
        std::count_if(weights.begin(), weights.end(), [](const ggml_tensor * t) { return t != nullptr; }));
    prefill_weights_.assign(static_cast<size_t>(table_.n_expert), 0.0F);
    float weight = 1.0F;
    for (int64_t token = ids->ne[1] - 1; token >= 0; --token, weight = std::max(weight * forgetting, least_weight)) {
        for (int64_t i = 0; i < ids->ne[0]; ++i) {
            const int32_t expert = chosen[static_cast<size_t>(token) * ids->nb[1] / sizeof(int32_t) +
                                          static_cast<size_t>(i) * ids->nb[0] / sizeof(int32_t)];
            if (expert >= 0 && expert < table_.n_expert) {
                prefill_weights_[static_cast<size_t>(expert)] += weight;
            }
        }
    }
    admissions_ = slot_cache_->begin_admission(number, prefill_weights_.data());
}

// Keep the routing of the last tokens of a prefill, which predicts the text after it.
void edge_hook::keep_prefill_routing(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * ids, int32_t number) {
    if (!prefill_leaf_ || graph_fits_ || ids->ne[0] != table_.n_expert_used) {
        return;
    }
    if (number == 0) {
        std::fill(prefill_rows_.begin(), prefill_rows_.end(), 0);
    }
    const int64_t width = ids->ne[1];
    const int64_t rows = std::min<int64_t>(width, EDGE_PREFILL_TOKENS);
    ggml_tensor * last =
        ggml_view_2d(ctx, ids, ids->ne[0], rows, ids->nb[1], static_cast<size_t>(width - rows) * ids->nb[1]);
    ggml_tensor * kept = ggml_view_2d(ctx, prefill_leaf_, ids->ne[0], rows, prefill_leaf_->nb[1],
                                      static_cast<size_t>(number) * prefill_leaf_->nb[2]);
    ggml_build_forward_expand(gf, ggml_cpy(ctx, last, kept));
    prefill_rows_[static_cast<size_t>(number)] = static_cast<int32_t>(rows);
}

int32_t edge_hook::read_prefill() {
    const int32_t n = prefill_rows_.empty() ? 0 : *std::max_element(prefill_rows_.begin(), prefill_rows_.end());
    if (n == 0) {
        return 0;
    }
    ggml_backend_tensor_get(prefill_leaf_, prefill_ids_.data(), 0, ggml_nbytes(prefill_leaf_));
    const auto row = static_cast<size_t>(table_.n_expert_used);
    const size_t of_block = row * EDGE_PREFILL_TOKENS;
    for (size_t block = 0; block < prefill_rows_.size(); ++block) {
        const auto first = prefill_ids_.begin() + static_cast<std::ptrdiff_t>(block * of_block);
        const auto known = static_cast<std::ptrdiff_t>(row * static_cast<size_t>(prefill_rows_[block]));
        const auto end = first + static_cast<std::ptrdiff_t>(of_block);
        std::copy_backward(first, first + known, end);
        std::fill(first, end - known, -1);
    }
    return n;
}
