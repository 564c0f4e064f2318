"""JSON outputs of the commands, as dataclasses. The schemas and docs/reference/json.md are generated from them.

A field's comment is its description. Numbers are at least 0 unless their type is Signed. Every key is always present,
except in classes with OPTIONAL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from edge_speq.core import ON_MISS, POLICIES, ExpertCounters, ExpertGroup, MemoryUse, Placement, Plan, Share

BenchPolicy = Annotated[str, ("enum", POLICIES)]
OnMiss = Annotated[str, ("enum", ON_MISS)]
Signed = Annotated[float, ("minimum", None)]


# --- run ---------------------------------------------------------------------------------------------------


@dataclass
class SpeculationReport:
    """Draft tokens since the model was loaded."""

    mean_draft_tokens: float  # draft tokens per step
    drafted: int  # draft tokens proposed
    accepted: int  # draft tokens kept; the bonus token is not counted
    acceptance: Share  # accepted / drafted, 0 if nothing was drafted


@dataclass
class Foreseen:
    """Quality of expert prediction since the model was loaded; null if nothing predicts."""

    precision: Share  # share of the experts predicted for a step that the step demanded
    recall: Share  # share of the experts demanded by steps that were predicted
    lead_tokens: float  # tokens between a prediction and its step, on average; the coming step counts as one


@dataclass(frozen=True)
class ExpertsReport(ExpertCounters):
    """Expert events since the model was loaded, of graphs of at most max_draft_tokens + 1 tokens.

    Wider graphs, mostly prefill, take llama.cpp's stock path.
    """

    hit_rate: Share | None = None  # hits / (hits + misses); null without demands  # type: ignore[misc, assignment]
    # what predicts experts: a draft with the model's routing, a trained predictor, a trace of the same text, counts
    foresight: Literal["twin", "learned", "trace", "counts", "none"] = "none"
    foreseen: Foreseen | None = None
    policy: str = ""  # policy of the slots; lru after a failure, none without slots
    policy_failures: int = 0  # policies that raised or returned scores that are no numbers, and were replaced by lru
    lossy: bool = False  # a token runs fewer experts than the model's router chose


@dataclass
class MemoryReport:
    """Memory of the compute device."""

    # hard ceiling: vram_budget or, on a GPU without one, the free memory less a margin; null if nothing bounds it
    budget_bytes: int | None
    used_bytes: int  # dense weights, KV caches, draft, compute buffers and slots; mapped file pages are not counted
    plan: Plan


@dataclass
class Backend:
    """Device and builds that ran the model."""

    device: str  # the compute device
    llama_cpp_commit: str  # commit of the llama.cpp that was built
    edge_speq_version: str  # version of this package


@dataclass
class Applied:
    """Options that the profile filled in."""

    OPTIONAL: ClassVar[bool] = True
    draft: str  # the draft that tune chose: a path, self or ngram
    draft_tokens: int | str  # draft tokens per step, or auto
    on_miss: OnMiss  # how misses are served
    n_threads: Annotated[int, ("minimum", 1)]  # CPU threads
    resident: float | str  # share of the expert bytes in slots
    vram_budget: int | str  # ceiling on the compute device


@dataclass
class Profile:
    """The stored profile of edge-speq tune that was applied; null without one."""

    path: str  # its file
    applied: Applied


@dataclass
class Run:
    """Generated text, speed, and expert events of one edge-speq run."""

    TITLE: ClassVar[str] = "edge-speq run --json"
    text: str  # the generated text, without the prompt
    n_prompt: int  # prompt tokens
    n_generated: int  # generated tokens, including an end-of-text token
    tok_per_s: float  # generated tokens after the first, divided by the wall time of decoding them; 0 without any
    ttft_ms: float  # time from the request to the first token
    tpot_ms: float  # time per output token: the inverse of tok_per_s, 0 without one
    speculation: SpeculationReport
    experts: ExpertsReport
    memory: MemoryReport
    backend: Backend
    profile: Profile | None


# --- plan --------------------------------------------------------------------------------------------------


@dataclass
class ModelFile:
    """A model's file."""

    path: str  # the file, the first one of a split model; self if the model drafts for itself
    dense_bytes: int  # all tensors except routed experts
    expert_bytes: int  # the routed experts


