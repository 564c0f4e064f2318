"""edge-speq convert hf on a checkpoint made here: llama.cpp's own converter's bytes, the logits of transformers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tiny_checkpoint
from support.command import edge_speq

from edge_speq.convert.evaluation import reader
from edge_speq.convert.huggingface import hf, hf_child
from edge_speq.errors import EdgeError
from edge_speq.gguf import container

OWN = """
import runpy, sys
folder, *sys.argv[1:] = sys.argv[1:]
sys.path[:0] = [folder, folder + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"  # it refuses a vocabulary that it has not seen
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""
TEXT = "It's  the old house, 1234 steps from THE lane; nobody had lived there for years.\n\n" * 3


@pytest.fixture(scope="module", autouse=True)
def _converter() -> None:
    try:
        hf.converter_folder()
    except EdgeError as error:
        pytest.skip(f"{error.message}: it comes with the wheel of native/")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write_checkpoint(tmp_path_factory.mktemp("hf") / "tiny-moe")


def convert(checkpoint: Path, out: Path, *arguments: str) -> dict:
    done = edge_speq("convert", "hf", str(checkpoint), "-o", str(out), "--json", *arguments)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("outtype", [pytest.param("f32", marks=pytest.mark.long), "q8_0"])
def test_the_file_is_that_of_llama_cpps_own_converter(checkpoint: Path, outtype: str, tmp_path: Path) -> None:
    foretold = convert(checkpoint, tmp_path / "ours.gguf", "--outtype", outtype, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    made = convert(checkpoint, tmp_path / "ours.gguf", "--outtype", outtype)
    assert (made["pre"], made["pre_by"], made["probe_agrees"]) == ("gpt-2", "definition", True)
    command = [sys.executable, "-c", OWN, str(hf.converter_folder()), str(checkpoint)]
    command += ["--outfile", str(tmp_path / "own.gguf"), "--outtype", outtype]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "own.gguf").read_bytes()
    assert foretold["n_bytes"] == made["n_bytes"] == (tmp_path / "own.gguf").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.gguf", "own.gguf"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("outtype", "nmse"),
    [
        pytest.param("f32", 1e-6, marks=pytest.mark.long),
        ("q8_0", 1e-3),
        pytest.param("q6_k", 1e-2, marks=pytest.mark.long),
    ],
)
def test_tokens_and_logits_are_those_of_transformers(
    checkpoint: Path, outtype: str, nmse: float, tmp_path: Path
) -> None:
    import torch
    import transformers

    foretold = convert(checkpoint, tmp_path / "out.gguf", "--outtype", outtype, "--dry-run")
    assert convert(checkpoint, tmp_path / "out.gguf", "--outtype", outtype)["n_bytes"] == foretold["n_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with contextlib.closing(reader.Reader(tmp_path / "out.gguf")) as opened:
        tokens = opened.tokens(TEXT)
        assert tokens.tolist() == ids
        found = opened.logits(tokens)
        error = float(np.square(found - expected).sum() / np.square(expected).sum())
        assert error < nmse
        same = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
        assert same > {"f32": 0.99, "q8_0": 0.95, "q6_k": 0.85}[outtype]


def test_experts_may_have_fewer_bits_than_the_rest(checkpoint: Path, tmp_path: Path) -> None:
    made = convert(checkpoint, tmp_path / "out.gguf", "--outtype", "q8_0", "--experts", "q4_k", "--name", "Tiny")
    file = container.read(tmp_path / "out.gguf")
    kinds = {("exps" in name): tensor.type for name, tensor in file.tensors.items() if "ffn_up" in name}
    assert kinds == {True: "Q4_K"} and file.tensors["blk.0.attn_q.weight"].type == "Q8_0"
    assert file.fields["general.name"].value == "Tiny"
    assert made["n_bytes"] == file.size and made["bytes_by_type"]["q4_k"] > 0


def test_an_unknown_rule_must_be_named(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers, of the extra edge-speq[convert]")
    rule = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # splits nothing
    checkpoint = tiny_checkpoint.write_checkpoint(tmp_path / "model", rule)
    arguments = ("convert", "hf", str(checkpoint), "-o", str(tmp_path / "out.gguf"), "--outtype", "f16")
    done = edge_speq(*arguments)
    assert done.returncode == 1 and "with --pre" in done.stderr and "Traceback" not in done.stderr
    done = edge_speq(*arguments, "--pre", "gpt-2")
    assert done.returncode == 2 and "tokenizes a text differently" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_converted_is_one_message(checkpoint: Path, tmp_path: Path) -> None:
    def refused(folder: Path, out: str = "out.gguf") -> str:
        done = edge_speq("convert", "hf", str(folder), "-o", str(tmp_path / out))
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    assert "there is no folder" in refused(tmp_path / "absent")
    assert "no config.json" in refused(tmp_path)
    assert "template" in refused(checkpoint, "{ftype}.gguf")
    assert "is the source itself" in refused(checkpoint, str(checkpoint / "model.safetensors"))
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"], "model_type": "qwen3_moe"}))
    assert "does not support" in refused(strange)
    (strange / "config.json").write_text("{")
    assert "converter failed" in refused(strange)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in checkpoint.iterdir():
        data = path.read_bytes()
        (damaged / path.name).write_bytes(data[:-5000] if path.suffix == ".safetensors" else data)
    assert "converter failed" in refused(damaged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "strange"]


def test_missing_packages_are_named_with_the_remedy(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(EdgeError, match=r"needs no_such_package \(pip install .*torch"):
        hf.convert(checkpoint, "out.gguf", None, "f16")


def test_the_types_of_checkpoints_are_kept(tmp_path: Path) -> None:
    for config, kind in (
        ({"torch_dtype": "float32"}, "f32"),
        ({"dtype": "bfloat16"}, "bf16"),
        ({"text_config": {"dtype": "float16"}}, "f16"),
        ({}, "auto"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert hf.intermediate(tmp_path) == kind
    assert hf.intermediate(tmp_path / "absent") == "auto"


def test_the_child_ends_with_its_parent(checkpoint: Path, tmp_path: Path) -> None:
    order = {"converter": str(tmp_path), "model": "", "out": "", "outtype": "f16", "pre": None, "name": None}
    code = "import time; time.sleep(60)"
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "__init__.py").write_text("")
    (tmp_path / "conversion" / "base.py").write_text(code)
    command = [sys.executable, "-m", hf_child.__name__, json.dumps(order)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.poll() is None and child.stdin is not None
        child.stdin.close()
        assert child.wait(timeout=20) == 1
