"""convert.quantization.draft, agreement and verify: the twin keeps what it should and is measured as it is."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from support import tiny_models
from support.command import edge_speq

from edge_speq import EdgeLlama
from edge_speq.convert.evaluation import agreement, reader, verify
from edge_speq.convert.quantization import draft, imatrix, quantize
from edge_speq.errors import EdgeError
from edge_speq.gguf import container, draft_experts, layout
from edge_speq.gguf import model as gguf_model

TEXT = reader.read_text(None)


@pytest.fixture(scope="module")
def twins(bundled: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("twins")
    return {kind: draft.twin(bundled[0], folder / f"{kind}.gguf", kind) for kind in ("q2_k", "q3_k", "q8_0")}


def test_only_experts_change_and_all_else_is_the_same_bytes(bundled: tuple[Path, Path], twins: dict[str, Path]) -> None:
    _, target = verify.describe(bundled[0])
    for kind, path in twins.items():
        _, twin = verify.describe(path)
        found = verify.differences(target, twin)
        experts = draft.expert_names(container.read(path))
        assert sorted(found.pop("other_type")) == sorted(experts) and len(experts) == 18
        assert not any(found.values())
        assert {twin["tensors"][name]["type"] for name in experts} == {kind}


def test_more_bits_agree_more(bundled: tuple[Path, Path], twins: dict[str, Path]) -> None:
    found = {kind: agreement.measure(bundled[0], path, TEXT, most=512) for kind, path in twins.items()}
    for better, worse in (("q8_0", "q3_k"), ("q3_k", "q2_k")):
        a, b = found[better], found[worse]
        assert a.token_agreement > b.token_agreement and a.nmse < b.nmse and a.kl < b.kl
        assert (a.expert_agreement or 0) > (b.expert_agreement or 0)
        assert (a.expert_set_agreement or 0) > (b.expert_set_agreement or 0)
    worst, best = found["q2_k"], found["q8_0"]
    assert worst.token_agreement > 0.5 and (worst.expert_agreement or 0) > 0.8
    assert best.token_agreement > 0.9 and best.nmse < 1e-3
    assert best.perplexity < worst.perplexity_other


def test_a_model_agrees_with_itself_in_everything(bundled: tuple[Path, Path]) -> None:
    found = agreement.measure(bundled[0], bundled[0], TEXT, most=100)
    assert found.n_tokens == 100 and found.nmse == found.kl == 0
    assert found.token_agreement == found.expert_agreement == found.expert_set_agreement == 1


def test_sums_of_pieces_are_those_of_the_whole_without_copies_of_it() -> None:
    random, n, n_vocab = np.random.default_rng(0), 130, 20000
    a = random.standard_normal((n, n_vocab), dtype=np.float32)
    b = a + random.standard_normal((n, n_vocab), dtype=np.float32) / 2
    following = random.integers(0, n_vocab, n - 1).astype(np.int32)
    sums = agreement._Sums()
    tracemalloc.start()
    for start in range(0, n, 64):  # as a reader gives them
        sums.add_logits(following[start : start + 64], a[start : start + 64], b[start : start + 64])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * agreement.ROWS * 8 * n_vocab
    p, q = (x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True)) for x in (a, b))
    found, rows = sums.result(), np.arange(n - 1)
    assert found.n_tokens == n
    assert found.nmse == pytest.approx(
        np.square(a.astype(np.float64) - b).sum() / np.square(a.astype(np.float64)).sum()
    )
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum() / n)
    assert found.token_agreement == (a.argmax(axis=1) == b.argmax(axis=1)).mean()
    assert found.perplexity == pytest.approx(np.exp(-p[rows, following].mean()))
    assert found.perplexity_other == pytest.approx(np.exp(-q[rows, following].mean()))


def test_agreement_with_a_dense_model_has_no_experts(bundled: tuple[Path, Path]) -> None:
    found = agreement.measure(bundled[0], bundled[1], TEXT, most=100)
    assert found.expert_agreement is None and found.expert_set_agreement is None
    assert 0.2 < found.token_agreement < 0.9


def test_routing_and_logits_are_what_the_engine_sees(bundled: tuple[Path, Path]) -> None:
    with contextlib.closing(reader.Reader(bundled[0])) as opened:
        tokens = opened.tokens(TEXT)[:8]
        logits = opened.logits(tokens)
        routing = np.stack([opened.routing[block] for block in sorted(opened.routing)])
    model = EdgeLlama(str(bundled[0]), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, resident="3/4")
    with contextlib.closing(model):
        model.eval(tokens.tolist()[:1])
        np.testing.assert_allclose(model._scores[0], logits[0], atol=1e-3)
        assert model._hook is not None
        np.testing.assert_array_equal(np.sort(model._hook.routing()[:, 0]), np.sort(routing[:, 0]))


def test_models_of_different_vocabularies_are_not_compared(bundled: tuple[Path, Path], tiny) -> None:
    with pytest.raises(EdgeError, match="tokenize the text differently"):
        agreement.measure(bundled[0], tiny.dense(), TEXT, most=100)


@pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss", "deepseek2", "granitemoe"])
def test_other_architectures_have_twins(arch: tiny_models.Arch, tiny, tmp_path: Path) -> None:
    out = draft.twin(tiny.moe(arch), tmp_path / "twin.gguf", "q3_k")
    _, a = verify.describe(tiny.moe(arch))
    _, b = verify.describe(out)
    found = verify.differences(a, b)
    names = draft.expert_names(container.read(out))
    assert sorted(found["other_type"]) == sorted(names) and names and not found["other_bytes"]


def test_experts_alone_are_the_twins_experts_and_name_their_target(
    bundled: tuple[Path, Path], twins: dict[str, Path], tmp_path: Path
) -> None:
    recipe = draft.recipe(bundled[0], "q3_k")
    out, seen = tmp_path / "experts.gguf", list[Path]()
    n_bytes = draft.make(bundled[0], out, recipe, experts_only=True, examine=seen.append)
    assert n_bytes == out.stat().st_size == draft.experts_size(bundled[0], recipe)
    assert seen and list(tmp_path.iterdir()) == [out]
    _, alone = verify.describe(out)
    _, whole = verify.describe(twins["q3_k"])
    names = draft.expert_names(container.read(bundled[0]))
    assert sorted(alone["tensors"]) == sorted(names) and not alone["is_model"]
    assert all(alone["tensors"][name] == whole["tensors"][name] for name in names)
    fields = gguf.GGUFReader(out).fields
    assert fields[draft.TARGET_HASH].contents() == verify.describe(bundled[0])[1]["content_sha256"]
    assert fields[draft_experts.KIND].contents() == draft_experts.EXPERTS_ONLY


@pytest.mark.long
def test_low_bits_take_an_importance_matrix(tiny, tmp_path: Path) -> None:
    target = tiny.moe("qwen3moe")
    with pytest.raises(EdgeError, match="iq2_xs needs an importance matrix"):
        draft.recipe(target, "iq2_xs")
    importance = draft.importance_for(target, "iq2_xs", TEXT, dataset="prompts", most=256)
    assert importance is not None and draft.importance_for(target, "q2_k", TEXT, dataset="") is None
    draft.make(target, tmp_path / "twin.gguf", draft.recipe(target, "iq2_xs", importance, "prompts"))
    file = container.read(tmp_path / "twin.gguf")
    assert {file.tensors[name].type for name in draft.expert_names(file)} == {"IQ2_XS"}
    assert file.fields["quantize.imatrix.file"].value == "prompts"


def test_a_dense_model_has_no_twin(bundled: tuple[Path, Path]) -> None:
    with pytest.raises(EdgeError, match="has no routed experts"):
        draft.recipe(bundled[1], "q2_k")


def test_a_twin_drafts_and_foresees(bundled: tuple[Path, Path], twins: dict[str, Path]) -> None:
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "resident": "1/2", "draft_tokens": 2}
    model = EdgeLlama(str(bundled[0]), draft=str(twins["q3_k"]), **options)
    with contextlib.closing(model):
        model.create_completion("The old house stood", max_tokens=48, temperature=0.0)
        stats = model.stats()
    assert stats.foresight == "twin" and stats.speculation.acceptance > 0.6


def test_the_content_hash_is_of_the_weights_alone(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = quantize.Recipe(quantize.types.ftype("q8_0"), texts={"general.name": "another name"})
    copy = quantize.Recipe(recipe.ftype, (), texts=recipe.texts)
    quantize.quantize(bundled[1], tmp_path / "a.gguf", quantize.recipe("q8_0"))
    quantize.quantize(bundled[1], tmp_path / "b.gguf", copy)
    a, b = (verify.describe(tmp_path / name)[1] for name in ("a.gguf", "b.gguf"))
    assert a["content_sha256"] == b["content_sha256"] != verify.describe(bundled[1])[1]["content_sha256"]
    assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "b.gguf").read_bytes()


def test_spans_are_where_gguf_py_finds_the_data(bundled: tuple[Path, Path]) -> None:
    file = gguf_model.check_model(bundled[0])
    for tensor in gguf.GGUFReader(bundled[0]).tensors:
        span = layout.spans(file)[tensor.name]
        assert span.offset == tensor.data_offset
        assert b"".join(span.pieces()) == tensor.data.tobytes()


def test_the_parts_of_a_split_model_have_the_hashes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.write_tiny(tmp_path / "whole.gguf", "qwen3moe")
    monkeypatch.setattr(tiny_models.gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=7))
    tiny_models.write_tiny(tmp_path / "moe.gguf", "qwen3moe")
    _, whole = verify.describe(tmp_path / "whole.gguf")
    _, parts = verify.describe(min(tmp_path.glob("moe-00001-of-*.gguf")))
    assert len(parts["files"]) > 2 and parts["content_sha256"] == whole["content_sha256"]


def test_damage_is_found_by_hash_and_by_structure(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    data = bytearray(bundled[1].read_bytes())
    data[-1000] ^= 1
    (tmp_path / "flipped.gguf").write_bytes(data)
    _, a = verify.describe(bundled[1])
    _, b = verify.describe(tmp_path / "flipped.gguf")
    found = verify.differences(a, b)
    assert len(found.pop("other_bytes")) == 1 and not any(found.values())
    (tmp_path / "short.gguf").write_bytes(data[:-5000])
    with pytest.raises(container.GGUFError, match="after the file"):
        verify.describe(tmp_path / "short.gguf")


# --- the command --------------------------------------------------------------------------------------------------


def run_json(*arguments: str, code: int = 0) -> dict:
    done = edge_speq("convert", *arguments, "--json")
    assert done.returncode == code and done.stderr == "", done.stderr
    return json.loads(done.stdout)


def test_draft_foretells_writes_and_reports(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["draft", str(bundled[0]), "-o", str(tmp_path / "twin.gguf"), "--type", "Q3_K", "--tokens", "200"]
    foretold = run_json(*arguments, "--dry-run")
    assert foretold["dry_run"] and list(tmp_path.iterdir()) == []
    made = run_json(*arguments)
    assert made["n_bytes"] == foretold["n_bytes"] == (tmp_path / "twin.gguf").stat().st_size
    assert made["agreement"]["n_tokens"] == 200 and made["agreement"]["expert_set_agreement"] > 0.5
    done = edge_speq("convert", *arguments)
    assert done.returncode == 2 and "exists already" in done.stderr and "--force" in done.stderr
    done = edge_speq("convert", *arguments, "--force", "--experts-only")
    assert done.returncode == 0 and "the experts alone at q3_k" in done.stdout and "experts: 9" in done.stdout


@pytest.mark.long
def test_quantize_says_what_it_did(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = [
        str(bundled[0]),
        str(tmp_path / "out.gguf"),
        "--type",
        "q6_k",
        "--experts",
        "q2_k",
        "--raise",
        "2=q4_k",
    ]
    foretold = run_json("quantize", *arguments, "--dry-run")
    made = run_json("quantize", *arguments, "--tokens", "64")
    assert made["n_bytes"] == foretold["n_bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert len(made["sensitivity"]) == 6 and len(made["raised"]) == 2
    types = {name: t.type for name, t in container.read(tmp_path / "out.gguf").tensors.items() if "up_exps" in name}
    assert [i for i in range(6) if types[f"blk.{i}.ffn_up_exps.weight"] == "Q4_K"] == made["raised"]


def test_imatrix_feeds_quantize(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    text, matrix = tmp_path / "text.txt", str(tmp_path / "matrix.gguf")
    text.write_text(TEXT[:3000], encoding="utf-8")
    foretold = run_json("imatrix", str(bundled[0]), str(text), "-o", matrix, "--dry-run")
    made = run_json("imatrix", str(bundled[0]), str(text), "-o", matrix)
    assert foretold["n_bytes"] == made["n_bytes"] == Path(matrix).stat().st_size
    assert imatrix.read(matrix).chunks == made["chunks"] > 0
    options = ["--type", "q4_0", "--experts", "iq2_xs", "--imatrix", matrix, "--dry-run"]
    assert "iq2_xs" in run_json("quantize", str(bundled[0]), str(tmp_path / "o"), *options)["bytes_by_type"]
    done = edge_speq("convert", "quantize", str(bundled[0]), str(tmp_path / "o"), *options[:4])
    assert done.returncode == 2 and "convert imatrix" in done.stderr


def test_verify_compares(bundled: tuple[Path, Path], twins: dict[str, Path]) -> None:
    a, b = str(bundled[0]), str(twins["q8_0"])
    same = run_json("verify", a, a, "--same", "--no-measure")
    assert same["same_weights"] and same["agreement"] is None and len(same["first"]["tensors"]) == 74
    found = run_json("verify", a, b, "--tokens", "64", "--same", code=1)
    assert not found["same_weights"] and len(found["differences"]["other_type"]) == 18
    assert found["agreement"]["token_agreement"] > 0.9
    done = edge_speq("convert", "verify", a)
    assert done.returncode == 0 and "sound" in done.stdout
    done = edge_speq("convert", "verify", __file__)
    assert done.returncode == 2 and "not a GGUF file" in done.stderr
