// The C ABI: checks arguments and turns exceptions into a status and a message.
#include "edge_speq.h"

#include "api/guarded.h"
#include "util/faults.h"
#include "util/vocab.h"

#include "ggml-backend.h"
#include "llama-ext.h"
#include "llama.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

namespace {

using namespace edge::api;

template <size_t n> void copy_text(char (&to)[n], const char * from) {
    std::strncpy(to, from ? from : "", n - 1);
    to[n - 1] = '\0';
}

bool is_gpu(ggml_backend_dev_t device) {
    const auto type = ggml_backend_dev_type(device);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

void require_slots(const edge::ExpertTable & table, const int32_t * slots, int32_t n_groups, int32_t width) {
    require(n_groups == 0 || slots != nullptr, "slots is null");
    require(n_groups == 0 || n_groups == static_cast<int32_t>(table.groups.size()),
            "slots must name a count for each group of the model");
    for (int32_t g = 0; g < n_groups; ++g) {
        const int32_t floor = edge::slot_floor(table, static_cast<size_t>(g), width);
        if (slots[g] < floor) {
            throw edge::Error(EDGE_ERR_BUDGET, "group " + std::to_string(g) + " has " + std::to_string(slots[g]) +
                                                   " slots, but graphs of up to " + std::to_string(width) +
                                                   " tokens need at least " + std::to_string(floor));
        }
    }
}

} // namespace

extern "C" {

int32_t edge_abi_version(void) { return EDGE_ABI_VERSION; }
const char * edge_header_sha256(void) { return EDGE_SPEQ_HEADER_SHA256; }
const char * edge_llama_cpp_commit(void) { return EDGE_SPEQ_LLAMA_COMMIT; }
const char * edge_last_error(void) { return last_error().c_str(); }

int edge_backend_load(const char * path) {
    return guarded([&] {
        require(path != nullptr, "path is null");
        if (ggml_backend_load(path) == nullptr) {
            throw edge::Error(EDGE_ERR_BACKEND,
                              std::string(path) + " is not a ggml backend module that loads here " +
                                  "(a missing driver or runtime library, or built from another ggml)");
        }
    });
}

int edge_device_count(int32_t * out) {
    return guarded([&] {
        require(out != nullptr, "out is null");
        *out = static_cast<int32_t>(ggml_backend_dev_count());
    });
}

int edge_device_get(int32_t index, edge_device * out) {
    return guarded([&] {
        require(out != nullptr, "out is null");
        require(index >= 0 && static_cast<size_t>(index) < ggml_backend_dev_count(), "no device has this index");
        ggml_backend_dev_t device = ggml_backend_dev_get(static_cast<size_t>(index));
        size_t free_bytes = 0;
        size_t total_bytes = 0;
        ggml_backend_dev_memory(device, &free_bytes, &total_bytes);
        copy_text(out->name, ggml_backend_dev_name(device));
        copy_text(out->description, ggml_backend_dev_description(device));
        out->is_gpu = is_gpu(device) ? 1 : 0;
        out->is_integrated = ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_IGPU ? 1 : 0;
        out->free_bytes = free_bytes;
        out->total_bytes = total_bytes;
    });
}

void * edge_cpu_buffer_type(void) { return ggml_backend_cpu_buffer_type(); }

void * edge_host_buffer_type(void) {
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        ggml_backend_buffer_type_t buft = is_gpu(device) ? ggml_backend_dev_host_buffer_type(device) : nullptr;
        if (buft != nullptr) {
            return buft;
        }
    }
    return ggml_backend_cpu_buffer_type();
}

int edge_model_experts(const llama_model * model, edge_experts * out) {
    return guarded([&] {
        require(model != nullptr && out != nullptr, "model or out is null");
        const edge::ExpertTable table(model);
        out->n_blocks = static_cast<int32_t>(table.blocks.size());
        out->n_expert = table.n_expert;
        out->n_expert_used = table.n_expert_used;
        out->n_groups = static_cast<int32_t>(table.groups.size());
        out->total_bytes = table.total_bytes();
    });
}

int edge_model_block_groups(const llama_model * model, int32_t * out) {
    return guarded([&] {
        require(model != nullptr && out != nullptr, "model or out is null");
        for (const edge::ExpertBlock & block : edge::ExpertTable(model).blocks) {
            *out++ = block.group;
        }
    });
}

int edge_model_group(const llama_model * model, int32_t group, edge_group * out) {
    return guarded([&] {
        require(model != nullptr && out != nullptr, "model or out is null");
        const edge::ExpertTable table(model);
        require(group >= 0 && static_cast<size_t>(group) < table.groups.size(), "no group has this index");
        const edge::ExpertGroup & found = table.groups[static_cast<size_t>(group)];
        out->n_blocks = static_cast<int32_t>(found.blocks.size());
        out->n_experts = out->n_blocks * table.n_expert;
        out->expert_bytes = found.expert_bytes;
    });
}

int edge_vocab_compare(const llama_model * a, const llama_model * b, int32_t * out) {
    return guarded([&] {
        require(a != nullptr && b != nullptr && out != nullptr, "model or out is null");
        *out = edge::first_vocab_difference(a, b);
    });
}

int edge_memory_used(const llama_context * ctx, bool on_gpu, edge_memory * out) {
    return guarded([&] {
        require(ctx != nullptr && out != nullptr, "ctx or out is null");
        *out = edge_memory{};
        for (const auto & [buft, data] : llama_get_memory_breakdown(ctx)) {
            ggml_backend_dev_t device = ggml_backend_buft_get_device(buft);
            const bool host = ggml_backend_buft_is_host(buft) || device == nullptr || !is_gpu(device);
            if (host == on_gpu) {
                continue;
            }
            const bool mapped = std::string(ggml_backend_buft_name(buft)).find("_Mapped") != std::string::npos;
            out->model_bytes += mapped ? 0 : data.model;
            out->context_bytes += data.context;
            out->compute_bytes += data.compute;
        }
    });
}

int edge_slot_floor(int32_t n_expert, int32_t n_expert_used, int32_t max_width, int32_t * out) {
    return guarded([&] {
        require(out != nullptr, "out is null");
        require(n_expert > 0 && n_expert_used > 0 && max_width > 0, "counts must be positive");
        *out = edge::slot_floor(n_expert, n_expert_used, max_width);
    });
}

int edge_hook_attach(llama_model * model, const edge_hook_params * params, edge_hook ** out) {
    return guarded([&] {
        require(model != nullptr && params != nullptr && out != nullptr, "model, params or out is null");
        require(params->max_width > 0, "max_width must be positive");
        require(params->n_threads >= 0 && params->n_threads <= 4096, "n_threads must be 0 to 4096");
        require(params->on_miss >= EDGE_ON_MISS_FETCH && params->on_miss <= EDGE_ON_MISS_AUTO,
                "compute is none of EDGE_COMPUTE_...");
        edge::ExpertTable table(model);
        // the CPU's experts need no slot, only ids that differ from the token's others
        require_slots(table, params->slots, params->n_groups,
                      params->on_miss == EDGE_ON_MISS_HYBRID ? 1 : params->max_width);
        require(!params->deterministic || params->link_bytes_per_s > 0,
                "deterministic mode needs the speed of its virtual link");
        *out = new edge_hook(model, std::move(table), *params);
    });
}

int edge_hook_detach(edge_hook * hook) {
    return guarded([&] { delete hook; });
}

int edge_hook_load_draft_experts(edge_hook * hook, const char * path, const edge_draft_tensor * tensors,
                                 int32_t n_tensors) {
    return guarded([&] {
        slot_cache_of(hook);
        require(path != nullptr && tensors != nullptr && n_tensors > 0, "path or tensors is null");
        hook->load_draft_experts(path, tensors, n_tensors);
    });
}

int edge_hook_use_experts(edge_hook * hook, int32_t which, bool * ready) {
    return guarded([&] {
        require(hook != nullptr && ready != nullptr, "hook or out is null");
        require(which >= EDGE_EXPERTS_OWN && which <= EDGE_EXPERTS_RESIDENT, "which is none of EDGE_EXPERTS_...");
        *ready = hook->use_experts(which);
    });
}

int edge_hook_use_budget(edge_hook * hook, int32_t n_experts) {
    return guarded([&] {
        slot_cache_of(hook);
        hook->use_budget(n_experts);
    });
}

int edge_hook_admit_from_prefill(edge_hook * hook, bool on) {
    return guarded([&] {
        slot_cache_of(hook);
        hook->admit_from_prefill(on);
    });
}

int edge_hook_end_step(edge_hook * hook) {
    return guarded([&] {
        require(hook != nullptr, "hook is null");
        hook->end_step();
    });
}

int edge_hook_cancel(edge_hook * hook) {
    return guarded([&] {
        require(hook != nullptr, "hook is null");
        hook->cancel();
    });
}

int edge_hook_routing(edge_hook * hook, const int32_t ** ids, int32_t * n_tokens) {
    return guarded([&] {
        require(hook != nullptr && ids != nullptr && n_tokens != nullptr, "hook or out is null");
        *ids = hook->routing_ids();
        *n_tokens = hook->routing_tokens();
    });
}

int edge_hook_prefill_routing(edge_hook * hook, const int32_t ** ids, int32_t * n_tokens) {
    return guarded([&] {
        require(hook != nullptr && ids != nullptr && n_tokens != nullptr, "hook or out is null");
        *n_tokens = hook->read_prefill();
        *ids = hook->prefill_ids();
    });
}

int edge_hook_scores(edge_hook * hook, float ** out) {
    return guarded([&] {
        require(out != nullptr, "out is null");
        *out = slot_cache_of(hook).scores();
    });
}

int edge_hook_prefetch(edge_hook * hook, const edge_prefetch_request * requests, int32_t n_requests,
                       uint64_t byte_budget, float margin, int32_t * n_absent, bool * finite) {
    return guarded([&] {
        edge::SlotCache & slot_cache = slot_cache_of(hook);
        require(n_requests >= 0 && (requests != nullptr || n_requests == 0) && n_absent != nullptr,
                "requests or out is null");
        const auto n_blocks = static_cast<int32_t>(hook->table().blocks.size());
        for (int32_t i = 0; i < n_requests; ++i) {
            require(requests[i].block >= 0 && requests[i].block < n_blocks, "no block has this index");
            require(requests[i].expert >= 0 && requests[i].expert < hook->table().n_expert, "no expert has this index");
        }
        *n_absent = slot_cache.prefetch(requests, n_requests, byte_budget, margin, finite);
    });
}

int edge_hook_resize(edge_hook * hook, const int32_t * slots, int32_t n_groups) {
    return guarded([&] {
        slot_cache_of(hook);
        require(n_groups > 0, "slots must name a count for each group of the model");
        require_slots(hook->table(), slots, n_groups, 1);
        hook->resize(std::vector<int32_t>(slots, slots + n_groups));
    });
}

int edge_hook_drain(edge_hook * hook) {
    return guarded([&] { slot_cache_of(hook).drain(); });
}

int edge_hook_counters(edge_hook * hook, edge_counters * out) {
    return guarded([&] {
        require(out != nullptr, "out is null");
        *out = slot_cache_of(hook).counters();
    });
}

int edge_hook_costs(edge_hook * hook, edge_costs * out) {
    return guarded([&] {
        require(out != nullptr, "out is null");
        *out = slot_cache_of(hook).costs();
    });
}

int edge_hook_record(edge_hook * hook, int32_t n) {
    return guarded([&] {
        require(hook != nullptr && n >= 0, "hook is null or n negative");
        hook->timeline().begin(static_cast<size_t>(n));
    });
}

int edge_hook_spans(edge_hook * hook, const edge_span ** spans, int32_t * n) {
    return guarded([&] {
        require(hook != nullptr && spans != nullptr && n != nullptr, "hook, spans or n is null");
        *spans = hook->timeline().spans().data();
        *n = static_cast<int32_t>(hook->timeline().spans().size());
    });
}

int edge_hook_states(edge_hook * hook, uint8_t * out) {
    return guarded([&] {
        require(out != nullptr, "out is null");
        slot_cache_of(hook).states(out);
    });
}

int edge_hook_bytes(edge_hook * hook, uint64_t * out) {
    return guarded([&] {
        require(hook != nullptr && out != nullptr, "hook or out is null");
        *out = hook->bytes();
    });
}

int edge_hook_slot_bytes(edge_hook * hook, uint64_t * out) {
    return guarded([&] {
        require(hook != nullptr && out != nullptr, "hook or out is null");
        *out = hook->slot_cache() ? hook->slot_cache()->bytes() : 0;
    });
}

int edge_hook_poison_free_slots(edge_hook * hook) {
    return guarded([&] { slot_cache_of(hook).poison_free_slots(); });
}

int edge_test_fail(int32_t kind, int64_t nth) {
    return guarded([&] {
        require(kind >= 0 && kind < edge::n_faults && nth >= 0, "no such fault");
        edge::arm_fault(static_cast<edge::Fault>(kind), nth);
    });
}

} // extern "C"
