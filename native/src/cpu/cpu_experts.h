#pragma once

#include "cpu/expert_matmul.h"
#include "util/expert_table.h"
#include "slots/slot_store.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

struct llama_model;

namespace edge {

// One expert of one token, at a place among the token's n_expert_used.
struct Pair {
    int32_t token;
    int32_t place;
    int32_t expert;
};

// The feed-forward of one block in a graph, from the rows that enter it to the experts' outputs before they are weighted.
struct ExpertChain {
    ggml_tensor * input  = nullptr; // [n_embd, 1, n_tokens] F32
    ggml_tensor * output = nullptr; // [n_embd, n_expert_used, n_tokens] F32
};

// Computes missing experts on the CPU, where their weights lie. What it computes is cloned from the graph's own nodes,
// with pairs as tokens that use one expert each, so activations, clamps and biases are the architecture's.
class CpuExperts {
public:
    CpuExperts(const llama_model * model, int32_t n_threads);

    // The chain that follows a block's route node. Throws EDGE_ERR_UNSUPPORTED for an operation that cannot be cloned.
    ExpertChain find(ggml_cgraph * graph, const ggml_tensor * route, const ExpertBlock & block, const SlotStore & store);

    void wake() { matmul_.wake(); } // compute() is about to be called

    // Writes the experts' outputs, [n_embd] of each pair in turn, to out. input: [n_embd] of each token.
    void compute(const ExpertChain & chain, const ExpertBlock & block, const SlotStore & store, const float * input,
                 const std::vector<Pair> & pairs, float * out);

    // The products of one expert and zeros, for how long they take.
    bool knows(const ExpertBlock & block) const; // whether that can be done
    void compute_some(const ExpertBlock & block, int32_t expert, int32_t n_tokens);

private:
    struct Clone;

    const llama_model *   model_;
    ExpertMatmul        matmul_;
    ggml_backend_ptr      backend_; // one thread, for what lies between two products
    // Biases that lie on the device, copied once.
    struct Leaf {
        ggml_context_ptr     ctx;
        std::vector<uint8_t> data;
        ggml_tensor *        tensor = nullptr;
    };
    ggml_tensor * on_host(const ggml_tensor * tensor);
    void place(ggml_cgraph * graph, ggml_tensor * rows, ggml_tensor * ids, ggml_tensor * output, float * out);
    void compute_nodes(ggml_cgraph * graph, ggml_cgraph * between);

    std::unordered_map<const ggml_tensor *, Leaf> leaves_;
    std::vector<std::pair<const ggml_tensor *, ggml_tensor *>> made_; // by the clone that is made
    std::vector<uint8_t>  nodes_;   // memory of the cloned graph's nodes
    ggml_context_ptr      ctx_;     // which they are made in, anew for each computation
    std::vector<uint8_t>  data_;    // of their results; grows to what is needed
};

} // namespace edge
