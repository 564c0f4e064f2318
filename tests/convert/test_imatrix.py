"""convert.quantization.imatrix: what the callback sees is what goes into the weights, and the file is llama.cpp's."""

from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from edge_speq import system
from edge_speq.convert.evaluation import graph, reader
from edge_speq.convert.quantization import imatrix
from edge_speq.errors import EdgeError
from edge_speq.gguf import model as gguf_model
from edge_speq.gguf import writer


@pytest.fixture(scope="module")
def collected(bundled: tuple[Path, Path]) -> imatrix.Importance:
    return imatrix.collect(bundled[0], reader.read_text(None), dataset="prompts", most=700)


def test_every_weight_of_the_blocks_is_seen_and_every_row_counted(collected: imatrix.Importance) -> None:
    assert collected.chunks == 2
    names = {name.split(".", 2)[2] for name in collected.sums}
    assert names == {f"attn_{kind}.weight" for kind in ("q", "k", "v", "output")} | {
        f"ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")
    } | {"ffn_gate_inp.weight"}
    for name, counts in collected.counts.items():
        assert counts.sum() == (700 * 4 if "_exps" in name else 700), name
        assert len(counts) == (32 if "_exps" in name else 1) and collected.sums[name].shape == (len(counts), 256)
    # q, k and v read the same activations; so do gate and up
    for a, b in (("attn_q", "attn_v"), ("ffn_gate_exps", "ffn_up_exps")):
        np.testing.assert_array_equal(collected.sums[f"blk.3.{a}.weight"], collected.sums[f"blk.3.{b}.weight"])
    routed = collected.sums["blk.3.ffn_up_exps.weight"].sum(axis=0)
    np.testing.assert_allclose(routed, 4 * collected.sums["blk.3.ffn_gate_inp.weight"][0], rtol=1e-6)


def test_sums_are_those_of_a_plain_loop(bundled: tuple[Path, Path]) -> None:
    seen: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

    def keep(name: str, _weight: graph.GraphTensor, rows: graph.Rows, ids: graph.Ids | None) -> None:
        seen[name] = rows.copy(), None if ids is None else ids.copy()

    text = reader.read_text(None)
    with contextlib.closing(reader.Reader(bundled[0], wanted=imatrix.Importance.wanted, observe=keep)) as opened:
        opened.logits(next(reader.windows(opened.tokens(text), 40)))
    found = imatrix.collect(bundled[0], text, dataset="", most=40)
    rows, ids = seen["blk.2.ffn_down_exps.weight"]
    assert ids is not None and rows.shape == (40, 4, 256)
    sums, counts = np.zeros((32, 256)), np.zeros(32)
    for token in range(40):
        for k in range(4):
            sums[ids[token, k]] += rows[token, k].astype(np.float64) ** 2
            counts[ids[token, k]] += 1
    np.testing.assert_allclose(found.sums["blk.2.ffn_down_exps.weight"], sums, rtol=1e-9)
    np.testing.assert_array_equal(found.counts["blk.2.ffn_down_exps.weight"], counts)
    rows, ids = seen["blk.2.attn_output.weight"]
    assert ids is None
    expected = np.square(rows.astype(np.float64)).sum(axis=(0, 1))
    np.testing.assert_allclose(found.sums["blk.2.attn_output.weight"][0], expected, rtol=1e-9)