@dataclass
class PlannedDevice:
    """The compute device."""

    name: str  # as ggml names it
    description: str  # as its driver names it
    is_gpu: bool  # false: the CPU computes
    is_integrated: bool  # a GPU that shares the host's memory
    free_bytes: int  # free memory now
    total_bytes: int  # all memory


@dataclass(frozen=True)
class MemoryNeed(MemoryUse):
    """Memory of one model and its context."""

    total_bytes: int = 0  # the sum of these


@dataclass
class PlannedMemory:
    """Bytes on the compute device."""

    target: MemoryNeed  # the target model
    draft: MemoryNeed | None  # the draft; null without one and if the plan does not load it
    overhead_bytes: int  # routing ids and padding; counted if a budget bounds the slots
    expert_bytes: int  # the target's routed experts: all slots, or every expert if all are resident on a GPU
    total_bytes: int  # the sum of the above
    budget_bytes: int | None  # hard ceiling for the sum; null if nothing bounds it


@dataclass(frozen=True)
class PlannedGroup(ExpertGroup):
    """Blocks whose experts agree in type and shape."""

    slots: int = 0  # experts that the group's slots hold at once; 0 without slots
    slot_bytes: int = 0  # of the group's slots


@dataclass
class OtherMachine:
    """The machine that --vram, --ram and a link describe."""

    vram_bytes: int  # memory of its GPU
    ram_bytes: int | None  # its memory; null if not given
    link_bytes_per_s: int  # from RAM to GPU
    n_threads: int  # threads of its CPU


@dataclass
class PerToken:
    """Estimated, not measured; null if there is a reason against figures."""

    method: Literal["even routing, no draft", "replayed trace"]  # what the estimate assumes
    bytes_demanded: int  # experts that a token computes with
    bytes_fetched: int  # the part of these that crosses the link, prefetches included
    # computation and drafting; a block is assumed to compute for half of the transfer time of one of its experts
    computing_ms: float
    waiting_ms: float  # waiting for experts
    total_ms: float  # the sum of both
    tok_per_s: float | None  # the inverse of total_ms
    hybrid_ms: float  # total if the CPU computes its part of the missing experts
    cpu_moe_ms: float  # total if the CPU computes all experts
    bound_tok_per_s: float | None  # with a clairvoyant cache and perfect overlap; null without a trace


@dataclass
class Estimate:
    """Estimated speed on the machine that the options describe; null for this machine and for dense models."""

    laptop: OtherMachine
    ram_needed_bytes: int  # the experts, and 2 GiB for everything else
    fits_in_ram: bool | None  # null if its RAM is not given
    unavailable_reason: str | None  # why there are no figures per token; null if there are
    per_token: PerToken | None


@dataclass
class PlanReport:
    """Memory that a model would hold on the compute device, found without loading its weights.

    On a machine without a GPU the compute device is the CPU; weights are then mapped file pages, which are not counted.
    """

    TITLE: ClassVar[str] = "edge-speq plan --json"
    model: ModelFile  # the target's file
    draft: ModelFile | None  # the draft's file; null without one
    n_ctx: int  # tokens of context
    device: PlannedDevice
    memory: PlannedMemory
    groups: list[PlannedGroup]  # blocks whose experts agree in type and shape
    plan: Plan
    advice: str | None  # a change that would make it faster; null if none is known
    estimate: Estimate | None


# --- bench -------------------------------------------------------------------------------------------------


