"""convert.quantization.quantize and sensitivity: the sizes foretold, the types asked for, the same bytes every time."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support import tiny_models

from edge_speq.convert.evaluation import reader
from edge_speq.convert.quantization import imatrix, quantize, sensitivity, types
from edge_speq.errors import EdgeError
from edge_speq.gguf import container


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kinds(path: Path) -> dict[str, str]:
    return {name: tensor.type.lower() for name, tensor in container.read(path).tensors.items()}


@pytest.fixture(scope="module")
def importance(bundled: tuple[Path, Path]) -> imatrix.Importance:
    return imatrix.collect(bundled[0], reader.read_text(None), dataset="prompts", most=512)


@pytest.mark.parametrize("ftype", ["q4_k_m", "q8_0", "f16", "q2_k"])
@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "deepseek2"])
def test_the_size_is_known_to_the_byte_before(arch: tiny_models.Arch, ftype: str, tiny, tmp_path: Path) -> None:
    source, out = tiny.moe(arch), tmp_path / "out.gguf"
    recipe = quantize.recipe(ftype)
    planned = quantize.plan(source, recipe)
    assert quantize.quantize(source, out, recipe) == planned
    assert out.stat().st_size == planned.n_bytes
    assert kinds(out) == planned.types
    assert sum(planned.bytes_by_type.values()) == sum(t.n_bytes for t in container.read(out).tensors.values())


def test_a_dense_model_and_keys_that_are_added_count_too(tiny, tmp_path: Path) -> None:
    recipe = quantize.Recipe(types.ftype("q5_0"), texts={"general.description": "x" * 100})
    planned = quantize.quantize(tiny.dense(), tmp_path / "out.gguf", recipe)
    assert (tmp_path / "out.gguf").stat().st_size == planned.n_bytes
    assert container.read(tmp_path / "out.gguf").fields["general.description"].value == "x" * 100


def test_a_split_model_becomes_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models.gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=7))
    tiny_models.write_tiny(tmp_path / "moe.gguf", "qwen3moe", n_layer=2)
    first = min(tmp_path.glob("moe-00001-of-*.gguf"))
    planned = quantize.quantize(first, tmp_path / "out.gguf", quantize.recipe("q8_0"))
    assert (tmp_path / "out.gguf").stat().st_size == planned.n_bytes
    assert "split.count" not in container.read(tmp_path / "out.gguf").fields


def test_another_alignment_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp pads to 32 bytes whatever the key says, so the key must say 32."""
    begin = tiny_models._begin

    def aligned(*arguments: Any) -> gguf.GGUFWriter:
        writer = begin(*arguments)
        writer.add_custom_alignment(4096)
        return writer

    monkeypatch.setattr(tiny_models, "_begin", aligned)
    source = tiny_models.write_tiny(tmp_path / "aligned.gguf", "qwen3moe", n_layer=2)
    assert container.read(source).fields["general.alignment"].value == 4096
    planned = quantize.quantize(source, tmp_path / "out.gguf", quantize.recipe("q8_0"))
    assert (tmp_path / "out.gguf").stat().st_size == planned.n_bytes


