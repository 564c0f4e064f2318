// C ABI of edge_speq's native library: the only contract between its C++ and its Python code.
//
// Functions return an EDGE_... status unless their comment says otherwise: EDGE_OK, or an EDGE_ERR_... code whose
// message edge_last_error() returns on the calling thread. Null pointers, negative counts and indices out of range
// are EDGE_ERR_ARGUMENT. No C++ exception crosses this boundary.
//
// Python parses this file with cffi. Keep it to plain C declarations, with each constant alone on its line and no
// conditional parts besides the ones around this text.
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

#define EDGE_ABI_VERSION 9

// Status codes.
#define EDGE_OK 0
// An argument is out of range or does not fit the model.
#define EDGE_ERR_ARGUMENT 1
// The model, a tensor type or an operation is not supported.
#define EDGE_ERR_UNSUPPORTED 2
// Fewer slots than the floor.
#define EDGE_ERR_BUDGET 3
// An allocation failed.
#define EDGE_ERR_MEMORY 4
// A ggml backend or a transfer failed.
#define EDGE_ERR_BACKEND 5
// A defect of this library.
#define EDGE_ERR_INTERNAL 6
// edge_hook_cancel() ended the graph.
#define EDGE_ERR_CANCELLED 7

// States of an expert.
#define EDGE_ABSENT 0
#define EDGE_LOADING 1
#define EDGE_RESIDENT 2
#define EDGE_PINNED 3

struct llama_model;
struct llama_context;

// --- library -----------------------------------------------------------------------------------------

// Return EDGE_ABI_VERSION of the build, not a status.
EDGE_API int32_t edge_abi_version(void);
// Return the SHA-256, in hex, of the header that the library was built from.
EDGE_API const char * edge_header_sha256(void);
// Return the llama.cpp commit that the library was built with.
EDGE_API const char * edge_llama_cpp_commit(void);
// Return the message of this thread's last failed call, "" if its last call succeeded.
EDGE_API const char * edge_last_error(void);

// --- devices -----------------------------------------------------------------------------------------

typedef struct edge_device {
    char name[64];
    char description[128];
    int32_t is_gpu; // 1 for discrete and integrated GPUs, 0 for the CPU and accelerators
    int32_t is_integrated; // 1 for a GPU that shares the host's memory
    uint64_t free_bytes;
    uint64_t total_bytes;
} edge_device;

// Load a ggml backend module (CUDA, Vulkan, ...) into this process. EDGE_ERR_BACKEND if it does not load.
EDGE_API int edge_backend_load(const char * path);
EDGE_API int edge_device_count(int32_t * out);
// Describe device `index`, 0 <= index < edge_device_count().
EDGE_API int edge_device_get(int32_t index, edge_device * out);

// Return the ggml buffer type for expert tensors in pageable host memory or mapped file pages. Not a status.
EDGE_API void * edge_cpu_buffer_type(void);
// Return the ggml buffer type of memory that is page-locked for the first GPU, from where copies are several times as
// fast. Without a GPU it is edge_cpu_buffer_type(). Not a status.
EDGE_API void * edge_host_buffer_type(void);

// --- routed experts of a model -----------------------------------------------------------------------

// A block is one MoE feed-forward of one layer; blocks are numbered in layer order. A group is the set of blocks
// whose up, gate and down weights agree in type and shape, so that one slot can hold any expert of the group.
typedef struct edge_experts {
    int32_t n_blocks; // 0: a dense model
    int32_t n_expert; // experts per block
    int32_t n_expert_used; // experts per token and block
    int32_t n_groups;
    uint64_t total_bytes; // of all routed experts
} edge_experts;

typedef struct edge_group {
    int32_t n_blocks;
    int32_t n_experts; // n_blocks * n_expert
    uint64_t expert_bytes; // gate, up and down weights of one expert
} edge_group;

EDGE_API int edge_model_experts(const struct llama_model * model, edge_experts * out);
// Write the group of each block to out, [n_blocks].
EDGE_API int edge_model_block_groups(const struct llama_model * model, int32_t * out);
EDGE_API int edge_model_group(const struct llama_model * model, int32_t group, edge_group * out);

// Write the index of the first token whose text differs between two vocabularies, -1 if they agree. One vocabulary
// may have up to 128 more tokens than the other: model families pad theirs, and llama.cpp's speculation allows it.
EDGE_API int edge_vocab_compare(const struct llama_model * a, const struct llama_model * b, int32_t * out);

