#include "hook.h"

#include "error.h"
#include "faults.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "llama-ext.h"
#include "llama-moe-hook.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <utility>

namespace {

constexpr char route_prefix[] = "edge_route-";

// The device that the model's layers run on: its first GPU, else the CPU.
ggml_backend_buffer_type_t compute_buffer_type(const llama_model * model) {
    ggml_backend_dev_t device = llama_model_n_devices(model) > 0 ? llama_model_get_device(model, 0)
                                                                 : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return ggml_backend_dev_buffer_type(device);
}

// Small buffers that the device copies from and to without a detour.
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

bool is_route(const ggml_tensor * node) {
    return node->op == GGML_OP_CPY && std::strncmp(node->name, route_prefix, sizeof(route_prefix) - 1) == 0;
}

bool eval_hook(ggml_backend_t backend, ggml_tensor * node, bool ask, void * hook) {
    return static_cast<edge_hook *>(hook)->eval(backend, node, ask);
}

bool lend_hook(ggml_backend_t backend, const ggml_tensor * weight, ggml_tensor * copy, int32_t expert, bool ask, bool pad, void * hook) {
    return static_cast<edge_hook *>(hook)->lend(backend, weight, copy, expert, ask, pad);
}

bool offload_hook(const ggml_tensor * node, void * hook) {
    return static_cast<edge_hook *>(hook)->offload(node);
}

void copied_hook(ggml_backend_t backend, const ggml_tensor * weight, ggml_tensor * copy, const ggml_tensor * ids, const int32_t * chosen, bool before, void * hook) {
    static_cast<edge_hook *>(hook)->copied(backend, weight, copy, ids, chosen, before);
}

ggml_tensor * select_hook(ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * probs, const ggml_tensor * down, void * hook) {
    return static_cast<edge_hook *>(hook)->select(ctx, gf, probs, down);
}

void build_hook(ggml_context * ctx, ggml_cgraph * gf, llama_moe_block * block, void * hook) {
    static_cast<edge_hook *>(hook)->build(ctx, gf, *block);
}

} // namespace

edge_hook::edge_hook(llama_model * model, edge::ExpertTable table, const edge_hook_params & params)
    : model_(model), table_(std::move(table)), max_width_(params.max_width), served_width_(params.max_width),
      block_ids_(static_cast<size_t>(params.max_width) * static_cast<size_t>(table_.n_expert_used)),
      own_draft_(table_, compute_buffer_type(model), params.max_width, params.n_groups > 0) {
    if (table_.blocks.empty()) {
        throw edge::Error(EDGE_ERR_UNSUPPORTED, "the model has no routed experts that the hook knows");
    }
    ggml_backend_buffer_type_t buft = compute_buffer_type(model);
    if (params.n_groups > 0 && params.compute != EDGE_COMPUTE_DEVICE) {
        compute_     = params.compute;
        cpu_experts_ = std::make_unique<edge::CpuExperts>(model, params.n_threads);
    }
    if (params.n_groups > 0) {
        table_.require_host_weights();
        residency_ = std::make_unique<edge::Residency>(table_, std::vector<int32_t>(params.slots, params.slots + params.n_groups), buft,
                                                       edge::TransferParams{ params.link_bytes_per_s, params.deterministic, params.block_ns });
        if (params.layer_ahead && cpu_experts_) {
            residency_->use_gate(std::make_unique<edge::Gate>(model, table_));
        }
    }
    if (residency_ && cpu_experts_) {
        residency_->measure_costs(*cpu_experts_);
    }
    make_leaves(buft, params.reads_prompts);
    allocate_host(host_buffer_type(buft));

    const bool read_in_place = !residency_ && ggml_backend_buffer_is_host(buffer_.get());
    routing_ = read_in_place ? static_cast<const int32_t *>(leaf_->data) : host_routing_;
    set_on_model();
}

