"""Rows of results, with the same keys in every format: llama-bench's keys first, then those of edge_speq."""

from __future__ import annotations

import ctypes
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llama_cpp

from edge_speq import __version__, _native
from edge_speq.bench.arms import SLOTS, BenchSettings, Facts
from edge_speq.bench.runner import ArmResult, Bench
from edge_speq.gguf import model as gguf_model
from edge_speq.gguf.fingerprint import header_hash
from edge_speq.system import gpu_drivers

Row = dict[str, Any]


SAMPLES = ("samples_ns", "samples_ts")  # only in JSON, as with llama-bench


FORESEEN = ("precision", "recall", "lead_tokens")


NESTED = (*SAMPLES, "ts_by_class")


def machine(cpu: str, ram_bytes: int | None) -> Row:
    """Return the keys about build and hardware."""
    device = _native.compute_device()
    return {
        "build_commit": _native.llama_cpp_commit()[:9],
        "edge_speq_version": __version__,
        "cpu_info": cpu,
        "gpu_info": device.description if device.is_gpu else "",
        "gpu_driver": ", ".join(gpu_drivers()) if device.is_gpu else "",
        "ram_bytes": ram_bytes,
        "backends": "".join(c for c in device.name if not c.isdigit()) if device.is_gpu else "CPU",
    }


def model_keys(path: str) -> Row:
    """Return the keys about the model's file. model_hash: SHA-256 of each part's header and size."""
    file = gguf_model.check_model(path)
    return {"model_filename": path, "model_hash": header_hash(file)} | _description(path)


def _description(path: str) -> Row:
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    text = ctypes.create_string_buffer(128)
    try:
        llama_cpp.llama_model_desc(model, text, len(text))
        return {
            "model_type": text.value.decode(errors="replace"),
            "model_size": int(llama_cpp.llama_model_size(model)),
            "model_n_params": int(llama_cpp.llama_model_n_params(model)),
        }
    finally:
        llama_cpp.llama_model_free(model)


def rows(results: Iterable[ArmResult], bench: Bench, hardware: Row) -> list[Row]:
    """Return one row for each result, in the order of tests and arms."""
    settings = bench.settings
    common = hardware | model_keys(settings.model)
    done = sorted(results, key=lambda result: settings.cases.index(result.case))
    made = [
        common | _row(result, bench.fleet.facts[result.arm], settings, bench.fleet.budget_bytes or 0) for result in done
    ]
    for row in made:
        row["resident"] = bench.fleet.resident
        row["speedup"] = speedup(row, made, settings.baseline)
    return made


def speedup(row: Row, others: list[Row], baseline: str) -> float | None:
    """Return the speed divided by the baseline's, with the baseline's best draft length.

    None if a text differs by more than near ties, because speeds of different texts cannot be compared.
    """
    alike = [
        other["avg_ts"]
        for other in others
        if other["policy"] == baseline
        and (other["test"], other["n_threads"]) == (row["test"], row["n_threads"])
        and _compares(other)
    ]
    return row["avg_ts"] / max(alike) if alike and _compares(row) else None


def _compares(row: Row) -> bool:
    """Return true if the texts are equal, or near ties of a policy that is not lossy: kernels explain near ties."""
    return row["outputs_match"] is True or (row["outputs_match"] is not False and not row["lossy"])


def _row(result: ArmResult, facts: Facts, settings: BenchSettings, budget: int) -> Row:
    return _test_keys(result, facts) | _edge_keys(result, facts, settings, budget)


def _test_keys(result: ArmResult, facts: Facts) -> Row:
    case = result.case
    times = [round(1e9 * sample.seconds) for sample in result.samples]
    speeds = [sample.speed for sample in result.samples]
    return {
        "n_batch": facts.n_batch,
        "n_ubatch": facts.n_ubatch,
        "n_threads": facts.n_threads,
        "type_k": "f16",
        "type_v": "f16",
        "n_gpu_layers": -1,
        "n_cpu_moe": facts.n_cpu_moe,
        "load_mode": facts.load_mode,
        "flash_attn": facts.flash_attn,
        "n_prompt": case.n_prompt,
        "n_gen": case.n_gen,
        "n_depth": case.n_depth,
        "test": case.name,
        "test_time": result.test_time,
        "avg_ns": round(statistics.mean(times)),
        "stddev_ns": round(deviation(times)),
        "avg_ts": statistics.mean(speeds),
        "stddev_ts": deviation(speeds),
        "samples_ns": times,
        "samples_ts": speeds,
    }


