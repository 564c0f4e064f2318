#include "hook/hook.h"

#include "util/error.h"
#include "util/faults.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "llama-ext.h"
#include "llama-moe-hook.h"

#include <utility>

namespace {

// The device that the model's layers run on: its first GPU, or the CPU.
ggml_backend_buffer_type_t compute_buffer_type(const llama_model * model) {
    ggml_backend_dev_t device = llama_model_n_devices(model) > 0
                                    ? llama_model_get_device(model, 0)
                                    : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return ggml_backend_dev_buffer_type(device);
}

// Small buffers that the device copies from and to directly.
ggml_backend_buffer_type_t host_buffer_type(ggml_backend_buffer_type_t device_buft) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(device_buft);
    ggml_backend_buffer_type_t buft = device ? ggml_backend_dev_host_buffer_type(device) : nullptr;
    return buft ? buft : ggml_backend_cpu_buffer_type();
}

ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t buft, size_t bytes) {
    edge::fault_point(edge::Fault::allocation);
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(buft, bytes);
    if (buffer == nullptr) {
        throw edge::Error(EDGE_ERR_MEMORY, "cannot allocate host memory for the routing");
    }
    ggml_backend_buffer_clear(buffer, 0);
    return buffer;
}

bool eval_hook(ggml_backend_t backend, ggml_tensor * node, bool ask, void * hook) {
    return static_cast<edge_hook *>(hook)->eval(backend, node, ask);
}

bool copy_from_slot_hook(ggml_backend_t backend, const ggml_tensor * weight, ggml_tensor * copy, int32_t expert,
                         bool ask, bool pad, void * hook) {
    return static_cast<edge_hook *>(hook)->copy_from_slot(backend, weight, copy, expert, ask, pad);
}

bool offload_hook(const ggml_tensor * node, void * hook) { return static_cast<edge_hook *>(hook)->offload(node); }

void copied_hook(ggml_backend_t backend, const ggml_tensor * weight, ggml_tensor * copy, const ggml_tensor * ids,
                 const int32_t * chosen, bool before, void * hook) {
    static_cast<edge_hook *>(hook)->copied(backend, weight, copy, ids, chosen, before);
}

ggml_tensor * select_hook(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * probs, const ggml_tensor * down,
                          void * hook) {
    return static_cast<edge_hook *>(hook)->select(ctx, gf, probs, down);
}

void build_hook(ggml_context * ctx, ggml_cgraph * gf, llama_moe_block * block, void * hook) {
    static_cast<edge_hook *>(hook)->build(ctx, gf, *block);
}

} // namespace

edge_hook::edge_hook(llama_model * model, edge::ExpertTable table, const edge_hook_params & params)
    : model_(model), table_(std::move(table)), max_width_(params.max_width), served_width_(params.max_width),
      block_ids_(static_cast<size_t>(params.max_width) * static_cast<size_t>(table_.n_expert_used)),
      draft_experts_(table_, compute_buffer_type(model), params.max_width, params.n_groups > 0) {
    if (table_.blocks.empty()) {
        throw edge::Error(EDGE_ERR_UNSUPPORTED, "the model has no routed experts that the hook knows");
    }
    ggml_backend_buffer_type_t buft = compute_buffer_type(model);
    if (params.n_groups > 0 && params.on_miss != EDGE_ON_MISS_FETCH) {
        on_miss_ = params.on_miss;
        cpu_experts_ = std::make_unique<edge::CpuExperts>(model, params.n_threads);
    }
    if (params.n_groups > 0) {
        table_.require_host_weights();
        slot_cache_ = std::make_unique<edge::SlotCache>(
            table_, std::vector<int32_t>(params.slots, params.slots + params.n_groups), buft,
            edge::TransferParams{ params.link_bytes_per_s, params.deterministic, params.block_ns });
        if (params.next_layer_prefetch && cpu_experts_) {
            slot_cache_->use_router_predictor(std::make_unique<edge::RouterPredictor>(model, table_));
        }
    }
    if (slot_cache_ && cpu_experts_) {
        slot_cache_->calibrate_costs(*cpu_experts_);
    }
    make_leaves(buft, params.reads_prefill);
    allocate_host(host_buffer_type(buft));

    const bool read_in_place = !slot_cache_ && ggml_backend_buffer_is_host(buffer_.get());
    routing_ = read_in_place ? static_cast<const int32_t *>(leaf_->data) : host_routing_;
    set_on_model();
}

