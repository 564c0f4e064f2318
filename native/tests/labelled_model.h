// The experts of a small model, without the model, for tests of slots.
#pragma once

#include "check.h"
#include "slots/slot_store.h"
#include "util/expert_table.h"

#include "ggml-alloc.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace labelled {

constexpr int32_t n_blocks = 6;
constexpr int32_t n_expert = 16;
constexpr int32_t columns = 32;
const std::array<edge::Role, 3> roles{ edge::role_up, edge::role_gate, edge::role_down };

// Every weight of an expert is block * 1000 + expert, so that a slot's content tells its expert; every third block has
// longer ones.
struct Model {
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buffer;
    edge::ExpertTable table;

    explicit Model(ggml_backend_buffer_type_t buft) {
        ggml_init_params params{};
        params.mem_size = ggml_tensor_overhead() * roles.size() * n_blocks;
        params.no_alloc = true;
        ctx.reset(ggml_init(params));
        std::vector<edge::BlockWeights> blocks(n_blocks);
        for (size_t block = 0; block < blocks.size(); ++block) {
            for (const edge::Role role : roles) {
                blocks[block][role] =
                    ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, block % 3 == 2 ? 48 : 32, columns, n_expert);
            }
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        table.n_expert = n_expert;
        table.n_expert_used = 4;
        for (size_t block = 0; block < blocks.size(); ++block) {
            for (const edge::Role role : roles) {
                fill(blocks[block][role], static_cast<int32_t>(block));
            }
            table.add(blocks[block]);
        }
        CHECK(table.groups.size() == 2 && table.blocks.size() == n_blocks);
    }

    static void fill(const ggml_tensor * weight, int32_t block) {
        for (int32_t expert = 0; expert < n_expert; ++expert) {
            char * data = static_cast<char *>(weight->data) + weight->nb[2] * static_cast<size_t>(expert);
            std::fill_n(reinterpret_cast<float *>(data), weight->nb[2] / sizeof(float),
                        static_cast<float>(block * 1000 + expert));
        }
    }
};

// What a kernel of a block reads from a slot.
struct Read {
    int32_t block;
    int32_t group;
    int32_t expert;
    int32_t slot;
};

inline bool is_right(const edge::SlotStore & store, const Read & read) {
    const auto expected = static_cast<float>(read.block * 1000 + read.expert);
    return std::all_of(roles.begin(), roles.end(), [&](edge::Role role) {
        const ggml_tensor * tensor = store.tensor(read.group, role);
        const size_t n = tensor->nb[2] / sizeof(float);
        const float * data = static_cast<const float *>(tensor->data) + n * static_cast<size_t>(read.slot);
        return data[0] == expected && data[n / 4] == expected && data[n / 2] == expected && data[n - 1] == expected;
    });
}

} // namespace labelled
