// The C ABI of edge_speq's native half: the one contract between C++ and Python.
//
// Every function returns an edge_status unless its comment says otherwise; the text of the last error of
// the calling thread is at edge_last_error(). No C++ exception crosses this boundary. Python parses this
// very file with cffi, so it holds plain C declarations, one constant a line, and no conditional parts
// besides the ones around this text.
#ifndef EDGE_SPEQ_H
#define EDGE_SPEQ_H

#include <stdbool.h>
#include <stdint.h>

#if defined(_WIN32) && defined(edge_speq_EXPORTS)
#define EDGE_API __declspec(dllexport)
#elif defined(_WIN32)
#define EDGE_API __declspec(dllimport)
#else
#define EDGE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define EDGE_ABI_VERSION 8

#define EDGE_OK 0
#define EDGE_ERR_ARGUMENT 1
#define EDGE_ERR_UNSUPPORTED 2
#define EDGE_ERR_BUDGET 3
#define EDGE_ERR_MEMORY 4
#define EDGE_ERR_BACKEND 5
#define EDGE_ERR_INTERNAL 6
#define EDGE_ERR_CANCELLED 7

#define EDGE_ABSENT 0
#define EDGE_LOADING 1
#define EDGE_RESIDENT 2
#define EDGE_PINNED 3

struct llama_model;
struct llama_context;

// --- the library -------------------------------------------------------------------------------------

EDGE_API int32_t edge_abi_version(void);           // EDGE_ABI_VERSION of the build, not a status
EDGE_API const char * edge_header_sha256(void);    // of the header that the library was built from
EDGE_API const char * edge_llama_cpp_commit(void);
EDGE_API const char * edge_last_error(void);       // of this thread, "" when none

// --- devices -----------------------------------------------------------------------------------------

typedef struct edge_device {
    char     name[64];
    char     description[128];
    int32_t  is_gpu;            // 1 for discrete and integrated GPUs, 0 for the CPU and accelerators
    int32_t  is_integrated;     // 1 for a GPU that shares the host's memory
    uint64_t free_bytes;
    uint64_t total_bytes;
} edge_device;

// Adds a ggml backend module (CUDA, Vulkan, ...) to this process.
EDGE_API int edge_backend_load(const char * path);
EDGE_API int edge_device_count(int32_t * out);
EDGE_API int edge_device_get(int32_t index, edge_device * out);

// Buffer types that expert tensors are overridden to, not statuses. The first holds mapped file pages or plain
// memory; the second is page-locked for the first GPU, whose copies are then several times as fast, and the
// same as the first where there is no GPU.
EDGE_API void * edge_cpu_buffer_type(void);
EDGE_API void * edge_host_buffer_type(void);

// --- what a model's routed experts are ---------------------------------------------------------------

// A block is one MoE feed-forward of one layer; blocks are numbered in layer order. A group is the set of
// blocks whose up, gate and down weights agree in type and shape: one slot can hold any of its experts.
typedef struct edge_experts {
    int32_t  n_blocks;          // 0: a dense model
    int32_t  n_expert;
    int32_t  n_expert_used;
    int32_t  n_groups;
    uint64_t total_bytes;       // of all routed experts
} edge_experts;

typedef struct edge_group {
    int32_t  n_blocks;
    int32_t  n_experts;         // n_blocks * n_expert
    uint64_t expert_bytes;      // gate, up and down of one expert
} edge_group;

EDGE_API int edge_model_experts(const struct llama_model * model, edge_experts * out);
EDGE_API int edge_model_block_groups(const struct llama_model * model, int32_t * out); // [n_blocks] group of each
EDGE_API int edge_model_group(const struct llama_model * model, int32_t group, edge_group * out);

// Index of the first token whose text differs between two vocabularies, -1 when they agree. One may have up
// to 128 tokens more than the other: families pad their vocabularies, and llama.cpp's own speculation allows it.
EDGE_API int edge_vocab_compare(const struct llama_model * a, const struct llama_model * b, int32_t * out);

