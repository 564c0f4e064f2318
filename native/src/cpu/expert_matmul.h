#pragma once

#include "cpu/thread_pool.h"

#include "ggml-cpp.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace edge {

// Products of experts' matrices and rows, bit for bit those of ggml's kernels for a single token, on our own threads.
// ggml's threads synchronise between any two nodes; these only when a result is needed.
class ExpertMatmul {
public:
    explicit ExpertMatmul(size_t n_threads) : thread_pool_(n_threads) {}

    static bool knows(const ggml_tensor * weights); // [n_in, n_out, n_expert]

    void wake() { thread_pool_.wake(); }
    void begin(const int32_t * experts, size_t n_pairs); // the expert of each row

    // Add a MUL_MAT_ID node of weights and [n_in, 1, n_pairs] F32, all in memory, with its source computed. run()
    // computes all added nodes.
    void add(ggml_tensor * node) { added_.push_back(node); }
    void run();

private:
    struct Group { // pairs of one expert
        int32_t expert;
        size_t first, end; // in order_
    };
    struct Conversion { // rows in the type of the weights' kernel
        const ggml_tensor * source;
        ggml_type type;
        size_t row_size, offset; // bytes, in converted_
    };

    size_t conversion_for(const ggml_tensor * source, ggml_type type);
    void convert(const Conversion & conversion, size_t pair);
    void multiply(const ggml_tensor * node, size_t conversion, const Group & group, size_t first_row) const;

    ThreadPool thread_pool_;
    std::vector<int32_t> order_; // pairs by expert
    std::vector<Group> groups_;
    std::vector<ggml_tensor *> added_;
    std::vector<size_t> conversion_of_; // of each added node
    std::vector<Conversion> conversions_; // since begin()
    std::vector<uint8_t> converted_;
};

} // namespace edge
