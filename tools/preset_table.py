"""Every preset on the bundled model, or another one: the tables of docs/presets.md.

    python tools/preset_table.py -o docs/measurements/presets.json
    python tools/preset_table.py -m moe2.gguf -o docs/measurements/presets_moe2.json    # made by tools/train_moe.py

Drafts are twins as MoE-SpeQ has them: the target's own dense weights with its routed experts at fewer bits, Q4_K_M and
Q2_K, made here (needs the package gguf). They are recorded once over held-out prompts of four classes and replayed
under every preset, over a virtual link of 12.5 GB/s and blocks that compute half as long as an expert travels.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from edge_speq import _native, trace
from edge_speq import texts as prompts
from edge_speq.bench.recorder import Recorder
from edge_speq.gguf import bundled as demo
from edge_speq.policies.registry import PRESETS
from edge_speq.simulate import report

TWINS = {"Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K}
CASES = (("1/8", 1), ("1/4", 2), ("1/2", 2), ("1/2", 4))
NAMES = [name for name in PRESETS if name != "learned"]  # tools/learned_table.py has that
LINK = 12_500_000_000
N_TEXTS, N_TOKENS = 4, 64  # of each class, of each text


def make_twin(target: Path, twin: Path, kind: int) -> None:
    """The target with its routed experts quantized again."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        low = Path(folder) / "low.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = kind, True, 2
        if llama_cpp.llama_model_quantize(bytes(target), bytes(low), ctypes.byref(params)):
            raise SystemExit(f"cannot quantize {target}")
        whole, few = gguf.GGUFReader(str(target)), gguf.GGUFReader(str(low))
        experts = {tensor.name: tensor for tensor in few.tensors if "_exps" in tensor.name}
        chosen = (experts.get(tensor.name, tensor) for tensor in whole.tensors)
        write_like(whole, twin, ((tensor.name, tensor.data, tensor.tensor_type) for tensor in chosen))


def write_like(
    whole: Any, path: Path, tensors: Iterable[tuple[str, Any, Any]], changed: Callable[[str, Any], Any] | None = None
) -> None:
    """A file with the metadata of a gguf.GGUFReader's, values as `changed` has them by name, and these tensors: name,
    data, type."""
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


def record(target: Path, twin: Path, k: int, path: Path, n_texts: int, n_tokens: int) -> trace.Trace:
    """K drafted tokens a step; the draft runs on for the routing of the K + 1 tokens after the step."""
    chosen = prompts.bundled(n_texts).chosen
    model = Recorder(
        str(target), draft=str(twin), policy="all", draft_tokens=k, lookahead=k + 2, n_ctx=512, n_threads=2
    )
    about = [{"id": prompt.id, "domain": prompt.domain} for prompt in chosen]
    with contextlib.closing(model), trace.Writer(path, model.meta() | {"prompts": about}) as out:
        model.sink = out.add
        for index, prompt in enumerate(chosen):
            model.begin_passage(index)
            model.create_completion(prompt.text, max_tokens=n_tokens, temperature=0.8, seed=1)
        model.write()
        out.meta |= model.meta()
    return trace.read(path)


def table(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """Share of the gap from LRU to Belady that is closed, in misses and in bytes read, and stalls relative to LRU's.
    In stored rows what is nothing was left out."""
    columns = [(share, k) for share, k in CASES]
    heads = " | ".join(f"{share}, K = {k}" for share, k in columns)
    lines = [f"| {kind} twin | {heads} |", "|---" * (len(columns) + 1) + "|"]
    names = {row["policy"] for row in rows}
    for name in (name for name in NAMES if name in names):  # older tables have fewer
        cells = []
        for share, k in columns:
            mine = {row["policy"]: row for row in rows if (row["share"], row["k"], row["twin"]) == (share, k, kind)}
            row, stall = mine[name], mine["lru"]["stall_ms"]
            gaps = f"{_percent(row.get('miss_gap', 0))} / {_percent(row.get('read_gap', 0))}"
            cells.append(f"{gaps}, {row.get('stall_ms', 0) / stall:.2f}")
        lines.append(f"| {name}{' (lossy)' if row.get('lossy') else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{round(100 * share)} %"  # None: LRU does as well as Belady


def foresight_lines(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| twin | K | acceptance | same set | window of 4: precision, recall on the text | on what was verified |"]
    lines.append("|---|---|---|---|---|---|")
    for kind in TWINS:
        for k in sorted({k for _, k in CASES}):
            row = next(r for r in rows if (r["twin"], r["k"], r["policy"]) == (kind, k, "waits"))
            f = row["foresight"]
            verified = f"{f['verified_precision']:.2f}, {f['verified_recall']:.2f}" if k >= 3 else "–"
            lines.append(
                f"| {kind} | {k} | {row['acceptance']:.2f} | {f['same_set']:.2f} "
                f"| {f['kept_precision']:.2f}, {f['kept_recall']:.2f} | {verified} |"
            )
    return "\n".join(lines)


BY_CLASS = ("waits", "waits-keep")  # whose classes are stored, too
LEFT_OUT = ("trace", "link_bytes_per_s", "bound_fraction", "kept_pairs")


def stored(rows: list[Any]) -> str:
    """A line a row, five significant digits."""
    short = json.loads(report.as_json(rows), parse_float=lambda text: float(f"{float(text):.5g}"))
    lines = [{k: v for k, v in row.items() if k not in LEFT_OUT and v not in (None, False)} for row in short]
    return "[\n" + ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines) + "\n]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, help="a MoE of more bits than the twins (the bundled model)")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--texts", type=int, default=N_TEXTS, help="of each class (%(default)s)")
    parser.add_argument("--tokens", type=int, default=N_TOKENS, help="of each text (%(default)s)")
    arguments = parser.parse_args()
    _native.load_backends()
    target = arguments.model or demo.path(demo.MODEL)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, ftype in TWINS.items():
            twin = Path(folder) / f"{kind}.gguf"
            make_twin(target, twin, ftype)
            length = arguments.texts, arguments.tokens
            traces = {k: record(target, twin, k, Path(folder) / f"{kind}-{k}.npz", *length) for _, k in CASES}
            for share, k in CASES:
                print(f"{kind}, K = {k}, {share} resident", file=sys.stderr)
                numerator, denominator = share.split("/")
                wanted = report.SimulateOptions(NAMES, [int(numerator) / int(denominator)], LINK, by_class=True)
                made = report.simulate([traces[k]], wanted)
                rows += [row | {"share": share, "twin": kind} for row in made]
    whole = [row for row in rows if row["domain"] == "all"]
    if arguments.out:
        kept = [row for row in rows if row["domain"] == "all" or row["policy"] in BY_CLASS]
        arguments.out.write_text(stored(kept), encoding="utf-8")
    print("\n\n".join([*(table(whole, kind) for kind in TWINS), foresight_lines(whole)]))


if __name__ == "__main__":
    main()