def test_the_bytes_repeat(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize.quantize(bundled[1], tmp_path / name, quantize.recipe("q4_k_m"))
    assert sha(tmp_path / "a") == sha(tmp_path / "b")


def test_tensor_types_come_first_then_experts(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = quantize.recipe("q6_k", ["ffn_down_exps=q5_k"], "q3_k", {2: "q4_k"})
    quantize.quantize(bundled[0], tmp_path / "out.gguf", recipe)
    found = kinds(tmp_path / "out.gguf")
    for name, kind in found.items():
        match = re.fullmatch(r"blk\.(\d+)\.ffn_(up|gate|down)_exps\.weight", name)
        if match:
            assert kind == ("q5_k" if match[2] == "down" else "q4_k" if match[1] == "2" else "q3_k"), name
        elif "attn_q.weight" in name:
            assert kind == "q6_k"


def test_types_that_do_not_fit_the_rows_are_counted(tiny, tmp_path: Path) -> None:
    source = tiny.moe("qwen3moe", n_ff=96)
    planned = quantize.quantize(source, tmp_path / "out.gguf", quantize.recipe("q4_k_m"))
    assert planned.fell_back == 4  # down of each block
    assert {kind for name, kind in kinds(tmp_path / "out.gguf").items() if "down" in name} <= {"q5_0", "q8_0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("q9_9",), "not a file type"),
        (("q4_k_m", ["attn_v"]), "not PATTERN=TYPE"),
        (("q4_k_m", ["attn_v=q9"]), "not a tensor type"),
        (("q4_k_m", ["attn_(=q8_0"]), "not a pattern"),
        (("q4_k_m", (), "i32"), "not a tensor type"),
        (("f16", (), "q4_k"), "uses tensor types only"),
    ],
)
def test_bad_recipes_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(EdgeError, match=message) as refused:
        quantize.recipe(*arguments)
    assert refused.value.usage


def test_a_pattern_that_matches_nothing_is_a_mistake(bundled: tuple[Path, Path]) -> None:
    with pytest.raises(EdgeError, match=r"no tensor of .* has a name like 'attn_w'"):
        quantize.plan(bundled[0], quantize.recipe("q8_0", ["attn_w=q8_0"]))


@pytest.mark.long
def test_low_bits_need_an_importance_matrix(
    bundled: tuple[Path, Path], importance: imatrix.Importance, tmp_path: Path
) -> None:
    with pytest.raises(EdgeError, match="needs an importance matrix"):
        quantize.quantize(bundled[1], tmp_path / "out.gguf", quantize.recipe("iq2_xs"))
    options = {"importance": importance, "importance_name": "prompts.gguf"}
    recipe = quantize.recipe("q6_k", ["blk.[0-4].ffn.*_exps=q6_k"], "iq2_xs", **options)
    planned = quantize.quantize(bundled[0], tmp_path / "out.gguf", recipe)
    fields = container.read(tmp_path / "out.gguf").fields
    assert (tmp_path / "out.gguf").stat().st_size == planned.n_bytes
    assert fields["quantize.imatrix.file"].value == "prompts.gguf"
    assert fields["quantize.imatrix.entries_count"].value == len(importance.sums)
    assert kinds(tmp_path / "out.gguf")["blk.5.ffn_up_exps.weight"] == "iq2_xs"


def test_an_importance_matrix_of_another_model_is_an_error_of_one_line(
    bundled: tuple[Path, Path], importance: imatrix.Importance, tmp_path: Path
) -> None:
    wrong = imatrix.Importance()
    wrong.sums = {name: np.ones((1, 3)) for name in importance.sums}
    wrong.counts = {name: np.ones(1) for name in importance.sums}
    recipe = quantize.recipe("q4_k_m", importance=wrong, importance_name="wrong")
    with pytest.raises(EdgeError, match=r"llama\.cpp cannot quantize .*imatrix size 3 is different"):
        quantize.quantize(bundled[0], tmp_path / "out.gguf", recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_most_sensitive_blocks_are_those_that_lose_most(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    found = sensitivity.measure(bundled[0], tmp_path / "out", "q2_k", reader.read_text(None), most=128)
    assert sorted(found) == list(range(6)) and min(found.values()) > 0
    assert list(tmp_path.iterdir()) == []
    worst = sensitivity.most_sensitive(found, 2)
    assert set(worst) == set(sorted(found, key=lambda block: found[block])[-2:])
    assert sensitivity.parse_raise("4=q4_k") == (4, "q4_k")
    for bad in ("4", "=q4_k", "0=q4_k", "x=q4_k", "4="):
        with pytest.raises(EdgeError, match="not BLOCKS=TYPE"):
            sensitivity.parse_raise(bad)


def test_progress_follows_the_file(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    planned = quantize.quantize(
        bundled[0], tmp_path / "out.gguf", quantize.recipe("q4_k_m"), progress=lambda *at: seen.append(at)
    )
    assert seen and all(total == planned.n_bytes and 0 <= done <= total for done, total in seen)
    assert seen == sorted(seen)
