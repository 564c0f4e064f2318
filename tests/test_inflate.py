from __future__ import annotations

import contextlib
import errno
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest

from edge_speq import EdgeLlama, _native
from edge_speq.errors import EdgeError
from edge_speq.gguf import model as gguf_model

sys.path.append(str(Path(__file__).resolve().parent.parent / "models" / "recipes"))
import inflate
import inflate_check
from inflate import InflateError, Times

if TYPE_CHECKING:
    from support.tiny_models import TinyModels

N_TOKENS = 48


@pytest.fixture(scope="module")
def readings(bundled: tuple[Path, Path]) -> list[inflate_check.Reading]:
    """What the bundled model makes of two prompts."""
    with contextlib.closing(inflate_check.Watched(bundled[0])) as model:
        return [inflate_check.read(model, text, N_TOKENS) for text in inflate_check.texts(model, 1)[:2]]


def inflated(source: Path, out: Path, **times: int) -> Path:
    inflate.Inflation(source, Times(**times)).write(out)
    return out


class Models:
    """The bundled model inflated, each way once."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self._folder = source, folder

    def __call__(self, ff: int = 1, width: int = 1, layers: int = 1) -> Path:
        out = self._folder / f"{ff}-{width}-{layers}.gguf"
        return out if out.exists() else inflated(self.source, out, ff=ff, width=width, layers=layers)


@pytest.fixture(scope="module")
def models(bundled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(bundled[0], tmp_path_factory.mktemp("inflated"))


def agreement(readings: list[inflate_check.Reading], out: Path) -> dict[str, Any]:
    with contextlib.closing(inflate_check.Watched(out)) as model:
        others = [
            inflate_check.read(model, r.tokens[: r.n_prompt], len(r.tokens) - r.n_prompt, r.tokens[r.n_prompt :])
            for r in readings
        ]
        blocks = list(range(0, model.experts.n_blocks, inflate_check.times(out)))
    return inflate_check.agreement(readings, others, blocks)


def require_same(found: dict[str, Any]) -> None:
    """Logits equal to the bit where one machine computes both in the same order: on the CPU."""
    if _native.compute_device().is_gpu:
        assert found["nmse"] < 1e-3 and found["routed_otherwise"] <= found["routed"] / 100, found
    else:
        assert found["nmse"] == found["max_abs"] == found["routed_otherwise"] == 0 and found["same_text"], found


@pytest.mark.parametrize("times", [{"ff": 8}, {"width": 3}, {"layers": 2}, {"ff": 2, "width": 2, "layers": 2}], ids=str)
def test_text_routing_and_logits_stay_the_same(
    models: Models, readings: list[inflate_check.Reading], times: dict[str, int]
) -> None:
    found = agreement(readings, models(**times))
    assert found["tokens"] == 2 * N_TOKENS and found["routed"] > 6 * found["tokens"]
    require_same(found)


def test_a_disturbed_model_is_found_out(
    models: Models, readings: list[inflate_check.Reading], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail: here each silent block adds to the residual stream."""
    monkeypatch.setattr(inflate, "silenced", lambda data, kind, name: data)
    found = agreement(readings[:1], inflated(models.source, tmp_path / "out.gguf", layers=2))
    assert not found["same_text"] and found["near_ties"] > 0 and found["gap"] > 0
    assert found["nmse"] > 1e-3 and found["routed_otherwise"] > 0


def test_the_file_is_accepted_and_as_large_as_announced(models: Models) -> None:
    inflation = inflate.Inflation(models.source, Times(ff=2, width=2, layers=2))
    file, source = gguf_model.check_model(models(2, 2, 2)), gguf_model.check_model(models.source)
    assert sum(tensor.n_bytes for tensor in file.tensors.values()) == inflation.n_bytes
    for name in ("block_count", "embedding_length", "expert_feed_forward_length"):
        assert gguf_model.hyperparameter(file, name) == 2 * gguf_model.hyperparameter(source, name)
    for name in ("attention.head_count", "attention.key_length", "expert_count", "expert_used_count"):
        assert gguf_model.hyperparameter(file, name) == gguf_model.hyperparameter(source, name)
    summary = inflation.summary()
    assert (summary["experts"], summary["routed_bytes"]) == (2 * 192, 2 * 2 * 2 * 18_350_080)


def test_metadata_is_copied(models: Models) -> None:
    before, after = (
        {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}
        for path in (models.source, models(width=3))
    )
    assert {key for key in before if before[key] != after.get(key)} == {
        "qwen3moe.embedding_length",
        "general.name",
        "general.size_label",
    }
    assert after.keys() - before.keys() == {
        "qwen3moe.rope.dimension_count",
        *(f"edge_speq.inflated.{name}_times" for name in ("ff", "width", "layers")),
    }
    assert after["qwen3moe.rope.dimension_count"] == after["qwen3moe.attention.key_length"] == 64


