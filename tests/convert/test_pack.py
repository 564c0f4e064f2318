"""convert pack: other layouts of the same weights, which stock llama.cpp and slots run to the same logits."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models
from support.numerics import ROUNDING, logits, nmse

from edge_speq import EdgeError, EdgeLlama, _native
from edge_speq.cli.main import main
from edge_speq.convert import ordering, pack
from edge_speq.convert.evaluation import activations
from edge_speq.convert.pack import PackOptions
from edge_speq.gguf import container
from edge_speq.gguf.model import check_model
from edge_speq.gguf.rewrite import Rewrite, Source
from edge_speq.runtime import loading


def contents(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes, by gguf-py."""
    return {tensor.name: tensor.data.tobytes() for tensor in tiny_models.gguf.GGUFReader(path).tensors}


def test_nothing_changed_gives_the_same_file(tiny: Any, tmp_path: Path) -> None:
    model, out = tiny.moe("deepseek2"), tmp_path / "out.gguf"
    with Source(check_model(model)) as source:
        rewrite = Rewrite(source, {}, [source.copy(tensor) for tensor in source.file.tensors.values()])
        rewrite.write(out)
    assert out.read_bytes() == model.read_bytes()
    assert rewrite.size == out.stat().st_size


@pytest.mark.parametrize("alignment", [64, 4096, 65536])
def test_every_tensor_begins_on_a_page(bundled: tuple[Path, Path], tmp_path: Path, alignment: int) -> None:
    out = tmp_path / "out.gguf"
    made = pack.pack(bundled[0], out, PackOptions(alignment))
    assert out.stat().st_size == made.n_bytes
    tensors = tiny_models.gguf.GGUFReader(out).tensors
    assert all(tensor.data_offset % alignment == 0 for tensor in tensors)
    assert contents(out) == contents(bundled[0])
    names = [tensor.name for tensor in tensors]
    first = next(i for i, name in enumerate(names) if "_exps" in name)
    assert names[first : first + 4] == [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down")] + [
        "blk.1.ffn_gate_exps.weight"
    ]
    assert not any("_exps" in name for name in names[:first])
    np.testing.assert_array_equal(logits(out), logits(bundled[0]))


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
def test_gate_and_up_fused_are_two_reads_an_expert(tiny: Any, tmp_path: Path, kind: str) -> None:
    """Bit for bit the same logits and the same counters, from slots with two tensors instead of three."""
    model, out = tiny.moe("deepseek2", kind), tmp_path / "out.gguf"
    made = pack.pack(model, out, PackOptions(fuse=True))
    assert (made.fused_blocks, made.reads_per_expert, made.unfused) == (3, 2, None)
    np.testing.assert_array_equal(logits(out), logits(model))
    seen = []
    for path in (model, out):
        options = {"resident": "3/4", "policy": "lru", "deterministic": True, "logits_all": True}
        with contextlib.closing(EdgeLlama(str(path), n_ctx=128, n_threads=1, n_threads_batch=1, **options)) as llm:
            for token in range(20, 60):
                llm.eval([token])
            seen.append((llm._scores[: llm.n_tokens].copy(), llm.stats().experts))
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    assert seen[0][1].misses
    for name in ("total", "slots", "hits", "misses", "fetched", "bytes_fetched"):
        assert getattr(seen[1][1], name) == getattr(seen[0][1], name), name


def test_what_cannot_be_fused_stays_apart_and_says_why(tiny: Any, tmp_path: Path) -> None:
    model = tiny.moe("qwen3moe")
    made = pack.pack(model, tmp_path / "out.gguf", PackOptions())
    assert made.fused_blocks == 0 and made.unfused is not None and "qwen3moe" in made.unfused
    with pytest.raises(EdgeError, match="does not support a fused tensor"):
        pack.pack(model, tmp_path / "other.gguf", PackOptions(fuse=True))
    scaled = tiny.moe("deepseek2", scales=True)
    with pytest.raises(EdgeError, match="scale"):
        pack.pack(scaled, tmp_path / "other.gguf", PackOptions(fuse=True))