// Memory of a context and its model on one side.
typedef struct edge_memory {
    uint64_t model_bytes; // weights in device buffers; mapped file pages are not counted
    uint64_t context_bytes; // KV cache and recurrent state
    uint64_t compute_bytes; // buffers of intermediate results
} edge_memory;

// Measure what a context and its model hold on GPUs (on_gpu) or in host memory. Works on a no_alloc dry load, too.
EDGE_API int edge_memory_used(const struct llama_context * ctx, bool on_gpu, edge_memory * out);

// --- hook --------------------------------------------------------------------------------------------

// The hook on one loaded model: it records routing and, with slots, serves the experts from them.
typedef struct edge_hook edge_hook;

// How a missing expert is computed.
// Fetch it into a slot first.
#define EDGE_ON_MISS_FETCH 0
// Compute some missing experts on the CPU and fetch the others: the split that is estimated to finish first.
#define EDGE_ON_MISS_HYBRID 1
// Choose between the two step by step, by measured cost.
#define EDGE_ON_MISS_AUTO 2

typedef struct edge_hook_params {
    int32_t max_width; // tokens of the widest graph that slots serve and whose routing is recorded
    int32_t n_groups; // length of slots; 0: record routing only, experts stay where they are
    const int32_t * slots; // [n_groups] at least edge_slot_floor() each; that of one token with EDGE_ON_MISS_HYBRID
    uint64_t link_bytes_per_s; // throttle transfers to this rate; 0: no throttle
    bool deterministic; // transfers take virtual time, so that counters repeat; needs link_bytes_per_s
    uint64_t block_ns; // virtual time in which one block computes, nanoseconds
    int32_t on_miss; // EDGE_ON_MISS_...
    int32_t n_threads; // CPU threads for missing experts; 0: ggml's default
    bool next_layer_prefetch; // prefetch what a block's input predicts for the next; ignored with EDGE_ON_MISS_FETCH
    bool reads_prefill; // record the routing of prefill for edge_hook_prefill_routing()
} edge_hook_params;

// Tokens at the end of a prefill graph whose routing is recorded.
#define EDGE_PREFILL_TOKENS 64

// Totals since the hook was attached. A demand is one distinct expert that one block of one graph uses.
typedef struct edge_counters {
    uint64_t steps; // graphs served from slots
    uint64_t hits; // demands that were in a slot
    uint64_t misses; // demands that were not, late ones included
    uint64_t late; // misses whose prefetch was still in flight
    uint64_t cpu_computed; // misses that the CPU computed
    uint64_t fetched; // misses that waited for a copy
    uint64_t prefetched; // prefetches begun
    uint64_t prefetched_used; // prefetches whose expert was then demanded
    uint64_t bytes_fetched; // of all copies into slots
    uint64_t bytes_wasted; // of prefetches that no demand has used
    uint64_t stall_ns; // blocks waited for nothing but copies; virtual time in deterministic mode
    uint64_t cpu_ns; // the CPU computed missing experts
    uint64_t failed; // failed transfers: prefetches are dropped, demands end the graph
} edge_counters;

// Request to prefetch one expert.
typedef struct edge_prefetch_request {
    int32_t block;
    int32_t expert;
    int32_t deadline; // dropped unless begun when a step reaches this block; n_blocks: never dropped
    float priority; // expected uses in the coming step, on the scale of the scores
} edge_prefetch_request;

// Write the fewest slots that a group needs for graphs of max_width tokens: all their experts, and one to load into.
EDGE_API int edge_slot_floor(int32_t n_expert, int32_t n_expert_used, int32_t max_width, int32_t * out);

// Attach a hook to a model. Call before its context is created. With slots, the expert weights must be in plain host
// memory: load the model with its expert tensors overridden to one of the buffer types above and with
// use_extra_bufts = false. EDGE_ERR_UNSUPPORTED for a dense model or weights elsewhere, EDGE_ERR_BUDGET for slots under
// the floor, EDGE_ERR_MEMORY if the slots cannot be allocated.
EDGE_API int edge_hook_attach(struct llama_model * model, const edge_hook_params * params, edge_hook ** out);
// Detach and free a hook. Call after the model's contexts are freed.
EDGE_API int edge_hook_detach(edge_hook * hook);

// Experts that graphs of up to max_width tokens compute with. With other experts than its own a model drafts for
// itself, in its own context and KV cache. Such graphs record the routing that the unrestricted routers would have
// chosen; they count neither hits nor misses. The caller removes the drafted positions from the KV cache.
#define EDGE_EXPERTS_OWN 0
// Low-bit draft experts on the compute device, see edge_hook_load_draft_experts().
#define EDGE_EXPERTS_DRAFT 1
// Resident experts only: the routers choose among them. Select this again before each graph.
#define EDGE_EXPERTS_RESIDENT 2

