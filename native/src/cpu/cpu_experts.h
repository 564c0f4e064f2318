#pragma once

#include "cpu/expert_matmul.h"
#include "slots/slot_store.h"
#include "util/expert_table.h"

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

// One block's feed-forward in a graph, from the rows that enter it to the experts' unweighted outputs.
struct ExpertChain {
    ggml_tensor * input = nullptr; // [n_embd, 1, n_tokens] F32
    ggml_tensor * output = nullptr; // [n_embd, n_expert_used, n_tokens] F32
};

// Computes missing experts on the CPU, from their host weights. It clones the graph's own nodes, with (token, expert)
// pairs as tokens that use one expert each, so activations, clamps and biases are the architecture's.
class CpuExperts {
public:
    CpuExperts(const llama_model * model, int32_t n_threads);

    // Return the chain that follows a block's route node. Throws EDGE_ERR_UNSUPPORTED if an operation cannot be cloned.
    ExpertChain find(ggml_cgraph * graph, const ggml_tensor * route, const ExpertBlock & block,
                     const SlotStore & store);

    void wake() { matmul_.wake(); } // compute() follows soon

    // Write the experts' outputs, [n_pairs, n_embd], to out. input: [n_tokens, n_embd].
    void compute(const ExpertChain & chain, const ExpertBlock & block, const SlotStore & store, const float * input,
                 const std::vector<Pair> & pairs, float * out);

    // Compute the products of one expert and zeros, to measure their time.
    bool knows(const ExpertBlock & block) const; // whether that is possible
    void compute_some(const ExpertBlock & block, int32_t expert, int32_t n_tokens);

private:
    struct Clone;

    const llama_model * model_;
    ExpertMatmul matmul_;
    ggml_backend_ptr backend_; // one thread, for the nodes between two products
    // A bias on the device, copied once.
    struct Leaf {
        ggml_context_ptr ctx;
        std::vector<uint8_t> data;
        ggml_tensor * tensor = nullptr;
    };
    ggml_tensor * on_host(const ggml_tensor * tensor);
    void place(ggml_cgraph * graph, ggml_tensor * rows, ggml_tensor * ids, ggml_tensor * output, float * out);
    void compute_nodes(ggml_cgraph * graph, ggml_cgraph * between);

    std::unordered_map<const ggml_tensor *, Leaf> leaves_;
    std::vector<std::pair<const ggml_tensor *, ggml_tensor *>> made_; // of the clone in progress
    std::vector<uint8_t> nodes_; // memory of the cloned graph's nodes
    ggml_context_ptr ctx_; // of these nodes, reset for each computation
    std::vector<uint8_t> data_; // of their results; grows as needed
};

} // namespace edge