def test_experts_chosen_together_lie_together(
    bundled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    assert main(["convert", "pack", str(bundled[0]), "-o", str(out), "--order", "bundled", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["runs"] < 0.97 * made["runs_before"]
    # the new model's own routing on that text is the old one's under new numbers
    before, after = (activations.routing(path, activations.calibration()[:2]) for path in (bundled[0], out))
    trace = activations.routing(bundled[0], activations.calibration())
    order = ordering.chain(trace[0], 32)
    assert sorted(order) == list(range(32))
    same = np.mean([set(order[a]) == set(b) for a, b in zip(after[0], before[0], strict=True)])
    assert same > 0.999
    a, b = logits(bundled[0]), logits(out)
    assert nmse(a[:4], b[:4]) < 1e-10  # the softmax adds in another order
    assert nmse(a, b) < ROUNDING
    np.testing.assert_array_equal(slots(out), slots(out, everything=True))


def slots(path: Path, *, everything: bool = False) -> Any:
    options: dict[str, Any] = {"policy": "all"} if everything else {"resident": "1/2", "policy": "lru"}
    with contextlib.closing(EdgeLlama(str(path), n_ctx=128, n_threads=1, logits_all=True, **options)) as llm:
        for token in range(200, 230):
            llm.eval([token])
        return llm._scores[: llm.n_tokens].copy()


@pytest.mark.parametrize("arch", ["gpt-oss", "granitemoe"])
def test_biases_and_scales_follow_their_experts(tiny: Any, tmp_path: Path, arch: Any) -> None:
    model, out = tiny.moe(arch), tmp_path / "out.gguf"
    blocks = {str(block): [[5, 1], [5, 1], [1, 7], [0, 5]] for block in range(4)}
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"routing": blocks}))
    made = pack.pack(model, out, PackOptions(order=str(trace)))
    assert made.runs is not None and made.runs_before is not None
    assert made.runs < made.runs_before
    assert contents(out) != contents(model)
    assert nmse(logits(model), logits(out)) < ROUNDING


def test_the_chain_begins_with_the_busiest_and_goes_on_with_its_company() -> None:
    ids = np.array([[3, 0], [3, 0], [3, 5], [1, 2]], np.int32)
    assert list(ordering.chain(ids, 6))[:3] == [3, 0, 5] or list(ordering.chain(ids, 6))[:2] == [3, 0]
    assert ordering.runs(ids, np.arange(6)) == 7 / 4
    assert ordering.runs(ids, np.array([3, 0, 1, 2, 4, 5])) == 5 / 4


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("no json", "is not a trace"),
        ('{"routing": {}}', "is not a trace"),
        ('{"routing": {"0": [[1, 2], [3]]}}', "is not a trace"),
        ('{"routing": {"0": [[1, 8]]}}', "not of this model"),
        ('{"routing": {"99": [[1, 2]]}}', "not of this model"),
        ("[1]", "is not a trace"),
    ],
)
def test_bad_traces_are_refused(tiny: Any, tmp_path: Path, content: str, match: str) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(content)
    with pytest.raises(EdgeError, match=match):
        pack.pack(tiny.moe("qwen3moe"), tmp_path / "out.gguf", PackOptions(order=str(trace)))
    assert list(tmp_path.iterdir()) == [trace]


def test_groups_keep_their_order_and_alignments_are_powers_of_two(tiny: Any, tmp_path: Path) -> None:
    for arch in ("deepseek2", "grovemoe"):
        with pytest.raises(EdgeError, match=r"groups|change places"):
            pack.pack(tiny.moe(arch), tmp_path / "out.gguf", PackOptions(order="bundled"))
    for alignment in (16, 48, 1 << 17):
        with pytest.raises(EdgeError, match="power of two"):
            pack.pack(tiny.moe("qwen3moe"), tmp_path / "out.gguf", PackOptions(alignment))


@pytest.mark.parametrize("no_tensor_first", [False, True])
def test_a_model_in_parts_becomes_one_file(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_tensor_first: bool
) -> None:
    """Parts without alignment of their own, and a first part that holds the fields only."""
    writer = partial(tiny_models.gguf.GGUFWriter, split_max_tensors=7, small_first_shard=no_tensor_first)
    with monkeypatch.context() as patched:
        patched.setattr(tiny_models.gguf, "GGUFWriter", writer)
        tiny_models.write_tiny(tmp_path / "moe.gguf", "qwen3moe", n_layer=4)
    first, out = min(tmp_path.glob("moe-*")), tmp_path / "out.gguf"
    pack.pack(first, out, PackOptions(32))
    assert not any(key.startswith("split.") for key in container.read(out).fields)
    assert contents(out) == contents(tiny.moe("qwen3moe"))
    np.testing.assert_array_equal(logits(out), logits(tiny.moe("qwen3moe")))


def test_slots_see_two_tensors_of_a_fused_model(tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    pack.pack(tiny.moe("deepseek2"), out, PackOptions())
    params = loading.llama_cpp.llama_model_default_params()
    keep = loading.experts_on_host(params)
    sizes = []
    for path in (tiny.moe("deepseek2"), out):
        with contextlib.closing(loading.load_model(path, params, "model")) as model:
            sizes.append(_native.model_experts(model.model))
    del keep
    assert sizes[0] == sizes[1]
