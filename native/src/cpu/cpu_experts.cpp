#include "cpu/cpu_experts.h"

#include "edge_speq.h"
#include "util/error.h"

#include "llama-ext.h"
#include "llama-moe-hook.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <string>

namespace edge {

namespace {

constexpr size_t max_nodes = 64;
constexpr size_t alignment = 64;

[[noreturn]] void unsupported(const ggml_tensor * node) {
    throw Error(EDGE_ERR_UNSUPPORTED, std::string("hybrid execution cannot clone ") + ggml_op_desc(node) + " (" +
                                          node->name + "): use on_miss=fetch");
}

// The scheduler gives a backend copies of other backends' tensors: "CUDA0#blk.0.ffn_up_exps.bias#0".
std::string original_name(const ggml_tensor * leaf) {
    std::string name = leaf->name;
    const size_t first = name.find('#');
    const size_t last = name.rfind('#');
    return first == std::string::npos || first == last ? name : name.substr(first + 1, last - first - 1);
}

void use_one_thread(ggml_backend_t backend) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    auto * set = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"));
    if (set) {
        set(backend, 1);
    }
}

} // namespace

CpuExperts::CpuExperts(const llama_model * model, int32_t n_threads)
    : model_(model), matmul_(static_cast<size_t>(n_threads > 0 ? n_threads : GGML_DEFAULT_N_THREADS)),
      backend_(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr)),
      nodes_(ggml_tensor_overhead() * max_nodes + 2 * ggml_graph_overhead_custom(max_nodes, false)),
      ctx_(ggml_init({ nodes_.size(), nodes_.data(), true })) {
    if (!backend_) {
        throw Error(EDGE_ERR_BACKEND, "no CPU backend to compute missing experts with");
    }
    use_one_thread(backend_.get());
}

// Clones the nodes between a chain's ends for other tokens.
struct CpuExperts::Clone {
    CpuExperts & owner;
    const ExpertBlock & block;
    const SlotStore & store;
    const ExpertChain & chain;
    ggml_context * ctx;
    ggml_tensor * input; // [n_embd, 1, n_pairs]
    ggml_tensor * ids; // [1, n_pairs]
    bool reached_down = false;
    // Gate and up may be views of one tensor.
    std::vector<std::pair<const ggml_tensor *, ggml_tensor *>> & made = owner.made_;

    ggml_tensor * of(const ggml_tensor * node, int depth = 0) {
        if (node == chain.input) {
            return input;
        }
        for (const auto & [original, copy] : made) {
            if (original == node) {
                return copy;
            }
        }
        ggml_tensor * copy = make(node, depth);
        made.emplace_back(node, copy);
        return copy;
    }

    ggml_tensor * make(const ggml_tensor * node, int depth) {
        if (depth > 24) {
            unsupported(node);
        }
        switch (node->op) {
            case GGML_OP_MUL_MAT_ID: {
                ggml_tensor * copy = ggml_mul_mat_id(ctx, weight(node->src[0]), of(node->src[1], depth + 1), ids);
                std::memcpy(copy->op_params, node->op_params, sizeof(copy->op_params));
                return copy;
            }
            case GGML_OP_ADD_ID:
                return ggml_add_id(ctx, of(node->src[0], depth + 1), leaf(node->src[1]), ids);
            case GGML_OP_VIEW: { // half of the fused gate_up
                ggml_tensor * of_what = of(node->src[0], depth + 1);
                return ggml_view_3d(ctx, of_what, node->ne[0], 1, input->ne[2], of_what->nb[1], of_what->nb[2],
                                    node->view_offs);
            }
            case GGML_OP_GLU:
            case GGML_OP_UNARY:
            case GGML_OP_CLAMP:
            case GGML_OP_SCALE:
            case GGML_OP_SQR:
            case GGML_OP_MUL:
                return elementwise(node, depth);
            default:
                unsupported(node);
        }
    }

    ggml_tensor * elementwise(const ggml_tensor * node, int depth) {
        ggml_tensor * copy = ggml_new_tensor_3d(ctx, node->type, node->ne[0], 1, input->ne[2]);
        copy->op = node->op;
        std::memcpy(copy->op_params, node->op_params, sizeof(copy->op_params));
        for (int i = 0; i < GGML_MAX_SRC && node->src[i]; ++i) {
            copy->src[i] = of(node->src[i], depth + 1);
        }
        return copy;
    }

    // Replace the slots that the graph reads by the host weights.
    ggml_tensor * weight(const ggml_tensor * slots) {
        for (const Role role : { role_up, role_gate, role_down, role_gate_up }) {
            if (slots == store.tensor(block.group, role)) {
                reached_down = reached_down || role == role_down;
                if (!ExpertMatmul::knows(block.weights[role])) {
                    unsupported(block.weights[role]);
                }
                return const_cast<ggml_tensor *>(block.weights[role]);
            }
        }
        unsupported(slots);
    }

