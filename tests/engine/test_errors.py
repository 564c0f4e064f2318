"""Every way to ask for the impossible: one message that names the cause, one that names the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_speq import EdgeError, EdgeLlama


def refused(model: Path | str, **options: object) -> EdgeError:
    with pytest.raises(EdgeError) as error:
        EdgeLlama(str(model), n_ctx=256, **options)  # type: ignore[arg-type]
    assert error.value.hint
    assert "Traceback" not in str(error.value)
    return error.value


def test_no_model_file(tmp_path: Path) -> None:
    assert "model file not found" in refused(tmp_path / "none.gguf").message
    assert "model file not found" in refused(tmp_path).message


def test_not_a_gguf(tmp_path: Path) -> None:
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"\x10\0\0\0{}")
    assert "not a GGUF file" in refused(other).message


def test_a_gguf_that_ends_early(tmp_path: Path, bundled: tuple[Path, Path]) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(bundled[0].read_bytes()[:100_000])
    assert "cannot load the model" in refused(cut).message


def test_a_chat_template_that_is_no_template(tmp_path: Path, tiny) -> None:
    broken = tmp_path / "template.gguf"
    data = tiny.moe("qwen3moe").read_bytes()
    assert data.count(b"{% endfor %}") == 1
    broken.write_bytes(data.replace(b"{% endfor %}", b"{% endxxx %}"))
    assert "endxxx" in refused(broken).message


def test_a_draft_with_another_vocabulary(bundled: tuple[Path, Path], tiny) -> None:
    assert "another vocabulary" in refused(bundled[0], draft=tiny.dense(), resident="1/2").message
    error = refused(tiny.moe("qwen3moe"), draft=tiny.dense("shuffled"), resident="1/2", draft_tokens=1)
    assert "differ from token 4 on" in error.message  # the four special tokens are the same


def test_a_missing_draft(bundled: tuple[Path, Path]) -> None:
    assert "draft file not found" in refused(bundled[0], draft="none.gguf").message


def test_slots_under_the_floor(bundled: tuple[Path, Path]) -> None:
    target, draft = bundled
    error = refused(target, draft=draft, resident="1/16", draft_tokens=8)
    assert "slots are too few" in error.message
    assert "resident of at least" in error.hint


def test_a_budget_that_cannot_hold_the_rest(bundled: tuple[Path, Path]) -> None:
    error = refused(bundled[0], vram_budget="1MiB")
    assert "smallest possible budget" in error.hint


def test_a_budget_that_a_policy_cannot_keep(bundled: tuple[Path, Path]) -> None:
    assert "smallest possible budget" in refused(bundled[0], policy="all", vram_budget="1MiB").hint
    assert "smallest possible budget" in refused(bundled[0], policy="cpu-moe", vram_budget="1MiB").hint


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "magic"},
        {"on_miss": "gpu"},
        {"resident": "2"},
        {"draft_tokens": "many"},
        {"vram_budget": "lots"},
        {"policy": "all", "resident": "1/2"},
        {"resident": "1/2", "lora_path": "adapter.gguf"},
    ],
)
def test_bad_arguments(bundled: tuple[Path, Path], options: dict[str, str]) -> None:
    assert refused(bundled[0], **options).usage


def test_a_refused_model_leaves_nothing_behind(bundled: tuple[Path, Path]) -> None:
    target, draft = bundled
    refused(target, draft=draft, resident="1/16", draft_tokens=8)
    model = EdgeLlama(str(target), draft=draft, resident="1/2", n_ctx=256, n_threads=1)
    assert model("Once", max_tokens=3, temperature=0.0)["choices"][0]["text"]
    model.close()