// Weight matrices of a block's experts.
#define EDGE_ROLE_UP 0
#define EDGE_ROLE_GATE 1
#define EDGE_ROLE_DOWN 2
// gate and up fused into one tensor
#define EDGE_ROLE_GATE_UP 3

// The draft experts of one block in one role.
typedef struct edge_draft_tensor {
    int32_t block;
    int32_t role; // EDGE_ROLE_...
    int32_t type; // enum ggml_type
    uint64_t offset; // bytes from the start of the file
} edge_draft_tensor;

// Copy draft experts from a file to the compute device. `tensors` must name every role of every block exactly once.
// EDGE_ERR_ARGUMENT if it does not, or if the file is too short; EDGE_ERR_UNSUPPORTED for a type that the device cannot
// multiply with; EDGE_ERR_MEMORY if the device has no room.
EDGE_API int edge_hook_load_draft_experts(edge_hook * hook, const char * path, const edge_draft_tensor * tensors,
                                          int32_t n_tensors);
// Select EDGE_EXPERTS_... for the next graphs. Call between graphs. *ready is false, and the model's own experts stay
// selected, if there are no slots or a block has fewer resident experts than a token uses. EDGE_ERR_ARGUMENT for
// EDGE_EXPERTS_DRAFT before edge_hook_load_draft_experts().
EDGE_API int edge_hook_use_experts(edge_hook * hook, int32_t which, bool * ready);

// Lossy: limit graphs of two tokens and more that slots serve to n_experts distinct experts per block, the ones with
// the largest sum of router scores over the graph's tokens (MoE-Spec, arXiv 2602.16052). 0: no limit. Call between
// graphs.
EDGE_API int edge_hook_use_budget(edge_hook * hook, int32_t n_experts);

// End a step: the slots of the last block may be reused and the routing is complete. Call after every decode, once the
// context is synchronised, also if the decode failed. Returns the error that ended the graph (llama_decode's status 2).
EDGE_API int edge_hook_end_step(edge_hook * hook);

// End the running graph, or the next one, at its next block. Callable from any thread. No effect without slots, on
// graphs with other experts than the model's own, and once all experts are resident: those graphs never ask the host.
EDGE_API int edge_hook_cancel(edge_hook * hook);

// Read the routing of the last graph that edge_hook_end_step() ended. *ids points to [n_blocks, max_width,
// n_expert_used] expert ids, of which the first *n_tokens rows of each block are valid. *n_tokens is 0 if the graph was
// wider than max_width, if its last block had fewer rows (llama.cpp drops rows without logits there) or, with slots, if
// a block was not served from them. The memory belongs to the hook; its address never changes.
EDGE_API int edge_hook_routing(edge_hook * hook, const int32_t ** ids, int32_t * n_tokens);

// Read the routing of the last tokens of the last prefill graph, one wider than max_width. Call after
// edge_hook_end_step(). *ids points to [n_blocks, EDGE_PREFILL_TOKENS, n_expert_used] expert ids, of which the last
// *n_tokens rows of each block are valid. Rows that a block does not have are -1: llama.cpp drops rows without logits
// from the last block. *n_tokens is 0 without reads_prefill or before the first such graph. The hook owns the memory.
EDGE_API int edge_hook_prefill_routing(edge_hook * hook, const int32_t ** ids, int32_t * n_tokens);

// If true, prefill admits its most-used experts of each block into slots and evicts the least used. Its graphs copy
// those experts to the device in any case. Off by default.
EDGE_API int edge_hook_admit_from_prefill(edge_hook * hook, bool on);

// Return the scores, [n_blocks, n_expert] expected uses in the long run, initially 0. An eviction takes the expert of
// lowest score, the least recently used one among equals. Write between steps; edge_hook_prefetch() commits them.
// The memory belongs to the hook; its address never changes.
EDGE_API int edge_hook_scores(edge_hook * hook, float ** out);

// Commit the scores and replace all outstanding prefetch requests by these, most urgent first; n_requests 0 cancels
// them. A requested expert that is resident has its priority added to its score until its block has run. A worker
// thread loads the others, up to byte_budget bytes, and evicts only experts that score more than `margin` below them.
// With next_layer_prefetch, the decoding thread itself sends the requests whose deadline is their own block, when that
// block is next and the link would be idle, in place of what the block's input predicts; these may evict any
// unpinned expert. *n_absent is the number of requested experts in no slot. *finite, unless null, says whether all
// scores were finite; others count as 0.
EDGE_API int edge_hook_prefetch(edge_hook * hook, const edge_prefetch_request * requests, int32_t n_requests,
                                uint64_t byte_budget, float margin, int32_t * n_absent, bool * finite);