// Bytes that a context and its model hold, split by where they are. Works on a no_alloc dry load too.
typedef struct edge_memory {
    uint64_t model_bytes;       // weights in device buffers; mapped file pages are not counted
    uint64_t context_bytes;     // KV cache and recurrent state
    uint64_t compute_bytes;
} edge_memory;

EDGE_API int edge_memory_used(const struct llama_context * ctx, bool on_gpu, edge_memory * out);

// --- the hook ----------------------------------------------------------------------------------------

typedef struct edge_hook edge_hook;

#define EDGE_COMPUTE_DEVICE 0 // in slots, after a fetch
#define EDGE_COMPUTE_HYBRID 1 // on the CPU where they lie, or fetched, whatever is done sooner together
#define EDGE_COMPUTE_AUTO 2   // hybrid where that has been faster of late

typedef struct edge_hook_params {
    int32_t         max_width;  // tokens of the widest graph that slots serve and routing is kept for
    int32_t         n_groups;   // length of slots; 0: keep routing only, experts stay where they are
    const int32_t * slots;      // [n_groups] slots of each group, at least the floor
    uint64_t        link_bytes_per_s; // slows transfers down to an emulated link; 0: the link as it is
    bool            deterministic;    // transfers take virtual time, so that counters repeat; needs the next and a link
    uint64_t        block_ns;         // virtual time that one block takes to compute
    int32_t         compute;          // where missing experts are computed: EDGE_COMPUTE_...
    int32_t         n_threads;        // of the CPU for that; 0: as many as ggml thinks
    bool            layer_ahead;      // prefetch what a block's input says of the next block; with hybrid execution only
    bool            reads_prompts;    // keep the routing of prompts for edge_hook_prompt
} edge_hook_params;

#define EDGE_PROMPT_TOKENS 64         // of a prompt, its last ones, whose routing is kept

typedef struct edge_counters {  // since the hook was attached; design glossary has the meanings
    uint64_t steps;             // graphs served by slots
    uint64_t hits;
    uint64_t misses;
    uint64_t late;
    uint64_t cpu_computed;
    uint64_t fetched;
    uint64_t prefetched;
    uint64_t prefetched_used;
    uint64_t bytes_fetched;
    uint64_t bytes_wasted;
    uint64_t stall_ns;          // virtual in deterministic mode
    uint64_t cpu_ns;            // that the CPU computed missing experts
    uint64_t failed;            // transfers that failed: prefetches dropped, demands that ended a graph
} edge_counters;

typedef struct edge_order {
    int32_t block;
    int32_t expert;
    int32_t deadline;           // dropped, unless begun, when a step reaches this block; n_blocks: never
    float   priority;           // expected uses in the coming step, on the scale of the scores
} edge_order;

// Slots that a group needs at least: every expert of one graph at once, and one to load into meanwhile.
EDGE_API int edge_slot_floor(int32_t n_expert, int32_t n_expert_used, int32_t max_width, int32_t * out);

// Attach before the model's context exists, detach after it is freed. The expert weights must lie in
// plain host memory when slots are asked for (load with expert tensors overridden to the CPU buffer type
// and use_extra_bufts = false).
EDGE_API int edge_hook_attach(struct llama_model * model, const edge_hook_params * params, edge_hook ** out);
EDGE_API int edge_hook_detach(edge_hook * hook);

// A model with slots can draft for itself, in its own context and KV cache: graphs of at most max_width tokens then compute
// with other experts, until the caller says otherwise. Their routing is kept as that of any graph, restricted routers'
// as they would have chosen; hits and misses are not counted. The caller takes the drafted positions out of the KV cache.
#define EDGE_EXPERTS_OWN 0
#define EDGE_EXPERTS_TWIN 1     // low-bit copies, all on the compute device, with edge_hook_load_twin
#define EDGE_EXPERTS_RESIDENT 2 // those in slots: the routers choose among them. To be said anew before each graph