    ggml_tensor * leaf(const ggml_tensor * node) {
        const ggml_tensor * found = llama_model_find_tensor(owner.model_, original_name(node).c_str());
        if (!found || !found->buffer) {
            unsupported(node);
        }
        return owner.on_host(found);
    }
};

ggml_tensor * CpuExperts::on_host(const ggml_tensor * tensor) {
    if (ggml_backend_buffer_is_host(tensor->buffer)) {
        return const_cast<ggml_tensor *>(tensor);
    }
    Leaf & leaf = leaves_[tensor];
    if (!leaf.tensor) {
        leaf.ctx.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
        leaf.tensor = ggml_dup_tensor(leaf.ctx.get(), tensor);
        leaf.data.resize(ggml_nbytes(tensor));
        ggml_backend_tensor_get(tensor, leaf.data.data(), 0, leaf.data.size());
        leaf.tensor->data = leaf.data.data();
    }
    return leaf.tensor;
}

ExpertChain CpuExperts::find(ggml_cgraph * graph, const ggml_tensor * route, const ExpertBlock & block,
                             const SlotStore & store) {
    const int n = ggml_graph_n_nodes(graph);
    int i = 0;
    while (i < n && ggml_graph_node(graph, i) != route) {
        ++i;
    }
    const int first = i;
    ExpertChain chain;
    for (; i < n && !chain.output; ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (!chain.input && node->op == GGML_OP_MUL_MAT_ID) { // up or gate_up reads the block's input
            chain.input = node->src[1];
        }
        if (node->op == GGML_OP_MUL && std::strncmp(node->name, "ffn_moe_weighted", 16) == 0) {
            chain.output = node->src[0];
        }
    }
    // Rows that the graph computes later cannot be read together with the ids.
    const ggml_tensor * source = chain.input;
    while (source && source->view_src) {
        source = source->view_src;
    }
    for (int later = first; source && later < n; ++later) {
        if (ggml_graph_node(graph, later) == source) {
            throw Error(EDGE_ERR_UNSUPPORTED, "hybrid execution does not know this feed-forward: use on_miss=fetch");
        }
    }
    if (!chain.input || !chain.output || chain.input->type != GGML_TYPE_F32 || chain.input->ne[1] != 1 ||
        !ggml_is_contiguous(chain.input) || !ggml_is_contiguous(chain.output)) {
        throw Error(EDGE_ERR_UNSUPPORTED, "hybrid execution does not know this feed-forward: use on_miss=fetch");
    }
    std::vector<uint8_t> memory(nodes_.size()); // a trial, so that an unknown operation fails here and not in a step
    const ggml_context_ptr ctx(ggml_init({ memory.size(), memory.data(), true }));
    ggml_tensor * input = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, chain.input->ne[0], 1, 1);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, 1);
    made_.clear();
    Clone clone{ *this, block, store, chain, ctx.get(), input, ids };
    clone.of(chain.output);
    if (!clone.reached_down) {
        throw Error(EDGE_ERR_UNSUPPORTED, "hybrid execution does not know this feed-forward: use on_miss=fetch");
    }
    return chain;
}

void CpuExperts::compute(const ExpertChain & chain, const ExpertBlock & block, const SlotStore & store,
                         const float * input, const std::vector<Pair> & pairs, float * out) {
    const int64_t n_pairs = static_cast<int64_t>(pairs.size());
    ggml_reset(ctx_.get());
    ggml_tensor * rows = ggml_new_tensor_3d(ctx_.get(), GGML_TYPE_F32, chain.input->ne[0], 1, n_pairs);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx_.get(), GGML_TYPE_I32, 1, n_pairs);
    made_.clear();
    Clone clone{ *this, block, store, chain, ctx_.get(), rows, ids };
    ggml_tensor * output = clone.of(chain.output);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx_.get(), max_nodes, false);
    ggml_build_forward_expand(graph, output);
    place(graph, rows, ids, output, out);

    const auto n_embd = static_cast<size_t>(chain.input->ne[0]);
    for (size_t i = 0; i < pairs.size(); ++i) {
        std::memcpy(static_cast<float *>(rows->data) + i * n_embd, input + static_cast<size_t>(pairs[i].token) * n_embd,
                    n_embd * sizeof(float));
        static_cast<int32_t *>(ids->data)[i] = pairs[i].expert;
    }
    matmul_.begin(static_cast<const int32_t *>(ids->data), pairs.size());
    compute_nodes(graph, ggml_new_graph_custom(ctx_.get(), max_nodes, false));
}

bool CpuExperts::knows(const ExpertBlock & block) const {
    return std::all_of(block.weights.begin(), block.weights.end(),
                       [](const ggml_tensor * w) { return !w || ExpertMatmul::knows(w); });
}