// Wait until the worker thread has no outstanding request.
EDGE_API int edge_hook_drain(edge_hook * hook);

// Replace the slot counts, [n_groups], and reload the experts of highest score. Call between steps, while no other
// thread decodes. Graphs wider than the new slots serve take the stock path from then on. EDGE_ERR_BUDGET for slots
// under the floor of one token, which changes nothing; after EDGE_ERR_MEMORY there are no slots and every graph takes
// the stock path.
EDGE_API int edge_hook_resize(edge_hook * hook, const int32_t * slots, int32_t n_groups);

EDGE_API int edge_hook_counters(edge_hook * hook, edge_counters * out);

// Costs that hybrid execution has measured; the first four are 0 before the first measurement.
typedef struct edge_costs {
    double cpu_bytes_per_s; // expert weights that the CPU computes with, while the link is idle
    double link_bytes_per_s;
    double contention; // CPU time grows by this fraction of the time that CPU and link are both busy
    double device_bytes_per_s; // expert weights that the device reads; 0 if not measured
    double next_layer_precision; // recent fraction of the experts predicted for the next block that it then demanded
    bool fetches_some; // whether misses are fetched at all: copies overlap with the CPU, from page-locked memory
} edge_costs;

EDGE_API int edge_hook_costs(edge_hook * hook, edge_costs * out);
// Write the state of each expert, EDGE_ABSENT to EDGE_PINNED, to out, [n_blocks, n_expert].
EDGE_API int edge_hook_states(edge_hook * hook, uint8_t * out);

// Activity of the decoding thread during a span.
// Waited for the device, which computed up to this block's routing.
#define EDGE_SPAN_DEVICE 0
// Assigned slots and queued copies.
#define EDGE_SPAN_DECIDE 1
// Computed missing experts on the CPU.
#define EDGE_SPAN_CPU 2
// Waited for copies.
#define EDGE_SPAN_COPIES 3
// Predicted the next block's experts and queued their copies.
#define EDGE_SPAN_NEXT_LAYER 4

typedef struct edge_span {
    int32_t kind; // EDGE_SPAN_...
    int32_t block;
    uint64_t begin_ns; // steady clock
    uint64_t end_ns;
} edge_span;

// Record the next n spans of the decoding thread; 0 stops recording. Call between steps. Drops earlier spans.
EDGE_API int edge_hook_record(edge_hook * hook, int32_t n);
// Read the recorded spans, in the order of their ends. Call between steps; valid until the next edge_hook_record().
EDGE_API int edge_hook_spans(edge_hook * hook, const edge_span ** spans, int32_t * n);

// Write the bytes that the hook holds on the compute device.
EDGE_API int edge_hook_bytes(edge_hook * hook, uint64_t * out);
// Write the bytes of the slots alone.
EDGE_API int edge_hook_slot_bytes(edge_hook * hook, uint64_t * out);

// --- policy kernels ----------------------------------------------------------------------------------

// Passes over all experts that the policies make before and after each step, in the engine and in a replay. They are
// native because each numpy call between two decodes costs 10 to 25 us: its code has left the CPU's caches.
// Arrays are the caller's, one entry per expert at block * n_expert + expert unless a shape is given. Marks are 0 or 1.
// Expert ids out of range are EDGE_ERR_ARGUMENT.
typedef struct edge_routing {
    const int32_t * ids; // [n_blocks, n_tokens, n_used]
    int32_t n_blocks;
    int32_t n_tokens;
    int32_t n_used;
    int32_t stride; // ids from the start of one block to the start of the next
} edge_routing;

// A simulated slot pool: the experts that a policy would keep, of n candidates.
typedef struct edge_pool {
    uint8_t * kept; // [n] marks
    int32_t n;
    int32_t n_kept;
    int32_t size; // capacity
} edge_pool;

// Demand the experts marked in wanted, [n], and write how many the pool missed. Evict by lowest score, [n], demanded
// experts last, the first index among equals.
EDGE_API int edge_pool_demand(edge_pool * pool, const uint8_t * wanted, const float * scores, int32_t * missed);