typedef struct edge_twin_tensor { // the experts of one block in one role
    int32_t  block;
    int32_t  role;              // EDGE_ROLE_...
    int32_t  type;              // enum ggml_type
    uint64_t offset;            // bytes from the start of the file
} edge_twin_tensor;

#define EDGE_ROLE_UP 0
#define EDGE_ROLE_GATE 1
#define EDGE_ROLE_DOWN 2
#define EDGE_ROLE_GATE_UP 3

// Copies a twin's experts to the compute device. Every role that a block of the model has must be named once.
EDGE_API int edge_hook_load_twin(edge_hook * hook, const char * path, const edge_twin_tensor * tensors, int32_t n_tensors);
// Between graphs. ready: whether it was done; not where a block has too few experts in slots.
EDGE_API int edge_hook_use_experts(edge_hook * hook, int32_t which, bool * ready);

// Lossy: graphs of more than one token that slots serve run at most so many experts a block, those of the greatest sum,
// over the tokens, of what routers choose by: probabilities, in gpt-oss and llama4 logits. 0: no such bound. Between graphs.
EDGE_API int edge_hook_use_budget(edge_hook * hook, int32_t n_experts);

// Tells that the device is idle: the slots of the last block may be reused, and the routing of the last
// graph is complete. Call after the context is synchronised, also when the decode failed: an error met inside
// the graph, which ended it with llama_decode's status 2, surfaces here.
EDGE_API int edge_hook_end_step(edge_hook * hook);

// From any thread: ends the graph that runs, or the next one, at its next block. No effect without slots, on drafting
// graphs, and once everything is in slots: nothing is asked of the host then, so these run to their end.
EDGE_API int edge_hook_cancel(edge_hook * hook);

// Routing of the last graph before edge_hook_end_step: ids points to [n_blocks, max_width, n_expert_used] expert
// ids, of which the first n_tokens rows of each block are valid. n_tokens is 0 when the graph was wider than
// max_width, when its last block has fewer rows (llama.cpp drops those without logits there) or, with slots, when not
// every block was served from them. The memory belongs to the hook and
// stays at the same address.
EDGE_API int edge_hook_routing(edge_hook * hook, const int32_t ** ids, int32_t * n_tokens);

// Routing of the last tokens of the graph before, where that was wider than max_width: ids points to
// [n_blocks, EDGE_PROMPT_TOKENS, n_expert_used] expert ids, of which the last n_tokens rows of each block are those of the graph's last
// tokens; -1 where a block had fewer, as the last one has, whose other rows llama.cpp drops. n_tokens is 0 without reads_prompts,
// and while there was no such graph. To be called after edge_hook_end_step; the memory belongs to the hook.
EDGE_API int edge_hook_prompt(edge_hook * hook, const int32_t ** ids, int32_t * n_tokens);

// Whether prompts leave in slots what they want most of each block: their graphs copy these experts to the device anyway, and from there
// they get the slots of those that they want least. Off at first.
EDGE_API int edge_hook_keep_prompts(edge_hook * hook, bool on);

// What each expert is worth in the long run, [n_blocks, n_expert] expected uses, all 0 at first: the victim of an
// eviction is the expert of least worth, the least recently used among equals. The caller writes it between steps;
// edge_hook_prefetch takes it over. The memory belongs to the hook and stays at the same address.
EDGE_API int edge_hook_scores(edge_hook * hook, float ** out);

// Replaces the outstanding orders by these, most urgent first; none at all cancels them. An ordered expert that is in
// a slot is worth its priority more until its block has run; the others are loaded by a worker thread, as far as
// byte_budget goes, and evict only what is worth less than they are, by the margin. With layer_ahead the decoding thread
// sends those whose deadline is their own block, once that block is next and as far as the link would idle, in place of
// what the block's input says; they may then evict what is not wanted, as demands do. n_ordered: those that are in no
// slot. sound, or null: whether all scores were numbers; others count as 0.
EDGE_API int edge_hook_prefetch(edge_hook * hook, const edge_order * orders, int32_t n_orders, uint64_t byte_budget, float margin, int32_t * n_ordered, bool * sound);
EDGE_API int edge_hook_drain(edge_hook * hook); // waits until no order is outstanding that the worker is to bring