def _edge_keys(result: ArmResult, facts: Facts, settings: BenchSettings, budget: int) -> Row:
    share = facts.resident_fraction
    drafts = settings.draft is not None and result.arm.draft_tokens != 0
    return {
        "policy": result.arm.policy,
        "placement": facts.placement,
        "lossy": facts.lossy,
        "draft": Path(settings.draft).name if drafts and settings.draft is not None else None,
        "on_miss": result.arm.on_miss,
        "draft_tokens": str(result.arm.draft_tokens),
        "resident": None,
        "resident_fraction": share,
        "used_bytes": facts.used_bytes,
        "budget_bytes": budget,
        "over_budget": facts.used_bytes > budget or (facts.is_uncounted and result.arm.policy not in SLOTS),
        **_events(result),
        "ttft_ms": _ttft_ms(result),
        "ts_by_class": _by_class(result),
        "n_texts": len(result.samples[0].passages),
        "link_bytes_per_s": result.link_bytes_per_s,
        "cpu_bytes_per_s": result.cpu_bytes_per_s,
        "contention": result.contention,
        "bound_ts": result.bound_ts,
        "bound_compute": result.bound_compute,
        "bound_fraction": statistics.mean(s.speed for s in result.samples) / result.bound_ts
        if result.bound_ts
        else None,
        "outputs_match": result.verdict.match,
        "first_difference": result.verdict.first_difference,
        "logit_gap": None if result.verdict.logit_gap == math.inf else result.verdict.logit_gap,
        "baseline": settings.baseline,
        "speedup": None,
        "deterministic": settings.deterministic,
        "emulation": settings.emulation,
    }


def _events(result: ArmResult) -> Row:
    """Return the sums over the timed parts of the counted repetitions."""

    def total(name: str) -> float | None:
        values = [sample.events.get(name) for sample in result.samples]
        return None if any(value is None for value in values) else sum(value for value in values if value is not None)

    hits, misses = total("hits"), total("misses")
    drafted, accepted = (sum(getattr(s, name) for s in result.samples) for name in ("drafted", "accepted"))
    foreseen = result.samples[-1].foreseen or {}
    served = hits is not None and misses is not None and hits + misses > 0
    return {
        "hits": hits,
        "misses": misses,
        "hit_rate": hits / (hits + misses) if served and hits is not None and misses is not None else None,
        "bytes_fetched": total("bytes_fetched") if served else None,
        "bytes_wasted": total("bytes_wasted") if served else None,
        "stall_ms": total("stall_ms") if served else None,
        "cpu_computed": total("cpu_computed") if served else None,
        "cpu_ms": total("cpu_ms") if served else None,
        **{f"foresight_{name}": foreseen.get(name) for name in FORESEEN},
        "drafted": drafted,
        "accepted": accepted,
        "acceptance": accepted / drafted if drafted else None,
        "mean_draft_tokens": drafted / steps if (steps := sum(s.n_steps for s in result.samples)) else None,
    }


def _ttft_ms(result: ArmResult) -> float | None:
    times = [p.ttft_seconds for s in result.samples for p in s.passages if p.ttft_seconds is not None]
    return 1e3 * statistics.mean(times) if times else None


def _by_class(result: ArmResult) -> dict[str, float]:
    """Return the tokens per second of each class of texts, over all repetitions."""
    seconds: dict[str, list[float]] = {}
    for sample in result.samples:
        for passage in sample.passages:
            seconds.setdefault(passage.prompt.domain, []).append(passage.seconds)
    return {domain: len(times) * result.case.n_tokens / sum(times) for domain, times in seconds.items()}


def deviation(values: list[Any]) -> float:
    """Return the sample standard deviation (n - 1, as in llama-bench); 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