void edge_hook::make_leaves(ggml_backend_buffer_type_t buft, bool reads_prefill) {
    ggml_init_params init{};
    init.mem_size = 2 * ggml_tensor_overhead();
    init.no_alloc = true;
    ctx_.reset(ggml_init(init));
    const auto n_blocks = static_cast<int64_t>(table_.blocks.size());
    leaf_ = ggml_new_tensor_3d(ctx_.get(), GGML_TYPE_I32, table_.n_expert_used, max_width_, n_blocks);
    ggml_set_name(leaf_, "edge_routing");
    if (reads_prefill) {
        prefill_leaf_ =
            ggml_new_tensor_3d(ctx_.get(), GGML_TYPE_I32, table_.n_expert_used, EDGE_PREFILL_TOKENS, n_blocks);
        ggml_set_name(prefill_leaf_, "edge_prefill");
        prefill_rows_.assign(table_.blocks.size(), 0);
        prefill_ids_.resize(static_cast<size_t>(ggml_nelements(prefill_leaf_)));
    }
    edge::fault_point(edge::Fault::allocation);
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx_.get(), buft));
    if (!buffer_) {
        throw edge::Error(EDGE_ERR_MEMORY, "cannot allocate the routing buffer on the compute device");
    }
    ggml_backend_buffer_clear(buffer_.get(), 0);
}

void edge_hook::allocate_host(ggml_backend_buffer_type_t buft) {
    const size_t ids = ggml_nbytes(leaf_); // of all blocks: experts, then slots
    const auto n_embd = static_cast<size_t>(table_.blocks.front().weights[edge::role_down]->ne[1]);
    // Of a block's input and its experts' outputs.
    const size_t rows = cpu_experts_ ? static_cast<size_t>(max_width_) + block_ids_ : 0;
    host_.reset(allocate(buft, 2 * ids + rows * n_embd * sizeof(float)));
    host_routing_ = static_cast<int32_t *>(ggml_backend_buffer_get_base(host_.get()));
    host_input_ = reinterpret_cast<float *>(host_routing_ + 2 * ggml_nelements(leaf_));
    host_computed_ = host_input_ + static_cast<size_t>(max_width_) * n_embd;
    missing_.reserve(block_ids_);
}

// With a new epoch, so that no graph built earlier is reused.
void edge_hook::set_on_model() {
    llama_moe_callbacks callbacks;
    callbacks.fn = build_hook;
    if (slot_cache_) {
        callbacks.select = select_hook;
        callbacks.eval = eval_hook;
        callbacks.copy_from_slot = copy_from_slot_hook;
        callbacks.offload = offload_hook;
        callbacks.copied = copied_hook;
    }
    llama_model_set_moe_hook(model_, &callbacks, this);
}

edge_hook::~edge_hook() {
    const llama_moe_callbacks none;
    llama_model_set_moe_hook(model_, &none, nullptr);
}

int32_t edge_hook::widest_served(const int32_t * slots) const {
    int32_t width = max_width_;
    for (size_t g = 0; g < table_.groups.size(); ++g) {
        while (width > 0 && slots[g] < edge::slot_floor(table_, g, on_miss_ == EDGE_ON_MISS_HYBRID ? 1 : width)) {
            --width;
        }
    }
    return width;
}

void edge_hook::resize(const std::vector<int32_t> & slots) {
    admission_block_ = -1; // end_step() may have been left out after a decode that failed
    admissions_.clear();
    served_width_ = 0;
    device_only_ = false;
    experts_ = EDGE_EXPERTS_OWN; // slots have other addresses now
    set_on_model();
    slot_cache_->resize(slots);
    served_width_ = widest_served(slots.data());
}

uint64_t edge_hook::bytes() const {
    return ggml_backend_buffer_get_size(buffer_.get()) + draft_experts_.bytes() +
           (slot_cache_ ? slot_cache_->bytes() : 0);
}
