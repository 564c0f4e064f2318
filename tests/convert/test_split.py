"""convert split: any model of a known architecture gives the same logits from sub-experts, in stock llama.cpp too."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from support.numerics import ROUNDING, logits, nmse

from edge_speq import EdgeError, EdgeLlama
from edge_speq.cli.main import main
from edge_speq.convert.evaluation import activations, reader
from edge_speq.convert.sub_experts import elastic_k, partition, router_tilt, split
from edge_speq.convert.sub_experts.options import SplitOptions
from edge_speq.gguf import quant_blocks
from edge_speq.gguf.model import check_model
from edge_speq.gguf.rewrite import Changes, Rewrite, Source

AS_IT_IS = {"profiled": False}


def changed(model: Path, out: Path, changes: Changes) -> Path:
    """The model with other fields."""
    with Source(check_model(model)) as source:
        tensors = [source.copy(tensor) for tensor in source.file.tensors.values()]
        Rewrite(source, changes, tensors).write(out)
    return out


@pytest.fixture(scope="module")
def whole(bundled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled target in F16: neurons may go anywhere."""
    path = tmp_path_factory.mktemp("f16") / "f16.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_F16, True, 2
    assert llama_cpp.llama_model_quantize(bytes(bundled[0]), bytes(path), ctypes.byref(params)) == 0
    return path