void CpuExperts::compute_some(const ExpertBlock & block, int32_t expert, int32_t n_tokens) {
    const auto weights = [&](Role role) { return const_cast<ggml_tensor *>(block.weights[role]); };
    ggml_tensor * first = weights(block.weights[role_gate_up] ? role_gate_up : role_up);
    ggml_tensor * down = weights(role_down);
    ggml_reset(ctx_.get());
    ggml_tensor * rows = ggml_new_tensor_3d(ctx_.get(), GGML_TYPE_F32, first->ne[0], 1, n_tokens);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx_.get(), GGML_TYPE_I32, 1, n_tokens);
    ggml_cgraph * graph = ggml_new_graph_custom(ctx_.get(), max_nodes, false);
    if (block.weights[role_gate]) {
        ggml_build_forward_expand(graph, ggml_mul_mat_id(ctx_.get(), weights(role_gate), rows, ids));
    }
    ggml_tensor * inner = ggml_mul_mat_id(ctx_.get(), first, rows, ids);
    inner = ggml_view_3d(ctx_.get(), inner, down->ne[0], 1, n_tokens, inner->nb[1], inner->nb[2], 0); // half of gate_up
    ggml_tensor * output = ggml_mul_mat_id(ctx_.get(), down, inner, ids);
    ggml_build_forward_expand(graph, output);
    std::vector<float> out(static_cast<size_t>(ggml_nelements(output)));
    place(graph, rows, ids, output, out.data());
    std::memset(rows->data, 0, ggml_nbytes(rows));
    std::fill_n(static_cast<int32_t *>(ids->data), n_tokens, expert);
    matmul_.begin(static_cast<const int32_t *>(ids->data), static_cast<size_t>(n_tokens));
    compute_nodes(graph, ggml_new_graph_custom(ctx_.get(), max_nodes, false));
}

// Alternate between all products whose rows are there and the nodes up to the next products.
void CpuExperts::compute_nodes(ggml_cgraph * graph, ggml_cgraph * between) {
    const int n = ggml_graph_n_nodes(graph);
    std::array<bool, max_nodes> done{};
    const auto is_there = [&](const ggml_tensor * source) {
        for (int i = 0; i < n; ++i) {
            if (ggml_graph_node(graph, i) == source) {
                return done[static_cast<size_t>(i)];
            }
        }
        return true; // weights and inputs
    };
    const auto is_ready = [&](const ggml_tensor * node) {
        return std::all_of(node->src, node->src + GGML_MAX_SRC,
                           [&](const ggml_tensor * s) { return !s || is_there(s); });
    };
    for (int left = n; left > 0;) {
        std::array<bool, max_nodes> ready{};
        for (int i = 0; i < n; ++i) {
            ggml_tensor * node = ggml_graph_node(graph, i);
            if (!done[static_cast<size_t>(i)] && node->op == GGML_OP_MUL_MAT_ID && is_ready(node)) {
                ready[static_cast<size_t>(i)] = true;
                matmul_.add(node);
                --left;
            }
        }
        matmul_.run();
        std::transform(done.begin(), done.end(), ready.begin(), done.begin(), std::logical_or<>());
        ggml_graph_clear(between);
        for (int i = 0; i < n; ++i) {
            ggml_tensor * node = ggml_graph_node(graph, i);
            if (!done[static_cast<size_t>(i)] && node->op != GGML_OP_MUL_MAT_ID && is_ready(node)) {
                done[static_cast<size_t>(i)] = true;
                ggml_graph_add_node(between, node);
                --left;
            }
        }
        if (ggml_graph_n_nodes(between) > 0 &&
            ggml_backend_graph_compute(backend_.get(), between) != GGML_STATUS_SUCCESS) {
            throw Error(EDGE_ERR_BACKEND, "computing missing experts on the CPU failed");
        }
    }
}

// Assign memory to every tensor of the graph: `out` to the output, our own to the others.
void CpuExperts::place(ggml_cgraph * graph, ggml_tensor * rows, ggml_tensor * ids, ggml_tensor * output, float * out) {
    const auto padded = [](const ggml_tensor * t) { return t->view_src ? 0 : GGML_PAD(ggml_nbytes(t), alignment); };
    const int n = ggml_graph_n_nodes(graph);
    size_t needed = alignment + padded(rows) + padded(ids);
    for (int i = 0; i < n; ++i) {
        needed += padded(ggml_graph_node(graph, i));
    }
    if (data_.size() < needed) {
        data_.resize(needed);
    }
    auto * at = reinterpret_cast<uint8_t *>(GGML_PAD(reinterpret_cast<uintptr_t>(data_.data()), alignment));
    const auto give = [&](ggml_tensor * t) {
        t->data = t->view_src ? static_cast<uint8_t *>(t->view_src->data) + t->view_offs : at;
        at += padded(t);
    };
    give(rows);
    give(ids);
    for (int i = 0; i < n; ++i) {
        give(ggml_graph_node(graph, i));
    }
    output->data = out;
}

} // namespace edge