void edge_hook::make_leaves(ggml_backend_buffer_type_t buft, bool reads_prompts) {
    ggml_init_params init{};
    init.mem_size = 2 * ggml_tensor_overhead();
    init.no_alloc = true;
    ctx_.reset(ggml_init(init));
    const auto n_blocks = static_cast<int64_t>(table_.blocks.size());
    leaf_ = ggml_new_tensor_3d(ctx_.get(), GGML_TYPE_I32, table_.n_expert_used, max_width_, n_blocks);
    ggml_set_name(leaf_, "edge_routing");
    if (reads_prompts) {
        prompt_leaf_ = ggml_new_tensor_3d(ctx_.get(), GGML_TYPE_I32, table_.n_expert_used, EDGE_PROMPT_TOKENS, n_blocks);
        ggml_set_name(prompt_leaf_, "edge_prompt");
        prompt_rows_.assign(table_.blocks.size(), 0);
        prompt_ids_.resize(static_cast<size_t>(ggml_nelements(prompt_leaf_)));
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
    const size_t rows = cpu_experts_ ? static_cast<size_t>(max_width_) + block_ids_ : 0; // a block's input, its experts' outputs
    host_.reset(allocate(buft, 2 * ids + rows * n_embd * sizeof(float)));
    host_routing_  = static_cast<int32_t *>(ggml_backend_buffer_get_base(host_.get()));
    host_input_    = reinterpret_cast<float *>(host_routing_ + 2 * ggml_nelements(leaf_));
    host_computed_ = host_input_ + static_cast<size_t>(max_width_) * n_embd;
    missing_.reserve(block_ids_);
}

// With a new epoch, so no graph goes on that was built before.
void edge_hook::set_on_model() {
    llama_moe_callbacks callbacks;
    callbacks.fn = build_hook;
    if (residency_) {
        callbacks.select  = select_hook;
        callbacks.eval    = eval_hook;
        callbacks.lend    = lend_hook;
        callbacks.offload = offload_hook;
        callbacks.copied  = copied_hook;
    }
    llama_model_set_moe_hook(model_, &callbacks, this);
}

edge_hook::~edge_hook() {
    const llama_moe_callbacks none;
    llama_model_set_moe_hook(model_, &none, nullptr);
}

void edge_hook::build(ggml_context * ctx, ggml_cgraph * gf, llama_moe_block & block) {
    const int32_t number = table_.find(block.down);
    const int64_t width  = block.ids->ne[1];
    if (number < 0) {
        return; // a block that is not ours
    }
    // prefill and warm-up graphs, which use every expert, keep the stock graph; so does their last block, which
    // may be narrow because it has only the rows that logits are wanted for
    const bool fits = width <= widest() && block.ids->ne[0] == table_.n_expert_used;
    if (number == 0) {
        forget_split();
        graph_ = gf;
        chains_.assign(table_.blocks.size(), {});
        graph_fits_ = fits;
        width_      = fits ? static_cast<int32_t>(width) : 0;
    } else if (width != width_) {
        width_ = 0;
    }
    if (!graph_fits_ || !fits) {
        keep_prompt(ctx, gf, block.ids, number);
        return;
    }
    ggml_tensor * view = ggml_view_2d(ctx, leaf_, table_.n_expert_used, width, leaf_->nb[1],
                                      static_cast<size_t>(number) * leaf_->nb[2]);
    ggml_tensor * route = ggml_cpy(ctx, block.ids, view);
    ggml_format_name(route, "%s%d", route_prefix, number);
    ggml_build_forward_expand(gf, route);
    if (!residency_) {
        return;
    }
    if (experts_ == EDGE_EXPERTS_TWIN) {
        block.up      = own_draft_.twin(number, edge::role_up);
        block.gate    = own_draft_.twin(number, edge::role_gate);
        block.down    = own_draft_.twin(number, edge::role_down);
        block.gate_up = own_draft_.twin(number, edge::role_gate_up);
        return; // with the router's own ids
    }
    const int32_t group = table_.blocks[static_cast<size_t>(number)].group;
    const edge::SlotStore & store = residency_->store();
    if (experts_ == EDGE_EXPERTS_RESIDENT && selected_ != number) { // chosen by something else than a router's scores
        own_draft_.keep_wanted(ctx, gf, route, number);
        return; // where they lie
    }
    block.up      = store.tensor(group, edge::role_up);
    block.gate    = store.tensor(group, edge::role_gate);
    block.down    = store.tensor(group, edge::role_down);
    block.gate_up = store.tensor(group, edge::role_gate_up);
    block.ids     = finds_slots() ? own_draft_.slots_of(ctx, route, number) : route;
}

// Called before any node that follows has been sent to the backend; what is queued here runs before them. Returning
// false ends the graph with status "aborted" (patch 0005); end_step() then throws what went wrong.
bool edge_hook::eval(ggml_backend_t backend, ggml_tensor * node, bool ask) noexcept {
    const bool is_output = split_block_ >= 0 && node == chains_[static_cast<size_t>(split_block_)].output;
    if (ask) {
        return is_output || (experts_ == EDGE_EXPERTS_OWN && !settled_ && is_route(node));
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
        if (std::sscanf(node->name + sizeof(route_prefix) - 1, "%d", &number) != 1) {
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
        error_  = e.what();
    } catch (const std::exception & e) {
        status_ = EDGE_ERR_INTERNAL;
        error_  = e.what();
    }
    forget_split();
    return false;
}

void edge_hook::serve(ggml_backend_t backend, ggml_tensor * route, int32_t number) {
    look_ahead(); // while the device computes the block before
    await_copies(number - 1);
    ggml_backend_tensor_get_async(backend, route, routing_of(number), 0, ggml_nbytes(route));
    if (sees_next(route, number)) {
        read_rows_for(number + 1, backend, chains_[static_cast<size_t>(number)].input);
    }
    await_device(backend, number);
    {
        const edge::Timeline::Span span(timeline_, EDGE_SPAN_DECIDE, number);
        residency_->demand(number, routing_of(number), static_cast<int32_t>(ggml_nelements(route)), slots_of(number));
    }
    if (residency_->fetching() && !residency_->hold_for_fetches(backend)) { // a slow link that is emulated: we hold the device
        look_ahead();
        await_copies(number);
    }
    ggml_backend_tensor_set_async(backend, route, slots_of(number), 0, ggml_nbytes(route));
}

// The one wait of a block: everything before its routing has run, too.
void edge_hook::await_device(ggml_backend_t backend, int32_t number) {
    const edge::Timeline::Span span(timeline_, EDGE_SPAN_DEVICE, number);
    ggml_backend_synchronize(backend);
}

void edge_hook::await_copies(int32_t number) {
    if (residency_->fetching()) {
        const edge::Timeline::Span span(timeline_, EDGE_SPAN_COPIES, number);
        residency_->await_fetches();
    }
}

void edge_hook::end_step() {
    forget_split();
    swapping_ = -1;
    if (experts_ != EDGE_EXPERTS_OWN) {
        end_draft_step();
    } else if (settled_) {
        end_settled_step();
    } else if (residency_) {
        residency_->end_step();
        settle();
        n_tokens_ = n_served_ == table_.blocks.size() ? width_ : 0;
        n_served_ = 0;
    } else {
        n_tokens_ = width_;
    }
    if (!residency_ && routing_ == host_routing_ && n_tokens_ > 0) {
        ggml_backend_tensor_get(leaf_, host_routing_, 0, ggml_nbytes(leaf_));
    }
    cancelled_ = false;
    if (status_ != EDGE_OK) {
        throw edge::Error(std::exchange(status_, EDGE_OK), std::exchange(error_, {}));
    }
}

int32_t edge_hook::widest_served(const int32_t * slots) const {
    int32_t width = max_width_;
    for (size_t g = 0; g < table_.groups.size(); ++g) {
        while (width > 0 && slots[g] < edge::slot_floor(table_, g, compute_ == EDGE_COMPUTE_HYBRID ? 1 : width)) {
            --width;
        }
    }
    return width;
}

void edge_hook::resize(const std::vector<int32_t> & slots) {
    served_width_ = 0;
    settled_      = false;
    experts_      = EDGE_EXPERTS_OWN; // slots lie elsewhere
    set_on_model();
    residency_->resize(slots);
    served_width_ = widest_served(slots.data());
}

uint64_t edge_hook::bytes() const {
    return ggml_backend_buffer_get_size(buffer_.get()) + own_draft_.bytes() + (residency_ ? residency_->bytes() : 0);
}
