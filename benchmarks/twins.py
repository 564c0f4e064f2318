"""Twins of a model, traces of its text, and held-out prompts."""

from __future__ import annotations

import contextlib
import ctypes
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from benchmarks.registry import ROOT
from edge_speq import trace
from edge_speq.bench.recorder import Recorder
from edge_speq.texts import Prompt

TWINS = {"Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K}
CASES = (("1/8", 1), ("1/4", 2), ("1/2", 2), ("1/2", 4))  # share in slots, draft tokens
ALONE = (("1/8", 0), ("1/4", 0), ("1/2", 0))  # without a draft
LINK = 12_500_000_000  # bytes per second
HELD_OUT = ROOT / "tests" / "data" / "prompts"
CLASSES = ("chat", "code", "prose", "textbook")


def make_twin(target: Path, twin: Path, kind: str) -> None:
    """Write the target with its routed experts quantized again, as MoE-SpeQ has its drafts. Needs the package gguf."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        low = Path(folder) / "low.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = TWINS[kind], True, 2
        if llama_cpp.llama_model_quantize(bytes(target), bytes(low), ctypes.byref(params)):
            raise SystemExit(f"cannot quantize {target}")
        whole, few = gguf.GGUFReader(str(target)), gguf.GGUFReader(str(low))
        experts = {tensor.name: tensor for tensor in few.tensors if "_exps" in tensor.name}
        chosen = (experts.get(tensor.name, tensor) for tensor in whole.tensors)
        write_like(whole, twin, ((tensor.name, tensor.data, tensor.tensor_type) for tensor in chosen))


def write_like(
    whole: Any, path: Path, tensors: Iterable[tuple[str, Any, Any]], changed: Callable[[str, Any], Any] | None = None
) -> None:
    """Write the metadata of a gguf.GGUFReader, values passed through `changed`, and tensors: name, data, type."""
    import gguf

    writer = gguf.GGUFWriter(str(path), whole.fields["general.architecture"].contents())
    for name, field in whole.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kinds = {"sub_type": field.types[-1]} if field.types[0] == gguf.GGUFValueType.ARRAY else {}
        value = field.contents() if changed is None else changed(name, field.contents())
        writer.add_key_value(name, value, field.types[0], **kinds)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def record(
    target: Path, draft: Path | None, k: int, path: Path, prompts: Sequence[Prompt], n: int, seeds: Sequence[int] = (1,)
) -> trace.Trace:
    """Text after prompts, k drafted tokens a step; the draft runs on for the routing of the k + 1 tokens after it."""
    if path.exists():
        return trace.read(path)
    options: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
    model = Recorder(str(target), draft=draft, policy="all", draft_tokens=k, lookahead=k + 2 if k else 0, **options)
    about = [{"id": prompt.id, "domain": prompt.domain} for _ in seeds for prompt in prompts]
    with contextlib.closing(model), trace.Writer(path, model.meta() | {"prompts": about}) as out:
        model.sink = out.add
        for index, (seed, prompt) in enumerate((seed, prompt) for seed in seeds for prompt in prompts):
            model.begin_passage(index)
            model.create_completion(prompt.text, max_tokens=n, temperature=0.8, seed=seed)
        model.write()
        out.meta |= model.meta()
    return trace.read(path)


def held_out(n: int = 3) -> list[str]:
    """The first n held-out prompts of each class, the classes interleaved."""
    texts = [(HELD_OUT / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:n] for name in CLASSES]
    return [json.loads(line)["prompt"] for lines in zip(*texts, strict=True) for line in lines]