@dataclass
class BenchRow:
    """One policy and test, in llama-bench's keys and ours. Counters are sums over the timed parts of all repetitions.

    -o jsonl prints one row a line; -o csv has the same keys except samples_ns, samples_ts and ts_by_class.
    """

    TITLE: ClassVar[str] = "edge-speq bench -o json"
    build_commit: str  # commit of llama.cpp
    edge_speq_version: str  # version of this package
    cpu_info: str  # the processor
    gpu_info: str  # the compute device; empty without a GPU
    gpu_driver: str  # kernel modules of GPU drivers with their versions, as in nvidia 580.159; empty if unknown
    ram_bytes: int | None  # memory of the machine or its container; null if unknown
    backends: str  # backend of the compute device, as llama-bench names it
    model_filename: str  # as it was given
    model_hash: Annotated[str, ("pattern", "^[0-9a-f]{64}$")]  # sha256 of each part's header and size
    model_type: str  # llama.cpp's description
    model_size: int  # bytes of all tensors
    model_n_params: int  # number of weights
    n_batch: int  # tokens of a logical batch
    n_ubatch: int  # tokens of a physical batch
    n_threads: int  # CPU threads of a decode step
    type_k: str  # type of the keys in the KV cache
    type_v: str  # type of the values in the KV cache
    n_gpu_layers: Annotated[int, ("minimum", -1)]  # -1: all layers
    # layers whose experts stay on the CPU, as with llama.cpp's --n-cpu-moe; null for policies with slots
    n_cpu_moe: int | None
    # the mapped file, or read into memory; for cpu-moe, and for all without a GPU, the faster one unless asked for
    load_mode: Literal["mmap", "none"]
    flash_attn: bool  # whether flash attention is on
    n_prompt: int  # prompt tokens that the test counts
    n_gen: int  # generated tokens that the test counts
    n_depth: int  # tokens in the context before the test; with 0 a generation test starts from its text alone
    test: Annotated[str, ("pattern", "^(pp[0-9]+)?[+]?(tg[0-9]+)?( @ d[0-9]+)?$")]  # llama-bench's name
    test_time: str  # start of the first counted repetition, RFC 3339
    avg_ns: int  # mean time of a repetition, all texts
    stddev_ns: int  # standard deviation of the repetitions, with n - 1
    avg_ts: float  # tokens per second, mean of the repetitions
    stddev_ts: float  # standard deviation of the repetitions, with n - 1
    samples_ns: Annotated[list[int], ("minItems", 1)]  # time of each repetition
    samples_ts: Annotated[list[float], ("minItems", 1)]  # tokens per second of each repetition
    policy: BenchPolicy  # as asked for
    placement: Placement  # placement of the experts that the policy led to
    # a token runs fewer experts than the model's router chose; speedup is then null unless the texts are equal
    lossy: bool
    draft: str | None  # file name of the draft; null without one
    on_miss: OnMiss  # how misses are served, as asked for
    draft_tokens: str  # draft tokens per step, as asked for
    # share of the expert bytes in slots, as asked for, of the first policy with slots; null if a budget decides
    resident: str | None
    resident_fraction: Share | None  # share of the routed-expert bytes on the compute device; null for a dense model
    used_bytes: int  # dense weights, KV, draft, compute buffers and slots on the compute device; mapped pages excluded
    budget_bytes: int  # bytes that the first policy with slots uses: the limit for the other policies
    # more than the budget; without a GPU also cpu-moe and all, whose mapped experts used_bytes leaves out
    over_budget: bool
    hits: float | None  # demands served from a slot; null without demands to count
    misses: float | None  # all other demands
    hit_rate: Share | None  # hits / (hits + misses)
    bytes_fetched: float | None  # bytes moved into slots
    bytes_wasted: Signed | None  # fetched and not used; negative if earlier prefetches were used
    stall_ms: float | None  # time that the model's computation waited for experts
    cpu_computed: float | None  # misses that the CPU computed
    cpu_ms: float | None  # time that the CPU computed missing experts
    # share of the experts predicted for a step that it demanded, since the load; null if nothing predicts
    foresight_precision: float | None
    foresight_recall: float | None  # share of the experts demanded by steps that were predicted
    foresight_lead_tokens: float | None  # tokens between a prediction and its step, on average
    drafted: int  # draft tokens proposed
    accepted: int  # draft tokens kept
    acceptance: Share | None  # accepted / drafted; null without drafted tokens
    mean_draft_tokens: float | None  # draft tokens per step; null without steps
    ttft_ms: float | None  # mean time from the end of the prompt to the first token; null for prompt tests
    ts_by_class: dict[str, Signed]  # tokens per second of each class of texts
    n_texts: int  # texts of a repetition
    link_bytes_per_s: int | None  # rate of the link that the bound uses: measured, or emulated
    # expert weights that the CPU computes with by itself; null if it computes none
    cpu_bytes_per_s: int | None
    contention: float | None  # measured slowdown of the CPU while the link is busy, as a share of the shared time
    bound_ts: float | None  # tokens per second of a clairvoyant cache with perfect overlap; null for prompts
    # where the bound's compute time comes from: the same steps under policy all, or the steps less their stalls
    bound_compute: Literal["all", "stalls", None]
    bound_fraction: float | None  # avg_ts / bound_ts
    outputs_match: Literal[True, False, "near tie"]  # greedy texts against policy lru without a draft
    first_difference: int | None  # first position at which a text differs; null if none does
    # greatest distance, in the reference's logits, of two different tokens chosen there; null if texts agree
    logit_gap: Signed | None
    baseline: str  # the policy that speedup refers to
    speedup: float | None  # avg_ts over the baseline's; null if either text differs by more than near ties
    deterministic: bool  # virtual transfers: stalls are virtual and added to measured times
    emulation: str | None  # how another machine is emulated; null if nothing is emulated