// Set dueling: eviction rules compete on every stride-th block, and the rule with the fewest recent misses is followed.
// Rule 0 is recency. Each further rule scores an expert by the decaying frequency of its demands, plus `last` if the
// last step demanded it.
typedef struct edge_dueling {
    int32_t n_blocks;
    int32_t n_expert;
    int32_t stride; // blocks
    int32_t n_rules;
    float last;
    int32_t n_steps; // observed so far
    const float * decays; // [n_rules - 1] per step
    float * frequency; // [n_rules - 1, n_blocks * n_expert]
    uint8_t * latest; // marks: demanded by the last step
    float * used; // of the sampled blocks: step of the last demand
    edge_pool * pools; // [n_rules], of the sampled blocks
    double * missed; // [n_rules] recent fraction of a step's demands that the rule's pool missed
    double smoothing; // of missed, per step
    double hysteresis; // fraction by which another rule must miss less to be followed
    double weight; // effective number of steps in missed
    int32_t best; // the rule that is followed
} edge_dueling;

// Write the followed rule's scores.
EDGE_API int edge_dueling_score(const edge_dueling * dueling, float * scores);
// Update pools, frequencies and the followed rule from a step's routing.
EDGE_API int edge_dueling_observe(edge_dueling * dueling, const edge_routing * routing);
// Update the frequencies from prefill routing, one token per step; ids of -1 are unknown.
EDGE_API int edge_dueling_on_prefill(edge_dueling * dueling, const edge_routing * routing);

// Accuracy of predicted sets of experts.
typedef struct edge_rates {
    double inside; // fraction of a predicted set that was demanded
    double outside; // demands of other experts, relative to their frequency
    double max_inside; // upper bounds for use in scores
    double max_outside;
    double smoothing; // per step
} edge_rates;

// Experts that a step is predicted to demand.
typedef struct edge_prediction {
    uint8_t * found; // marks
    edge_rates * rates; // updated by edge_next_use_observe()
    double others; // out: demands expected outside the set at their usual frequency
    int32_t n_found; // out
    int32_t n_demanded; // out: predicted experts that the step demanded
} edge_prediction;

// State of the next-use policy: score an expert by minus the expected number of steps until its next demand.
typedef struct edge_next_use {
    int32_t n_blocks;
    int32_t n_expert;
    float decay; // of frequency, per step
    float min_frequency;
    float * frequency; // decaying demands per step
    uint8_t * demanded; // out: marks of the last step's demands
    int64_t * tally; // [3, n_blocks] predicted, demanded, both; added to
    edge_prefetch_request * requests; // [n_blocks * n_expert] out: for the experts in `now`, by block and expert
    int32_t n_demanded; // out
} edge_next_use;

// Write scores and prefetch requests for the coming step. `now` is predicted from the first `width` tokens of routing,
// `then` from as many after them. Without routing both are null and only frequencies count.
EDGE_API int edge_next_use_plan(edge_next_use * next_use, const edge_routing * routing, int32_t width,
                                edge_prediction * now, edge_prediction * then, float * scores);
// Plan with the hook's own scores and submit the requests through edge_hook_prefetch(), in one call while the data is
// in the CPU's caches. Nothing is fetched if the demanded fraction of such predictions, rates->inside, is under
// min_share.
EDGE_API int edge_next_use_prefetch(edge_next_use * next_use, edge_hook * hook, const edge_routing * routing,
                                    int32_t width, edge_prediction * now, edge_prediction * then, double min_share,
                                    float margin, int32_t * n_absent, bool * finite);
// Update frequencies, rates and tally from a step's routing. now, then: its predictions, or null; foreseen: marks to
// tally, or null.
EDGE_API int edge_next_use_observe(edge_next_use * next_use, const edge_routing * routing, edge_prediction * now,
                                   edge_prediction * then, const uint8_t * foreseen);
// Update the frequencies from prefill routing, `width` tokens per step; ids of -1 are unknown.
EDGE_API int edge_next_use_on_prefill(edge_next_use * next_use, const edge_routing * routing, int32_t width);

// --- tests -------------------------------------------------------------------------------------------

// Fill every slot that holds no expert with NaN patterns. Results must not change.
EDGE_API int edge_hook_poison_free_slots(edge_hook * hook);

// Kinds of events that can be made to fail.
#define EDGE_FAULT_ALLOCATION 0
#define EDGE_FAULT_COPY 1
#define EDGE_FAULT_ROUTING 2
// Fail the nth event of a kind from now on, once; 0 disarms.
EDGE_API int edge_test_fail(int32_t kind, int64_t nth);

#ifdef __cplusplus
}
#endif

#endif