def test_no_copy_of_what_all_experts_saw_is_made() -> None:
    n_expert, columns = 32, 4096
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(n_expert, dtype=np.int32), (512, 1)), axis=1)[:, :4]
    rows = np.random.default_rng(1).standard_normal((512, 4, columns), dtype=np.float32)
    weight, found = graph.GraphTensor(), imatrix.Importance()
    weight.ne[:] = (columns, 8, n_expert, 1)
    found.observe("blk.0.ffn_down_exps.weight", weight, rows, ids)  # now the sums are there
    tracemalloc.start()
    found.observe("blk.0.ffn_down_exps.weight", weight, rows, ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes / 4
    assert found.counts["blk.0.ffn_down_exps.weight"].sum() == 2 * ids.size


def test_the_file_is_as_llama_imatrix_writes_it(collected: imatrix.Importance, tmp_path: Path) -> None:
    path = tmp_path / "matrix.gguf"
    assert imatrix.write(collected, path) == path.stat().st_size == imatrix.size(collected)
    file = gguf.GGUFReader(path)
    assert file.fields["general.type"].contents() == "imatrix"
    assert file.fields["imatrix.datasets"].contents() == ["prompts"]
    assert file.fields["imatrix.chunk_count"].contents() == 2 and file.fields["imatrix.chunk_size"].contents() == 512
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert len(tensors) == 2 * len(collected.sums)
    sums, counts = (tensors[f"blk.0.ffn_up_exps.weight{kind}"] for kind in (".in_sum2", ".counts"))
    assert sums.tensor_type == counts.tensor_type == gguf.GGMLQuantizationType.F32
    assert sums.shape.tolist() == [256, 32] and counts.shape.tolist() == [1, 32]
    np.testing.assert_allclose(sums.data, collected.sums["blk.0.ffn_up_exps.weight"], rtol=1e-6)
    back = imatrix.read(path)
    assert back.chunks == 2 and back.sums.keys() == collected.sums.keys()
    imatrix.write(back, tmp_path / "again.gguf")
    assert imatrix.read(tmp_path / "again.gguf").counts.keys() == collected.counts.keys()


def test_means_of_experts_seldom_seen_are_drawn_to_those_of_all() -> None:
    found = imatrix.Importance()
    found.sums = {"blk.0.ffn_up_exps.weight": np.array([[1000.0, 3000.0], [8.0, 0.0], [0.0, 0.0]])}
    found.counts = {"blk.0.ffn_up_exps.weight": np.array([1000.0, 1.0, 0.0])}
    found.sums["blk.0.attn_q.weight"], found.counts["blk.0.attn_q.weight"] = np.array([[6.0, 9.0]]), np.array([3.0])
    means = found.means()
    np.testing.assert_allclose(means["blk.0.attn_q.weight"], [[2, 3]])
    often, seldom, never = means["blk.0.ffn_up_exps.weight"]
    np.testing.assert_allclose(often, [1, 3], rtol=0.01)
    np.testing.assert_allclose(never, np.array([1008, 3000]) / 1001, rtol=1e-5)
    assert never[0] < seldom[0] < 8 and 0 < seldom[1] < never[1]
    assert found.unseen == 0
    found.counts["blk.0.ffn_down_exps.weight"] = np.array([1.0, 0.0])
    assert found.unseen == 1


def test_what_is_no_importance_matrix_is_refused(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="holds no importance matrix"):
        imatrix.read(bundled[0])
    sums = writer.Entry("blk.0.x.weight.in_sum2", (2, 1), 0, 8, [np.array([1, np.nan], "<f4").tobytes()])
    counts = writer.Entry("blk.0.x.weight.counts", (1, 1), 0, 4, [np.array([1], "<f4").tobytes()])
    for entries in ([sums], [sums, counts]):
        writer.write(tmp_path / "bad.gguf", {"general.type": "imatrix"}, entries)
        with pytest.raises(EdgeError, match=r"counts are missing .* or a value is not finite \(blk\.0\.x\.weight"):
            imatrix.read(tmp_path / "bad.gguf")


def test_short_and_missing_texts_are_refused(bundled: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="fewer than 16 tokens"):
        imatrix.collect(bundled[0], "Too short", dataset="")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, message in (("absent.txt", "cannot read the text"), ("empty.txt", "is empty")):
        with pytest.raises(EdgeError, match=message):
            reader.read_text(tmp_path / name)


def test_a_window_in_pieces_is_the_window(bundled: tuple[Path, Path]) -> None:
    with (
        contextlib.closing(reader.Reader(bundled[0], piece=reader.WINDOW)) as whole,
        contextlib.closing(reader.Reader(bundled[0])) as pieces,
    ):
        window = next(reader.windows(whole.tokens(reader.read_text(None)), 200))
        for _ in range(2):  # the second starts from an empty context too
            expected, found = whole.logits(window), pieces.logits(window)
            assert [len(piece) for piece in pieces.read(window)] == [128, 72]
        assert [len(piece) for piece in whole.read(window)] == [200]
    assert np.square(found - expected).sum() < 1e-5 * np.square(expected).sum()
    assert whole.routing.keys() == pieces.routing.keys() == set(range(6))
    for block, ids in whole.routing.items():
        assert (ids == pieces.routing[block]).mean() > 0.98


def test_a_model_that_does_not_fit_in_memory_is_not_read_again_for_each_piece(
    bundled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, n_bytes = gguf_model.check_model(bundled[0]), bundled[0].stat().st_size
    for memory, most in ((None, 2), ((n_bytes, 0), 0), ((2 * n_bytes, 0), 1), ((3 * n_bytes, 0), 2)):
        monkeypatch.setattr(system, "memory", lambda memory=memory: memory)
        for n in (1, 2):
            assert reader.piece_of(*[model] * n) == (reader.PIECE if n <= most else reader.WINDOW)


def test_an_error_in_the_callback_comes_out(bundled: tuple[Path, Path]) -> None:
    def fail(*_: object) -> None:
        raise ValueError("from within")

    with contextlib.closing(reader.Reader(bundled[0], observe=fail)) as opened:
        window = next(reader.windows(opened.tokens(reader.read_text(None)), 32))
        with pytest.raises(ValueError, match="from within"):
            opened.logits(window)


@pytest.mark.parametrize("arch", ["gpt-oss", "deepseek2", "mixtral", "qwen2moe"])
def test_other_architectures_are_seen_too(arch, tiny) -> None:
    with contextlib.closing(reader.Reader(tiny.moe(arch))) as opened:
        tokens = opened.tokens("The old house stood at the end of the lane, and nobody went there.")
        opened.logits(next(reader.windows(tokens)))
        assert opened.routing and all(ids.shape[0] == len(tokens) for ids in opened.routing.values())