// Other slot counts, [n_groups], in place of the present ones: the experts of most worth are loaded again. Only
// between steps, and not while another thread decodes. Wider graphs than the slots serve take the stock path from
// then on. When the new slots cannot be allocated there are none, and every graph takes the stock path.
EDGE_API int edge_hook_resize(edge_hook * hook, const int32_t * slots, int32_t n_groups);

EDGE_API int edge_hook_counters(edge_hook * hook, edge_counters * out);
// What hybrid execution has learned of this machine; the first four are 0 before it has measured or computed anything.
typedef struct edge_costs {
    double cpu_bytes_per_s;     // expert weights that the CPU computes with, by itself
    double link_bytes_per_s;
    double contention;          // the CPU's time grows by this part of the time that both are busy
    double device_bytes_per_s;  // expert weights that the device reads; 0 where that was not measured
    double layer_ahead_precision; // part of the experts foreseen a block ahead that the block then wanted, of late
    bool   fetches_some;        // whether it fetches on demand at all: copies run beside the CPU, from page-locked memory
} edge_costs;

EDGE_API int edge_hook_costs(edge_hook * hook, edge_costs * out);
EDGE_API int edge_hook_states(edge_hook * hook, uint8_t * out); // [n_blocks, n_expert] of EDGE_ABSENT..EDGE_PINNED

#define EDGE_SPAN_DEVICE 0  // waited for the device: it computed up to this block's routing
#define EDGE_SPAN_DECIDE 1  // gave the block its slots and queued its copies
#define EDGE_SPAN_CPU 2     // the CPU computed missing experts
#define EDGE_SPAN_COPIES 3  // waited for copies
#define EDGE_SPAN_AHEAD 4   // looked at the coming block and queued copies for it

typedef struct edge_span { // of the decoding thread
    int32_t  kind;
    int32_t  block;
    uint64_t begin_ns; // steady clock
    uint64_t end_ns;
} edge_span;

// Keeps the next spans, so many; 0: none any more. Between steps, as is reading them; they stay until the next call.
EDGE_API int edge_hook_record(edge_hook * hook, int32_t n);
EDGE_API int edge_hook_spans(edge_hook * hook, const edge_span ** spans, int32_t * n);

EDGE_API int edge_hook_bytes(edge_hook * hook, uint64_t * out);      // held on the compute device
EDGE_API int edge_hook_slot_bytes(edge_hook * hook, uint64_t * out); // of which slots

// --- what policies reckon ----------------------------------------------------------------------------

// The passes over all experts that edge_speq/presets makes before and after each step, in the engine and in a replay:
// between two decodes each numpy function that is called costs 10 to 25 us, since it has left the caches. Arrays are
// the caller's and by key, block * n_expert + expert; marks are 0 or 1. Ids out of range are refused.
typedef struct edge_ids {       // routing
    const int32_t * ids;        // [n_blocks, n_tokens, n_used]
    int32_t n_blocks;
    int32_t n_tokens;
    int32_t n_used;
    int32_t stride;             // from one block's ids to the next one's
} edge_ids;

// A pool is what a rule would keep of n experts.
typedef struct edge_pool {
    uint8_t * kept;             // [n] marks
    int32_t n;
    int32_t n_kept;
    int32_t size;               // experts that it holds at most
} edge_pool;

// missed: wanted ones, [n] marks, that it did not hold. What is worth least makes room, wanted ones last; of equal worth
// it is the first.
EDGE_API int edge_pool_demand(edge_pool * pool, const uint8_t * wanted, const float * worth, int32_t * missed);

