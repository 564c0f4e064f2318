#include "cpu/expert_matmul.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <numeric>

namespace edge {

namespace {

constexpr size_t alignment = 64; // bytes
constexpr size_t rows_at_once = 32; // of a matrix, some 50 KB: one chunk

const ggml_type_traits_cpu & traits(ggml_type type) { return *ggml_get_type_traits_cpu(type); }

size_t n_blocks(const ggml_tensor * node) {
    return (static_cast<size_t>(node->ne[0]) + rows_at_once - 1) / rows_at_once;
}

} // namespace

bool ExpertMatmul::knows(const ggml_tensor * weights) {
    return traits(weights->type).vec_dot && traits(traits(weights->type).vec_dot_type).from_float &&
           weights->nb[0] == ggml_type_size(weights->type);
}

void ExpertMatmul::begin(const int32_t * experts, size_t n_pairs) {
    added_.clear();
    conversions_.clear();
    groups_.clear();
    order_.resize(n_pairs);
    std::iota(order_.begin(), order_.end(), 0);
    std::sort(order_.begin(), order_.end(),
              [&](int32_t a, int32_t b) { return experts[a] != experts[b] ? experts[a] < experts[b] : a < b; });
    for (size_t i = 0; i < n_pairs; ++i) {
        if (groups_.empty() || groups_.back().expert != experts[order_[i]]) {
            groups_.push_back({ experts[order_[i]], i, i });
        }
        groups_.back().end = i + 1;
    }
}

size_t ExpertMatmul::conversion_for(const ggml_tensor * source, ggml_type type) {
    const auto same = [&](const Conversion & c) { return c.source == source && c.type == type; };
    const auto known = std::find_if(conversions_.begin(), conversions_.end(), same);
    if (known == conversions_.end()) {
        const size_t end =
            conversions_.empty() ? 0 : conversions_.back().offset + conversions_.back().row_size * order_.size();
        conversions_.push_back({ source, type, ggml_row_size(type, source->ne[0]), GGML_PAD(end, alignment) });
        return conversions_.size() - 1;
    }
    return static_cast<size_t>(known - conversions_.begin());
}

void ExpertMatmul::convert(const Conversion & conversion, size_t pair) {
    const auto * row = reinterpret_cast<const float *>(static_cast<const char *>(conversion.source->data) +
                                                       pair * conversion.source->nb[2]);
    traits(conversion.type)
        .from_float(row, converted_.data() + conversion.offset + pair * conversion.row_size, conversion.source->ne[0]);
}

// Multiply some rows of an expert's matrix, each once for all its pairs.
void ExpertMatmul::multiply(const ggml_tensor * node, size_t conversion, const Group & group, size_t first_row) const {
    const ggml_tensor * weights = node->src[0];
    const Conversion & rows = conversions_[conversion];
    const auto n_in = static_cast<int>(weights->ne[0]);
    const size_t end = std::min(first_row + rows_at_once, static_cast<size_t>(node->ne[0]));
    const char * matrix = static_cast<const char *>(weights->data) + static_cast<size_t>(group.expert) * weights->nb[2];
    const ggml_vec_dot_t dot = traits(weights->type).vec_dot;
    for (size_t row = first_row; row < end; ++row) {
        for (size_t i = group.first; i < group.end; ++i) {
            const auto pair = static_cast<size_t>(order_[i]);
            auto * out = reinterpret_cast<float *>(static_cast<char *>(node->data) + pair * node->nb[2]) + row;
            dot(n_in, out, 0, matrix + row * weights->nb[1], 0, converted_.data() + rows.offset + pair * rows.row_size,
                0, 1);
        }
    }
}

void ExpertMatmul::run() {
    const size_t known = conversions_.size();
    conversion_of_.clear();
    size_t n_chunks = 0;
    for (const ggml_tensor * node : added_) {
        conversion_of_.push_back(conversion_for(node->src[1], traits(node->src[0]->type).vec_dot_type));
        n_chunks += n_blocks(node) * groups_.size();
    }
    if (!conversions_.empty()) {
        const size_t needed = conversions_.back().offset + conversions_.back().row_size * order_.size();
        converted_.resize(std::max(converted_.size(), needed));
    }
    const auto convert_row = [&](size_t chunk) {
        convert(conversions_[known + chunk / order_.size()], chunk % order_.size());
    };
    thread_pool_.run((conversions_.size() - known) * order_.size(), convert_row);
    const auto multiply_some = [&](size_t chunk) {
        size_t which = 0;
        for (; chunk >= n_blocks(added_[which]) * groups_.size(); ++which) {
            chunk -= n_blocks(added_[which]) * groups_.size();
        }
        const size_t blocks = n_blocks(added_[which]);
        multiply(added_[which], conversion_of_[which], groups_[chunk / blocks], chunk % blocks * rows_at_once);
    };
    thread_pool_.run(n_chunks, multiply_some);
    added_.clear();
}

} // namespace edge
