// Passes over all experts that policies make. Each array is read once, block by block, in loops that a compiler
// vectorises: between two decodes all of it comes from memory.
#include "policy/policy_kernels.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

namespace edge {

namespace {

// Mark the experts of a block that tokens [from, to) chose.
void mark(uint8_t * marks, int32_t n_expert, const edge_routing & routing, int32_t block, int32_t from, int32_t to) {
    std::memset(marks, 0, count(n_expert));
    const int32_t * row = routing.ids + count(block) * count(routing.stride);
    const int32_t * end = row + count(to) * count(routing.n_used); // marks may alias n_used
    for (const int32_t * id = row + count(from) * count(routing.n_used); id < end; ++id) {
        marks[*id] = 1;
    }
}

uint64_t word_at(const uint8_t * marks) {
    uint64_t word = 0;
    std::memcpy(&word, marks, sizeof word);
    return word;
}

// Count common marks, eight at a time, each in a separate byte until that byte could overflow.
int32_t overlap(const uint8_t * a, const uint8_t * b, int32_t n) {
    constexpr uint64_t even = 0x00FF00FF00FF00FFU;
    int32_t out = 0;
    int32_t i = 0;
    while (i + 8 <= n) {
        uint64_t sums = 0;
        for (const int32_t to = std::min(n, i + 255 * 8); i + 8 <= to; i += 8) {
            sums += word_at(a + i) & word_at(b + i);
        }
        out += static_cast<int32_t>((((sums & even) + (sums >> 8U & even)) * 0x0001000100010001U) >> 48U);
    }
    for (; i < n; ++i) {
        out += a[i] & b[i];
    }
    return out;
}

int32_t sum(const uint8_t * marks, int32_t n) { return overlap(marks, marks, n); }

// In eight lanes, since a compiler may not reorder the additions itself.
float sum(const float * values, int32_t n) {
    constexpr int32_t lanes = 8;
    float sums[lanes] = {};
    int32_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int32_t lane = 0; lane < lanes; ++lane) {
            sums[lane] += values[i + lane];
        }
    }
    for (; i < n; ++i) {
        sums[0] += values[i];
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

void invert(float * to, const float * from, int32_t n) {
    for (int32_t i = 0; i < n; ++i) {
        to[i] = 1.0F / from[i];
    }
}

void subtract_from(float * to, float from, const float * values, int32_t n) {
    for (int32_t i = 0; i < n; ++i) {
        to[i] = from - values[i];
    }
}

// Write the indices of the marked entries; `to` needs room for one more.
template <typename Marked> int32_t places(int32_t * to, int32_t n, Marked && marked) {
    int32_t found = 0;
    for (int32_t i = 0; i < n; ++i) {
        to[found] = i;
        found += static_cast<int32_t>(marked(i));
    }
    return found;
}

// Integers in the order of the floats, and among equal floats in the order of the indices.
uint64_t rank(float score, int32_t place) {
    uint32_t bits = 0;
    std::memcpy(&bits, &score, sizeof bits);
    bits ^= (bits >> 31U) != 0 ? 0xFFFFFFFFU : 0x80000000U;
    return uint64_t{ bits } << 32U | static_cast<uint32_t>(place);
}

// Drop at most n of these candidates, those of lowest score, and return their number. n is small.
int32_t drop(edge_pool & pool, const int32_t * candidates, int32_t n_candidates, const float * score, int32_t n) {
    std::vector<uint64_t> least; // a heap, the highest at the front
    least.reserve(count(n));
    int32_t i = 0;
    for (; i < std::min(n, n_candidates); ++i) {
        least.push_back(rank(score[candidates[i]], candidates[i]));
    }
    std::make_heap(least.begin(), least.end());
    for (; i < n_candidates; ++i) {
        const uint64_t next = rank(score[candidates[i]], candidates[i]);
        if (next < least.front()) {
            std::pop_heap(least.begin(), least.end());
            least.back() = next;
            std::push_heap(least.begin(), least.end());
        }
    }
    for (const uint64_t gone : least) {
        pool.kept[gone & 0xFFFFFFFFU] = 0;
    }
    return static_cast<int32_t>(least.size());
}

// Update the rates from what a prediction's set demanded.
void learn(const edge_prediction & prediction, int32_t n_demanded) {
    edge_rates & rates = *prediction.rates;
    const double gain = 1.0 - rates.smoothing;
    if (prediction.n_found > 0) {
        rates.inside += gain * (static_cast<double>(prediction.n_demanded) / prediction.n_found - rates.inside);
    }
    if (prediction.others > 0.0) {
        rates.outside += gain * ((n_demanded - prediction.n_demanded) / prediction.others - rates.outside);
    }
}

double chance_inside(const edge_prediction & prediction) {
    return std::min(prediction.rates->inside, prediction.rates->max_inside);
}
double share_outside(const edge_prediction & prediction) {
    return std::min(prediction.rates->outside, prediction.rates->max_outside);
}

// Scores of a rule on the sampled blocks.
void score_by_rule(const edge_dueling & dueling, int32_t rule, float * score) {
    for (int32_t block = 0; block < dueling.n_blocks; block += dueling.stride, score += dueling.n_expert) {
        const size_t first = count(block) * count(dueling.n_expert);
        const float * frequency =
            dueling.frequency + count(rule - 1) * count(dueling.n_blocks) * count(dueling.n_expert) + first;
        scale_and_add(score, frequency, dueling.latest + first, dueling.n_expert, 1.0F, 1.0F, dueling.last);
    }
}

// Judge the rules by what was known before the step. If the step demands more than the slots hold, LRU evicts exactly
// the experts that the step demands next. Pools that see whole steps cannot show that, so all demands count as missed.
void judge(edge_dueling & dueling, const std::vector<uint8_t> & wanted) {
    std::vector<float> score(wanted.size());
    const int32_t n_wanted = sum(wanted.data(), static_cast<int32_t>(wanted.size()));
    dueling.weight = std::min(dueling.weight + 1.0, 1.0 / (1.0 - dueling.smoothing));
    int32_t best = 0;
    for (int32_t rule = 0; rule < dueling.n_rules; ++rule) {
        if (rule > 0) {
            score_by_rule(dueling, rule, score.data());
        }
        const int32_t missed =
            demand_of_pool(dueling.pools[rule], wanted.data(), rule > 0 ? score.data() : dueling.used);
        const bool all = rule == 0 && n_wanted > dueling.pools[rule].size;
        const double share = all ? 1.0 : static_cast<double>(missed) / std::max(1, n_wanted);
        dueling.missed[rule] += (share - dueling.missed[rule]) / dueling.weight;
        best = dueling.missed[rule] < dueling.missed[best] ? rule : best;
    }
    if (dueling.missed[best] < (1.0 - dueling.hysteresis) * dueling.missed[dueling.best]) {
        dueling.best = best;
    }
}

// Work space for one block's experts.
struct Rows {
    explicit Rows(int32_t n) : memory(3 * count(n)), after(memory.data()), wait(after + n), others(wait + n) {}
    std::vector<float> memory;
    float * after; // frequency as expected after the coming step
    float * wait;
    float * others; // of the experts that are not marked
};

// Waits after the coming step, given its predicted set. One loop over arrays that do not overlap takes half the time of
// one loop per line.
void wait_after(float * __restrict after, float * __restrict wait, float * __restrict others,
                const float * __restrict frequency, const uint8_t * __restrict found, int32_t n, float outside,
                float inside, float added) {
    for (int32_t i = 0; i < n; ++i) {
        const auto is_inside = static_cast<float>(found[i]);
        others[i] = frequency[i] * (1.0F - is_inside);
        after[i] = frequency[i] * (outside + is_inside * (inside - outside)) + is_inside * added;
        wait[i] = 1.0F / after[i];
    }
}

// outside: 1 / after + spared; inside: 1 + (1 - chance) / after
void wait_beyond(float * __restrict wait, float * __restrict others, const float * __restrict after,
                 const uint8_t * __restrict later, int32_t n, float spared, float inside) {
    for (int32_t i = 0; i < n; ++i) {
        const auto is_inside = static_cast<float>(later[i]);
        others[i] = after[i] * (1.0F - is_inside);
        wait[i] = (wait[i] + spared * (1.0F - is_inside)) * (1.0F + is_inside * (inside - 1.0F)) + is_inside;
    }
}

} // namespace

namespace {

bool all_below(const edge_routing & routing, int32_t n_blocks, uint32_t most_added, uint32_t end) {
    const int64_t n = int64_t{ routing.n_tokens } * routing.n_used;
    if (routing.ids == nullptr || routing.n_blocks != n_blocks || routing.n_tokens < 0 || routing.n_used < 0 ||
        routing.stride < n) {
        return false;
    }
    uint32_t most = 0; // negative ids are large
    for (int32_t block = 0; block < n_blocks; ++block) {
        const int32_t * ids = routing.ids + count(block) * count(routing.stride);
        for (int64_t i = 0; i < n; ++i) {
            most = std::max(most, static_cast<uint32_t>(ids[i]) + most_added);
        }
    }
    return n == 0 || most < end;
}

} // namespace

void scale_and_add(float * to, const float * from, const uint8_t * marks, int32_t n, float outside, float inside,
                   float added) {
    for (int32_t i = 0; i < n; ++i) {
        const auto is_inside = static_cast<float>(marks[i]);
        to[i] = from[i] * (outside + is_inside * (inside - outside)) + is_inside * added;
    }
}

bool is_valid_routing(const edge_routing & routing, int32_t n_blocks, int32_t n_expert) {
    return all_below(routing, n_blocks, 0, static_cast<uint32_t>(n_expert));
}

bool is_valid_or_unknown_routing(const edge_routing & routing, int32_t n_blocks, int32_t n_expert) {
    return all_below(routing, n_blocks, 1, static_cast<uint32_t>(n_expert) + 1);
}

int32_t demand_of_pool(edge_pool & pool, const uint8_t * wanted, const float * score) {
    const int32_t n = pool.n;
    int32_t missed = 0;
    for (int32_t i = 0; i < n; ++i) {
        missed += wanted[i] & (pool.kept[i] ^ 1);
    }
    if (missed == 0) {
        return 0;
    }
    std::vector<int32_t> candidates(count(n) + 1);
    int32_t over = pool.n_kept + missed - pool.size;
    if (over > 0) {
        const int32_t found = places(candidates.data(), n, [&](int32_t i) { return pool.kept[i] & (wanted[i] ^ 1); });
        over -= drop(pool, candidates.data(), found, score, over);
    }
    for (int32_t i = 0; i < n; ++i) {
        pool.kept[i] |= wanted[i];
    }
    if (over > 0) {
        const int32_t found = places(candidates.data(), n, [&](int32_t i) { return pool.kept[i]; });
        drop(pool, candidates.data(), found, score, over);
    }
    pool.n_kept = std::min(pool.n_kept + missed, pool.size);
    return missed;
}

void score_by_best_rule(const edge_dueling & dueling, float * scores) {
    const size_t n_keys = count(dueling.n_blocks) * count(dueling.n_expert);
    if (dueling.best == 0) { // all equal: recency decides
        std::fill(scores, scores + n_keys, 0.0F);
        return;
    }
    const float * frequency = dueling.frequency + count(dueling.best - 1) * n_keys;
    scale_and_add(scores, frequency, dueling.latest, static_cast<int32_t>(n_keys), 1.0F, 1.0F, dueling.last);
}

void observe_dueling(edge_dueling & dueling, const edge_routing & routing) {
    const int32_t n_expert = dueling.n_expert;
    const size_t n_keys = count(dueling.n_blocks) * count(n_expert);
    const int32_t n_sampled = (dueling.n_blocks + dueling.stride - 1) / dueling.stride;
    std::vector<uint8_t> wanted(count(n_sampled) * count(n_expert));
    for (int32_t i = 0; i < n_sampled; ++i) {
        mark(wanted.data() + count(i) * count(n_expert), n_expert, routing, i * dueling.stride, 0, routing.n_tokens);
    }
    judge(dueling, wanted);
    ++dueling.n_steps;
    for (int32_t i = 0; i < n_sampled; ++i) {
        const float now = static_cast<float>(dueling.n_steps) +
                          static_cast<float>(i * dueling.stride) / static_cast<float>(dueling.n_blocks);
        float * used = dueling.used + count(i) * count(n_expert);
        const uint8_t * marks = wanted.data() + count(i) * count(n_expert);
        scale_and_add(used, used, marks, n_expert, 1.0F, 0.0F, now);
    }
    for (int32_t block = 0; block < dueling.n_blocks; ++block) {
        mark(dueling.latest + count(block) * count(n_expert), n_expert, routing, block, 0, routing.n_tokens);
    }
    for (int32_t rule = 1; rule < dueling.n_rules; ++rule) {
        const float decay = dueling.decays[rule - 1];
        float * frequency = dueling.frequency + count(rule - 1) * n_keys;
        scale_and_add(frequency, frequency, dueling.latest, static_cast<int32_t>(n_keys), decay, decay, 1.0F - decay);
    }
}

void plan_next_use(edge_next_use & next_use, const edge_routing * routing, int32_t width, edge_prediction * now,
                   edge_prediction * then, float * scores) {
    const int32_t n = next_use.n_expert;
    Rows rows(n);
    std::vector<int32_t> found_experts(count(n) + 1);
    for (edge_prediction * prediction : { now, then }) {
        if (prediction) {
            prediction->others = 0.0;
            prediction->n_found = 0;
        }
    }
    edge_prefetch_request * request = next_use.requests;
    for (int32_t block = 0; block < next_use.n_blocks; ++block) {
        const size_t first = count(block) * count(n);
        const float * frequency = next_use.frequency + first;
        const auto turn = static_cast<float>(static_cast<double>(block) / next_use.n_blocks);
        if (!now) {
            invert(rows.wait, frequency, n);
            subtract_from(scores + first, -turn, rows.wait, n);
            continue;
        }
        const auto inside = static_cast<float>(chance_inside(*now));
        const float gained = 1.0F - next_use.decay;
        uint8_t * found = now->found + first;
        mark(found, n, *routing, block, 0, std::min(width, routing->n_tokens));
        wait_after(rows.after, rows.wait, rows.others, frequency, found, n,
                   next_use.decay + gained * static_cast<float>(share_outside(*now)), next_use.decay, gained * inside);
        now->others += static_cast<double>(sum(rows.others, n));
        if (then) {
            uint8_t * later = then->found + first;
            mark(later, n, *routing, block, width, std::min(2 * width, routing->n_tokens));
            then->n_found += sum(later, n);
            wait_beyond(rows.wait, rows.others, rows.after, later, n, static_cast<float>(1.0 - share_outside(*then)),
                        static_cast<float>(1.0 - chance_inside(*then)));
            then->others += static_cast<double>(sum(rows.others, n));
        }
        subtract_from(scores + first, -turn, rows.wait, n);
        const int32_t n_found = places(found_experts.data(), n, [found](int32_t i) { return found[i]; });
        for (int32_t i = 0; i < n_found; ++i) {
            const int32_t expert = found_experts[count(i)];
            request[i] = { block, expert, block, inside * rows.wait[expert] };
        }
        request += n_found;
        now->n_found += n_found;
    }
}

void observe_next_use(edge_next_use & next_use, const edge_routing & routing, edge_prediction * now,
                      edge_prediction * then, const uint8_t * foreseen) {
    const int32_t n = next_use.n_expert;
    const float gained = 1.0F - next_use.decay;
    next_use.n_demanded = 0;
    for (edge_prediction * prediction : { now, then }) {
        if (prediction) {
            prediction->n_demanded = 0;
        }
    }
    for (int32_t block = 0; block < next_use.n_blocks; ++block) {
        const size_t first = count(block) * count(n);
        uint8_t * demanded = next_use.demanded + first;
        mark(demanded, n, routing, block, 0, routing.n_tokens);
        float * frequency = next_use.frequency + first;
        scale_and_add(frequency, frequency, demanded, n, next_use.decay, next_use.decay, gained);
        for (int32_t i = 0; i < n; ++i) {
            frequency[i] = std::max(frequency[i], next_use.min_frequency);
        }
        const int32_t n_demanded = sum(demanded, n);
        next_use.n_demanded += n_demanded;
        for (edge_prediction * prediction : { now, then }) {
            if (prediction) {
                prediction->n_demanded += overlap(prediction->found + first, demanded, n);
            }
        }
        if (foreseen) {
            int64_t * tally = next_use.tally + block;
            tally[0] += sum(foreseen + first, n);
            tally[next_use.n_blocks] += n_demanded;
            tally[2 * next_use.n_blocks] += overlap(foreseen + first, demanded, n);
        }
    }
    for (const edge_prediction * prediction : { now, then }) {
        if (prediction) {
            learn(*prediction, next_use.n_demanded);
        }
    }
}

} // namespace edge