# --- step log, inspect, doctor -----------------------------------------------------------------------------


@dataclass
class StepOutput:
    """One line of the step log: a verify step, or the decoding of a prompt. Expert events are since the line before."""

    TITLE: ClassVar[str] = "edge-speq run --step-log"
    tokens: int  # tokens that the target decoded: the last ones of the text and the drafted ones
    drafted: int  # draft tokens proposed
    accepted: int  # draft tokens kept
    hits: int | None  # demands served from a slot; null without slots
    misses: int | None  # all other demands; null without slots
    fetched: int  # misses that waited for a transfer
    cpu_computed: int | None  # misses that the CPU computed
    bytes_fetched: int  # bytes moved into slots
    stall_ms: float  # time that the model's computation waited for experts
    cpu_ms: float  # time that the CPU computed missing experts
    seconds: float  # drafting and verifying, without the sampler and the consumer of the text
    is_prompt: bool  # whether the step decoded a prompt


@dataclass
class InspectedGroup:
    """Blocks whose experts agree in types and shapes."""

    types: dict[str, str]  # tensor type of each part of an expert: gate, up, gate_up, down
    n_blocks: int  # blocks of the group
    n_experts: int  # over all its blocks
    expert_bytes: int  # all parts of one expert


@dataclass
class InspectedExperts:
    """The routed experts."""

    n_expert: int | None  # experts per block; null for a dense model
    n_expert_used: int | None  # experts per token and block; null for a dense model
    total_bytes: int  # all routed experts
    groups: list[InspectedGroup]  # blocks whose experts agree in types and shapes


@dataclass
class Inspected:
    """Contents of a GGUF file, from its header."""

    TITLE: ClassVar[str] = "edge-speq inspect --json"
    files: list[str]  # paths of all parts
    gguf_version: int  # version of the format
    size_bytes: int  # size of all parts
    architecture: str | None  # llama.cpp's name of the architecture; null if the file lacks it
    name: str | None  # name of the model; null if the file lacks it
    context_length: int | None  # tokens of context that the model was trained for; null if unknown
    n_layer: int | None  # number of blocks; null if unknown
    n_vocab: int | None  # tokens of the vocabulary; null without one
    n_tensors: int  # number of tensors
    experts: InspectedExperts
    dense_bytes: int  # all tensors except routed experts
    bytes_by_role_and_type: dict[str, dict[str, int]]  # bytes of each tensor type, for each role of tensors


@dataclass
class FindingOutput:
    """One check of edge-speq doctor."""

    name: str  # what was checked
    # ok; note: an optional part is missing; warn: usable, with a drawback; fail: not usable
    status: Literal["ok", "note", "warn", "fail"]
    text: str  # the result for people
    remedy: str  # how to fix it; empty for ok
    values: dict[str, Any]  # the numbers of text, by name


@dataclass
class Diagnosis:
    """Checks of this installation and this machine."""

    TITLE: ClassVar[str] = "edge-speq doctor --json"
    usable: bool  # false if a check failed
    findings: list[FindingOutput]  # all checks, in order


OUTPUTS: dict[str, type] = {
    "run": Run,
    "step": StepOutput,
    "plan": PlanReport,
    "bench": BenchRow,
    "inspect": Inspected,
    "doctor": Diagnosis,
}
MANY = ("bench",)  # printed as arrays