// Rules are tried against each other on a sample, every stride-th block; followed is the one that missed least of late. The first rule is recency, each other one how
// often steps demanded an expert, decaying, and `last` more where the last step did.
typedef struct edge_duel {
    int32_t n_blocks;
    int32_t n_expert;
    int32_t stride;
    int32_t n_rules;
    float   last;
    int32_t n_steps;
    const float * decays;       // [n_rules - 1]
    float * often;              // [n_rules - 1, n_blocks * n_expert]
    uint8_t * latest;           // marks of what the last step demanded
    float * used;               // of the sample: when it was demanded last, in steps
    edge_pool * pools;          // [n_rules], of the sample
    double * missed;            // [n_rules] share of a step's demands that each missed, of late
    double  smoothing;          // per step, of that
    double  hysteresis;         // by which part of it another rule must miss less
    double  weight;             // of the steps so far
    int32_t best;               // the rule that is followed
} edge_duel;

EDGE_API int edge_duel_score(const edge_duel * duel, float * scores);
EDGE_API int edge_duel_observe(edge_duel * duel, const edge_ids * routing);
// Learns how often experts are demanded from a prompt's routing, each token a step; -1 says nothing.
EDGE_API int edge_duel_read(edge_duel * duel, const edge_ids * routing);

// presets/waits.py has the formula of the wait.
typedef struct edge_rates {     // what predicted sets have been worth
    double inside;              // share of a set that was demanded
    double outside;             // demands of others, relative to their frequency
    double most_inside;         // what they are taken for at most
    double most_outside;
    double smoothing;           // per step
} edge_rates;

typedef struct edge_guess {     // experts that a step is expected to demand
    uint8_t * found;            // marks
    edge_rates * rates;         // observe() teaches them
    double others;              // out: demands of those outside, if these kept to their frequency
    int32_t n_found;            // out
    int32_t n_came;             // out: of those found that the step demanded
} edge_guess;

typedef struct edge_waits {
    int32_t n_blocks;
    int32_t n_expert;
    float   decay;              // per step, of `often`
    float   least;
    float * often;              // how often a step demands each expert, decaying
    uint8_t * demanded;         // out: marks of what the step demanded
    int64_t * tally;            // [3, n_blocks] foreseen, demanded, both; added to
    edge_order * orders;        // [n_blocks * n_expert], out: for what `now` found, by key
    int32_t n_demanded;         // out
} edge_waits;

// Writes scores. now: the routing's first `width` tokens; then: as many after them. Both null: there is no routing.
EDGE_API int edge_waits_foresee(edge_waits * waits, const edge_ids * routing, int32_t width, edge_guess * now, edge_guess * then, float * scores);
// The same into the hook's own scores, and edge_hook_prefetch of the orders, all while they are in the caches. Nothing is
// fetched where the rates of `now` say that less than `least` of such sets was demanded.
EDGE_API int edge_waits_prefetch(edge_waits * waits, edge_hook * hook, const edge_ids * routing, int32_t width, edge_guess * now, edge_guess * then, double least, float margin, int32_t * n_ordered, bool * sound);
// Learns from a step's routing. now, then: the guesses about it, or null; foreseen: marks to tally, or null.
EDGE_API int edge_waits_observe(edge_waits * waits, const edge_ids * routing, edge_guess * now, edge_guess * then, const uint8_t * foreseen);
// Learns how often experts are demanded from a prompt's routing, `width` tokens a step; -1 says nothing.
EDGE_API int edge_waits_read(edge_waits * waits, const edge_ids * routing, int32_t width);

// Fills every slot that holds no expert with NaN patterns. For tests: results must not change.
EDGE_API int edge_hook_poison_free_slots(edge_hook * hook);

// The nth event of a kind from now on fails, once; 0 disarms. For tests of what a failure leaves behind.
#define EDGE_FAULT_ALLOCATION 0
#define EDGE_FAULT_COPY 1
#define EDGE_FAULT_ROUTING 2
EDGE_API int edge_test_fail(int32_t kind, int64_t nth);

#ifdef __cplusplus
}
#endif

#endif