def test_a_silent_block_is_a_trained_one_with_another_order(models: Models) -> None:
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (models.source, models(layers=2)))
    routers = before["blk.1.ffn_gate_inp.weight"].data, after["blk.1.ffn_gate_inp.weight"].data  # behind block 0
    order = [int(np.flatnonzero((routers[0] == row).all(axis=1))[0]) for row in routers[1]]
    assert sorted(order) == list(range(32)) != order
    for name in ("ffn_gate_exps.weight", "ffn_up_exps.weight"):
        assert np.array_equal(after[f"blk.1.{name}"].data, before[f"blk.1.{name}"].data[order])
    for name, index in (("ffn_down_exps.weight", order), ("attn_output.weight", slice(None))):
        source, silent = before[f"blk.1.{name}"], after[f"blk.1.{name}"]
        assert not gguf.dequantize(silent.data[:1], silent.tensor_type).any()
        assert (silent.data == source.data[index]).mean() > 0.98  # only scales changed


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("mixtral", "F16"), ("mixtral", "Q8_0"), ("qwen3moe", "Q4_K_M"), ("qwen3moe", "Q2_K")],
)
def test_other_models(tiny: TinyModels, tmp_path: Path, arch: Any, kind: str) -> None:
    source = tiny.moe(arch, kind)
    out = inflated(source, tmp_path / "out.gguf", ff=2, width=2, layers=2)
    gguf_model.check_model(out)
    with contextlib.closing(inflate_check.Watched(source)) as model:
        reading = inflate_check.read(model, model.tokenize(b"Inside the inn the others"), 8)
    require_same(agreement([reading], out))


@pytest.mark.parametrize("kind", sorted(inflate.SCALES))
def test_blocks_without_scales_are_zero(kind: str) -> None:
    size = inflate.SCALES[kind][0]
    quantization = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[quantization][1] == size
    blocks = np.random.default_rng(0).integers(0, 256, (3, 4 * size), dtype=np.uint8)
    silent = inflate.silenced(blocks, kind, "x")
    assert not gguf.dequantize(silent, quantization).any()
    assert (silent != blocks).mean() < 0.25


def test_the_draft_still_fits(bundled: tuple[Path, Path], models: Models) -> None:
    found = []
    for path in (models.source, models(2, 2, 2)):
        options: dict[str, Any] = {"n_ctx": 256, "n_threads": 2, "deterministic": True, "policy": "lru"}
        with contextlib.closing(
            EdgeLlama(str(path), draft=bundled[1], resident="1/2", draft_tokens=2, **options)
        ) as model:
            text = model.create_completion("The old house stood at", max_tokens=24, temperature=0.8, seed=3)
            counts = model.stats().speculation
        found.append((text["choices"][0]["text"], counts.steps, counts.drafted, counts.accepted))
    if not _native.compute_device().is_gpu:
        assert found[0] == found[1] and found[0][3] > 0


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (("dense",), "no routed experts"),
        (("moe", "olmoe"), "architecture olmoe: known are qwen3moe, llama"),
        (("moe", "qwen3moe", "MXFP4"), "MXFP4"),
        (("nothing",), "cannot read"),
    ],
)
def test_what_cannot_be_inflated_is_refused(tiny: TinyModels, tmp_path: Path, model: Any, why: str) -> None:
    source = getattr(tiny, model[0])(*model[1:]) if model[0] != "nothing" else tmp_path / "nothing.gguf"
    with pytest.raises(InflateError, match=why):
        inflated(source, tmp_path / "out.gguf", ff=2)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_differ_and_unknown_tensors_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(InflateError, match="from layer to layer"):
        inflated(tiny.moe("qwen3moe", used_per_layer=(2,) * 4), tmp_path / "out.gguf", ff=2)
    with pytest.raises(InflateError, match=r"ffn_gate_exps\.scale: what it does"):
        inflated(tiny.moe("qwen3moe", scales=True), tmp_path / "out.gguf", ff=2)


def test_a_full_disk_leaves_what_was_there(
    bundled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out := tmp_path / "out.gguf").write_bytes(b"before")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
        with pytest.raises(InflateError, match=r"0\.0 GB are free"):
            inflated(bundled[0], out)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(InflateError, match="No space left"):
        inflated(bundled[0], out)
    assert out.read_bytes() == b"before" and list(tmp_path.iterdir()) == [out]


def test_command_line(
    bundled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(bundled[0]), tmp_path / "out.gguf"
    times = ["--ff-times", "8", "--width-times", "8", "--layers-times", "8"]
    assert inflate.main([source, str(out), *times, "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["routed_bytes"] == 512 * 18_350_080
    assert captured.err.startswith("48 layers, 1536 experts of 6.12 MB") and not out.exists()
    with pytest.raises(SystemExit) as usage:
        inflate.main([source, str(out), "--ff-times", "0"])
    assert usage.value.code == 2 and "at least 1" in capsys.readouterr().err
    assert inflate.main([source, source]) == 1
    assert inflate.main([str(tmp_path / "none.gguf"), str(out)]) == 1
    assert inflate.main([source, str(tmp_path / "none" / "out.gguf")]) == 1
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 3 and "Traceback" not in errors

    def wanting(*args: Any) -> None:
        raise EdgeError("too little memory")

    monkeypatch.setattr(inflate_check, "compare", wanting)
    assert inflate.main([source, str(out), "--verify"]) == 1
    assert "error: too little memory" in capsys.readouterr().err


def test_figures_of_locality() -> None:
    """Two blocks, three tokens, two experts each: what is shared, and what counts foretell, by hand."""
    routing = np.array([[[0, 1], [1, 2], [3, 0]], [[0, 1], [0, 1], [0, 1]]], dtype=np.int32)
    assert inflate_check.shared([routing]) == round((1 + 0 + 2 + 2) / 8, 4)
    experts = inflate_check.Experts(2, 4, 2, ())
    assert inflate_check.foretold(experts, [routing, routing]) == 1.0
    other = routing.copy()
    other[1] = [[0, 2], [0, 2], [0, 2]]
    assert inflate_check.foretold(experts, [routing, other]) == 0.5
