"""Counters in Prometheus format, with the names of llama.cpp's server if it has the counter."""

from __future__ import annotations

from collections.abc import Iterator

from edge_speq.core import Stats
from edge_speq.session.requests import RequestCounts
from edge_speq.session.session import Session

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Row = tuple[str, str, str, float | None]  # name, type, help, value; None: not measured with this policy


def text(stats: Stats, session: Session) -> str:
    counts = session.counts()
    rows = [*_llama_cpp(stats, counts, session.workload()), *_requests(counts), *_experts(stats), *_drafts(stats)]
    return "".join(
        f"# HELP {name} {help_}\n# TYPE {name} {kind}\n{name} {value:.17g}\n"
        for name, kind, help_, value in rows
        if value is not None
    )


def _llama_cpp(stats: Stats, counts: RequestCounts, workload: tuple[int, int]) -> Iterator[Row]:
    t, prompt = stats.timing, counts.prompt_seconds
    served, waiting = workload
    yield "llamacpp:prompt_tokens_total", "counter", "Prompt tokens, reused ones included.", t.n_prompt
    yield "llamacpp:prompt_seconds_total", "counter", "Seconds until the first token.", prompt
    yield "llamacpp:tokens_predicted_total", "counter", "Generated tokens.", t.n_generated
    yield "llamacpp:tokens_predicted_seconds_total", "counter", "Seconds of generating them.", t.decode_seconds
    yield "llamacpp:prompt_tokens_seconds", "gauge", "Prompt tokens a second.", t.n_prompt / prompt if prompt else 0.0
    yield "llamacpp:predicted_tokens_seconds", "gauge", "Generated tokens a second.", t.tok_per_s
    yield "llamacpp:requests_processing", "gauge", "Requests that are served.", served
    yield "llamacpp:requests_deferred", "gauge", "Requests that wait.", waiting


def _requests(c: RequestCounts) -> Iterator[Row]:
    yield "edge_speq_requests_finished_total", "counter", "Requests that were answered.", c.finished
    yield "edge_speq_requests_abandoned_total", "counter", "Requests whose client went away.", c.abandoned
    yield "edge_speq_requests_refused_total", "counter", "Requests that found the queue full.", c.refused
    yield "edge_speq_requests_failed_total", "counter", "Requests that could not be served.", c.failed


def _experts(stats: Stats) -> Iterator[Row]:
    e = stats.experts
    yield "edge_speq_experts", "gauge", "Routed experts of the model, over all blocks.", e.total
    yield "edge_speq_expert_slots", "gauge", "Experts that the compute device can hold at once.", e.slots
    yield "edge_speq_expert_hits_total", "counter", "Demands whose expert was in a slot.", e.hits
    yield "edge_speq_expert_misses_total", "counter", "All other demands.", e.misses
    yield "edge_speq_expert_late_total", "counter", "Misses whose transfer was in flight.", e.late
    yield "edge_speq_expert_cpu_computed_total", "counter", "Misses that the CPU computed.", e.cpu_computed
    yield "edge_speq_expert_fetched_total", "counter", "Misses that a transfer served.", e.fetched
    yield "edge_speq_expert_prefetched_total", "counter", "Transfers begun by foresight.", e.prefetched
    yield "edge_speq_expert_prefetched_used_total", "counter", "Of those, the ones demanded.", e.prefetched_used
    yield "edge_speq_expert_failed_total", "counter", "Transfers that failed.", e.failed
    yield "edge_speq_expert_bytes_fetched_total", "counter", "Bytes moved into slots.", e.bytes_fetched
    yield "edge_speq_expert_bytes_wasted_total", "counter", "Bytes of prefetches never used.", e.bytes_wasted
    yield "edge_speq_expert_stall_seconds_total", "counter", "Time that compute waited for experts.", e.stall_ms / 1e3


def _drafts(stats: Stats) -> Iterator[Row]:
    s = stats.speculation
    yield "edge_speq_steps_total", "counter", "Steps, drafted or not.", s.steps
    yield "edge_speq_drafted_tokens_total", "counter", "Draft tokens proposed.", s.drafted
    yield "edge_speq_accepted_tokens_total", "counter", "Draft tokens kept.", s.accepted
    yield "edge_speq_acceptance", "gauge", "Accepted over drafted tokens.", s.acceptance
    yield "edge_speq_mean_draft_tokens", "gauge", "Draft tokens a step.", s.mean_draft_tokens
    yield "edge_speq_used_bytes", "gauge", "Memory in use on the compute device.", stats.used_bytes
    yield "edge_speq_budget_bytes", "gauge", "Its ceiling.", stats.plan.budget_bytes
