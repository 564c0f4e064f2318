"""A second MoE is trained, written and read back; llama.cpp computes the same where it can be converted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_checkpoint import write_tokenizer

torch = pytest.importorskip("torch", reason="needs torch, of the extra edge-speq[convert]")
RECIPES = Path(__file__).resolve().parent.parent / "models" / "recipes"
SHAPE = ["--d-model", "64", "--layers", "2", "--experts", "6", "--ff", "32", "--vocab", "400"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPES))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments: object) -> str:
    command = [sys.executable, str(RECIPES / "train_moe.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint that has learned to count up, and what the tool said of it."""
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "ids.npy", np.tile(np.arange(4, 36, dtype=np.uint16), 200))
    options = ["--step-log", 40, "--batch", 4, "--length", 32, "--threads", 1, "--device", "cpu", "--lr", 0.01]
    told = run("train", folder / "ids.npy", "-o", folder / "moe", *SHAPE, *options, "--shard-mb", 0.2)
    return folder / "moe", json.loads(told.splitlines()[-1])


def test_it_learns_and_its_files_are_read_back(trained: tuple[Path, dict[str, Any]]) -> None:
    import moe_model

    folder, told = trained
    assert told["held_out_loss"] < 1.0 < np.log(32)
    assert told["steps"] == 40 and len(told["busiest"]) == 2
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 1
    assert all(path.stat().st_size < 300_000 for path in folder.glob("*.safetensors"))
    weights, shape = moe_model.load(folder)
    assert shape == moe_model.Shape(64, 2, 6, 2, 32, vocab=400)
    ids = torch.arange(4, 36)[None]
    assert moe_model.forward(weights, shape, ids)[0][0, 4:-1].argmax(-1).tolist() == ids[0, 5:].tolist()


def test_the_files_are_those_that_safetensors_reads(trained: tuple[Path, dict[str, Any]]) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    found: dict[str, Any] = {}
    for path in trained[0].glob("*.safetensors"):
        found |= safetensors.load_file(path)
    assert found["model.layers.1.block_sparse_moe.experts.5.w2.weight"].shape == (64, 32)
    assert len(found) == 2 + 2 * (2 + 4 + 1 + 6 * 3)


def test_experts_are_what_one_token_after_the_other_gives() -> None:
    import moe_model

    shape = moe_model.Shape(d_model=64, layers=1, experts=6, top=2, ff=32, vocab=16)
    weights = moe_model.initial(shape, "cpu", 3)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    given, balance, counts = moe_model.experts(weights, 0, x, shape)
    assert counts.sum() == 100 and 0.9 < float(balance) < 6
    for row, token in zip(given, x, strict=True):
        logits, chosen = (weights["0.gate"] @ token).topk(2)
        wanted = torch.zeros(64)
        for share, e in zip(logits.softmax(0), chosen, strict=True):
            gate, up = (weights["0.w13"][e] @ token).chunk(2)
            wanted += share * (weights["0.w2"][e] @ (torch.nn.functional.silu(gate) * up))
        assert torch.allclose(row, wanted, rtol=1e-4, atol=1e-7)


def test_half_precision_as_on_a_gpu_stays_near() -> None:
    import moe_model

    shape = moe_model.Shape(d_model=64, layers=2, experts=6, top=2, ff=32, vocab=16)
    weights = moe_model.initial(shape, "cpu", 3)
    for weight in weights.values():
        weight.requires_grad_()
    ids = torch.arange(16)[None]
    whole = moe_model.forward(weights, shape, ids)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        half, balance, _ = moe_model.forward(weights, shape, ids)
    (half.float().square().mean() + balance).backward()
    assert half.dtype == torch.bfloat16
    assert float(((half.detach() - whole) ** 2).sum() / (whole**2).sum()) < 1e-3
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in weights.values())


def test_prepared_text_is_balanced_and_packed(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers, of the extra edge-speq[convert]")
    import train_moe

    write_tokenizer(tmp_path)
    for name, n in (("a", 20), ("b", 400)):
        (tmp_path / f"{name}.txt").write_text(train_moe.END_TEXT.join(f"{name} says {i}." for i in range(n)), "utf-8")
    out = tmp_path / "ids.npy.xz"
    texts = tmp_path / "a.txt", tmp_path / "b.txt"
    run("prepare", *texts, "--tokenizer", tmp_path / "tokenizer.json", "--tokens", 400, "-o", out)
    ids = train_moe.read_ids(out)
    assert 380 < len(ids) < 420 and ids[-1] == train_moe.END
    decoded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(
        ids.tolist(), skip_special_tokens=False
    )
    assert decoded.count("a says") == 20 < decoded.count("b says")


@pytest.mark.long
def test_llama_cpp_computes_the_same(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for package in ("transformers", "sentencepiece", "tokenizers"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra edge-speq[convert]")
    from edge_speq.convert.huggingface import hf

    folder = trained[0]
    write_tokenizer(folder)
    hf.convert(folder, tmp_path / "moe.gguf", None, "f16")
    row = json.loads(run("check", folder, tmp_path / "moe.gguf", "--tokens", 256))
    assert row["n_tokens"] == 256 and row["nmse"] < 1e-5 and row["same_top_token"] > 0.98