@pytest.mark.parametrize("n_spare", [1, 2])
def test_annealing_finds_the_best_partition_of_a_few_units(n_spare: int) -> None:
    activation = np.random.default_rng(0).gamma(0.3, size=(3, 6, 20)).astype(np.float32)
    ways = [[split.index(i) if i in split else 0 for i in range(6)] for split in itertools.permutations(range(6), 6)]
    ways = np.unique(np.array(ways) // 2, axis=0)  # every way to deal six units to three parts
    costs = np.array(
        [partition.objective(partition.masses(activation, np.tile(way, (3, 1)), 3), n_spare) for way in ways]
    )
    best = costs.min(axis=0) / activation.sum(axis=(1, 2))
    start = partition.greedy(activation.sum(axis=2), 3)
    parts, before, after = partition.anneal(activation, start, 3, n_spare, seed=1, iterations=3000)
    assert (np.stack([(parts == n).sum(axis=1) for n in range(3)]) == 2).all()
    assert (after <= before).all()
    np.testing.assert_allclose(after, best, rtol=1e-5)
    again, *_ = partition.anneal(activation, start, 3, n_spare, seed=1, iterations=3000)
    np.testing.assert_array_equal(again, parts)


@pytest.mark.parametrize("kind", sorted(quant_blocks.SCALABLE))
def test_scales_of_blocks_are_multiplied_in_place(kind: str) -> None:
    random = np.random.default_rng(2)
    elements, size = quant_blocks.block(kind)
    blocks = random.integers(0, 256, (64, size), np.uint8)
    if kind == "F32":
        blocks[:] = random.standard_normal(64, np.float32).view(np.uint8).reshape(64, 4)
    elif kind == "BF16":
        blocks[:] = (
            (random.standard_normal(64, np.float32).view(np.uint32) >> 16).astype(np.uint16)[:, None].view(np.uint8)
        )
    elif kind == "MXFP4":
        blocks[:, 0] = random.integers(100, 130, 64)
    for offset in quant_blocks.HALVES.get(kind, ()):
        blocks[:, offset : offset + 2] = random.uniform(1e-6, 2.0, (64, 1)).astype(np.float16).view(np.uint8)
    plain = quant_blocks.dequantize(blocks.tobytes(), kind, elements)
    for factor in (2, 4, 8):
        scaled = quant_blocks.dequantize(quant_blocks.scale(blocks, kind, factor).tobytes(), kind, elements)
        np.testing.assert_array_equal(scaled, plain * factor)
    if kind == "MXFP4":
        with pytest.raises(EdgeError, match="cannot hold 3 times"):
            quant_blocks.scale(blocks, kind, 3)
        return
    scaled = quant_blocks.dequantize(quant_blocks.scale(blocks, kind, 3).tobytes(), kind, elements)
    bound = np.abs(plain).max() * (
        2**-7 if kind == "BF16" else 2**-8
    )  # of differences of scaled numbers, in some types
    np.testing.assert_allclose(scaled, plain * 3, atol=bound)


def test_a_scale_that_would_overflow_is_refused() -> None:
    with pytest.raises(EdgeError, match="requantize"):
        quant_blocks.scale(np.array([[40000.0]], np.float16).view(np.uint8), "F16", 2)


@pytest.mark.parametrize(
    ("arch", "kind", "n", "options"),
    [
        ("qwen3moe", "F16", 4, {}),
        ("qwen3moe", "F16", 2, {"scales": True}),
        ("qwen3moe", "Q8_0", 4, {}),
        ("qwen3moe", "Q4_0", 8, {}),
        ("qwen3moe", "Q4_K_M", 2, {"n_ff": 512}),
        ("qwen3moe", "Q8_0", 3, {"n_ff": 384}),
        ("qwen3moe", "Q4_K_M", 3, {"n_ff": 768, "n_layer": 2}),
        ("mixtral", "F16", 3, {"n_ff": 384, "scales": True}),
        ("mixtral", "F16", 4, {}),
        ("mixtral", "Q4_K_M", 4, {"n_ff": 1024, "n_layer": 2}),
        ("olmoe", "F16", 4, {}),
        ("qwen2moe", "Q8_0", 4, {}),
        ("phimoe", "F16", 4, {}),
        ("granitemoe", "Q8_0", 2, {}),
        ("gpt-oss", "F16", 4, {}),
        ("gpt-oss", "MXFP4", 4, {}),
    ],
)  # fmt: skip
def test_all_parts_active_are_the_model(
    tiny: Any, tmp_path: Path, arch: Any, kind: str, n: int, options: dict[str, Any]
) -> None:
    model = tiny.moe(arch, kind, **options)
    out = tmp_path / "split.gguf"
    made = split.split(model, out, SplitOptions(n, **AS_IT_IS))
    assert (made.n_expert, made.n_expert_used) == (8 * n, 2 * n)
    assert out.stat().st_size == made.n_bytes
    assert made.exact_scale
    assert nmse(logits(model), logits(out)) < ROUNDING


def test_scales_are_rounded_where_n_is_no_power_of_two_and_the_graph_has_none(tiny: Any, tmp_path: Path) -> None:
    model, out = tiny.moe("olmoe", n_ff=384), tmp_path / "split.gguf"
    assert not split.split(model, out, SplitOptions(3, **AS_IT_IS)).exact_scale
    assert nmse(logits(model), logits(out)) < 10 * ROUNDING


@pytest.mark.parametrize("gate", ["split", "fused"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("function", [1, 2])
def test_softmax_and_sigmoid_gates_normalised_or_not(
    tiny: Any, tmp_path: Path, function: int, norm: bool, gate: str
) -> None:
    """deepseek2 says in the file how it weighs its experts, and biases the choice."""
    prefix = "deepseek2.expert"
    changes = {f"{prefix}_group_count": None, f"{prefix}_group_used_count": None}
    changes |= {f"{prefix}_gating_func": (4, function), f"{prefix}_weights_norm": (7, norm)}
    model = changed(tiny.moe("deepseek2", gate=gate, n_layer=2), tmp_path / "model.gguf", changes)
    out = tmp_path / "split.gguf"
    split.split(model, out, SplitOptions(4, **AS_IT_IS))
    assert nmse(logits(model), logits(out)) < ROUNDING


def test_partitioned_neurons_are_the_model_too(whole: Path, tmp_path: Path) -> None:
    """Neurons anywhere, as the profile has them; and profile, partition and file are the same the second time."""
    outs = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    made = [split.split(whole, out, SplitOptions(4, iterations=1000)) for out in outs]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert made[0].objective is not None and made[0].objective_contiguous is not None
    assert made[0].objective < 0.95 * made[0].objective_contiguous
    texts = activations.held_out()["prose"][:2]
    with contextlib.closing(reader.Reader(whole)) as a, contextlib.closing(reader.Reader(outs[0])) as b:
        for window in activations.chunks(a, texts):
            expected = a.logits(window)
            assert nmse(expected, b.logits(window)) < ROUNDING
    assert not list(tmp_path.glob(".*"))


def test_a_quantized_model_whose_blocks_are_too_wide_is_requantized(
    bundled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "split.gguf"
    arguments = ["convert", "split", str(bundled[0]), "-o", str(out), "--sub-experts", "4"]
    assert main(arguments) == 2
    assert "IQ4_XS" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--requantize", "q8_0", "--no-profile", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["n_bytes"] == out.stat().st_size
    texts = [text for some in activations.held_out().values() for text in some[:1]]
    assert activations.perplexity(out, texts) == pytest.approx(activations.perplexity(bundled[0], texts), rel=0.01)


def test_slots_hold_sub_experts(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "split.gguf"
    split.split(whole, out, SplitOptions(4, **AS_IT_IS))
    options = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "logits_all": True}
    rows, sizes = [], []
    for path, more in ((whole, {}), (out, {}), (out, {"resident": "1/2", "policy": "lru"})):
        with contextlib.closing(EdgeLlama(str(path), **options, **more)) as model:
            for token in model.tokenize(b"The old house stood at the end of"):
                model.eval([token])
            rows.append(model._scores[: model.n_tokens].copy())
            sizes.append(model.stats().experts)
    assert nmse(rows[0], rows[1]) < ROUNDING
    np.testing.assert_array_equal(rows[2], rows[1])
    assert sizes[2].misses and sizes[2].hits
    assert sizes[2].total == 4 * 6 * 32


@pytest.mark.long
def test_fewer_parts_lose_some_and_read_less(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "split.gguf"
    made = split.split(whole, out, SplitOptions(4, used=12, **AS_IT_IS))
    assert made.n_expert_used == 12 < made.n_expert_used_full == 16
    before = out.read_bytes()
    points = elastic_k.points(out, [16, 8], token_bytes=made.sub_expert_bytes * 6)
    assert out.read_bytes() == before
    assert points[0].bytes_per_token == 2 * points[1].bytes_per_token
    texts = [text for some in activations.held_out().values() for text in some]
    assert points[0].perplexity == pytest.approx(activations.perplexity(whole, texts), rel=1e-3)
    assert points[0].perplexity < activations.perplexity(out, texts) < points[1].perplexity


def test_tilts_weigh_as_much_as_none_and_the_constant_is_one() -> None:
    random = np.random.default_rng(4)
    totals = random.gamma(0.5, size=(5, 12))
    totals[2] = 0  # an expert that no token chose
    order = router_tilt.by_mass(totals, 4)
    assert (np.sort(order.reshape(5, -1), axis=1) == np.arange(12)).all()
    t = router_tilt.tilts(totals, order, 0.5)
    np.testing.assert_allclose(np.exp(t).mean(axis=1), 1)
    assert (t[2] == 0).all()
    assert (np.diff(t[[0, 1, 3, 4]], axis=1) <= 0).all()
    x = (random.standard_normal((300, 64)) * 0.3 + random.standard_normal(64)).astype(np.float32)
    u = router_tilt.constant(x[:200])
    assert np.abs(x[200:] @ u - 1).mean() < 0.1


@pytest.mark.long
def test_a_tilted_router_drops_what_matters_less(whole: Path, tmp_path: Path) -> None:
    """Of the same bytes a token, a tilt loses less than dropping whole experts; with all parts it loses a little."""
    out, texts = tmp_path / "split.gguf", [text for some in activations.held_out().values() for text in some]
    planned = split.split(whole, out, SplitOptions(4, tilt=0.25), dry_run=True)
    made = split.split(whole, out, SplitOptions(4, tilt=0.25))
    assert planned.n_bytes == made.n_bytes == out.stat().st_size
    source = activations.perplexity(whole, texts)
    assert activations.perplexity(out, texts) == pytest.approx(source, rel=0.01)
    tilted = elastic_k.points(out, [12], 1)[0].perplexity
    split.split(whole, out, SplitOptions(4, used=12, **AS_IT_IS), force=True)
    assert source < tilted < activations.perplexity(out, texts)


def test_a_tilt_needs_scales_in_the_graph_and_a_profile(tiny: Any, tmp_path: Path) -> None:
    for model, wanted in (
        (tiny.moe("olmoe"), SplitOptions(4, tilt=0.25)),
        (tiny.moe("qwen3moe"), SplitOptions(4, tilt=0.25, **AS_IT_IS)),
        (tiny.moe("qwen3moe"), SplitOptions(4, tilt=1.5)),
    ):
        with pytest.raises(EdgeError, match="tilt"):
            split.split(model, tmp_path / "out.gguf", wanted)


@pytest.mark.parametrize(
    ("arch", "kind", "n", "match"),
    [
        ("qwen3moe", "F16", 3, r"256 neurons, in blocks of 1 \(F16\).* allow 2, 4, 8, 16, 32, 64, 128"),
        ("qwen3moe", "Q8_0", 16, r"blocks of 32 \(Q8_0\).* allow 2, 4, 8"),
        ("qwen3moe", "Q4_K_M", 2, "allow none"),
        ("qwen3moe", "F16", 256, "at most 1024 experts"),
        ("deepseek2", "F16", 2, "chooses groups of experts"),
        ("grovemoe", "F16", 2, "grovemoe"),
    ],
)
def test_what_cannot_be_split_is_refused(tiny: Any, tmp_path: Path, arch: Any, kind: str, n: int, match: str) -> None:
    with pytest.raises(EdgeError, match=match) as refused:
        split.split(tiny.moe(arch, kind), tmp_path / "out.gguf", SplitOptions(n, **AS_IT_IS))
    assert refused.value.usage
    assert not list(tmp_path.iterdir())


def test_a_dense_model_and_an_impossible_k_are_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="no routed experts"):
        split.split(tiny.dense(), tmp_path / "out.gguf", SplitOptions(2, **AS_IT_IS))
    with pytest.raises(EdgeError, match="give 1 to 4"):
        split.split(tiny.moe("qwen3moe"), tmp_path / "out.gguf", SplitOptions(2, used=5, **AS_IT_IS))


def test_a_text_of_a_few_tokens_leaves_nothing_behind(tiny: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words of text")
    with pytest.raises(EdgeError, match="is too short"):
        split.split(tiny.moe("qwen3moe"), tmp_path / "out.gguf", SplitOptions(2, text=text))
    assert list(tmp_path.iterdir()) == [text]


def test_a_dry_run_knows_the_size_and_writes_nothing(tiny: Any, tmp_path: Path) -> None:
    model, out = tiny.moe("qwen3moe"), tmp_path / "out.gguf"
    planned = split.split(model, out, SplitOptions(4), dry_run=True)
    assert not list(tmp_path.iterdir())
    split.split(model, out, SplitOptions(4, **AS_IT_IS))
    assert out.stat().st_size == planned.n_bytes
    with pytest.raises(EdgeError, match="exists already"):
        split.split(model, out, SplitOptions(4), dry_run=True)


def test_memory_stays_below_two_tensors(tiny: Any, tmp_path: Path) -> None:
    model = tiny.moe("mixtral", n_ff=2048, n_layer=2)
    largest = max(tensor.n_bytes for tensor in check_model(model).tensors.values())
    split.split(model, tmp_path / "out.gguf", SplitOptions(4, **AS_IT_IS))  # imports
    tracemalloc.start()
    try:
        split.split(model, tmp_path / "out.gguf", SplitOptions(4, **AS_IT_IS), force=True)
        assert tracemalloc.get_traced_memory()[1] < 2 * largest
    finally:
        tracemalloc.stop()
