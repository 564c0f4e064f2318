"""gguf_file, gguf_model and edge-speq inspect: valid files pass, bad ones end in one error, none kills llama.cpp."""

from __future__ import annotations

import copy
import functools
import json
import random
import re
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import gguf
import pytest
from attacks import fuzz
from attacks.bad_gguf import ARRAY, ATTACKS, F32, I32, STRING, U16, Entry, Parts, string
from attacks.bad_graphs import FINDINGS
from support import tiny_models

from edge_speq import EdgeError, EdgeLlama
from edge_speq.cli.main import main
from edge_speq.gguf import container
from edge_speq.gguf.container import GGUFError
from edge_speq.gguf.model import check_model

MAX_PYTHON_BYTES = 16 << 20  # of the validator, whatever a 2 MB file claims
LOADER = Path(__file__).parent / "load_gguf.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    return tiny_models.write_tiny(path, "qwen3moe", n_layer=1, n_expert=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred bytes that hold every kind of field; no model."""
    numbers = [
        ("u8", 0, "B", 1),
        ("f32", 6, "f", 0.5),
        ("bool", 7, "?", True),
        ("i64", 11, "q", -1),
        ("f64", 12, "d", 2.0),
    ]
    parts = Parts(fields=[(f"a.{name}", kind, struct.pack(f"<{code}", value)) for name, kind, code, value in numbers])
    parts.set("a.string", STRING, string("text"))
    parts.set("a.numbers", ARRAY, struct.pack("<IQ3i", I32, 3, 1, 2, 3))
    parts.set("a.strings", ARRAY, struct.pack("<IQ", STRING, 2) + string("x") + string("yz"))
    parts.set(container.TOKENS, ARRAY, struct.pack("<IQ", STRING, 2) + string("p") + string("q"))
    parts.entries = [Entry("one", [3], F32, 0), Entry("two", [2, 2], F32, 32)]
    parts.data = bytes(48)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    path.write_bytes(parts.to_bytes())
    return path


def outcome(path: Path) -> GGUFError | None:
    """How the validator ends; anything but GGUFError is raised."""
    try:
        check_model(path)
    except GGUFError as error:
        return error
    return None


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_refused_by_name(whole: Path, tmp_path: Path, name: str) -> None:
    parts = Parts.of(whole)
    assert parts.to_bytes() == whole.read_bytes()
    ATTACKS[name].change(parts)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(parts.to_bytes())
    tracemalloc.start()
    error = outcome(bad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error is not None
    assert re.search(ATTACKS[name].cause, str(error))
    assert error.file == bad and error.field and 0 <= error.offset <= bad.stat().st_size
    assert str(bad) in error.message and error.hint
    assert peak < MAX_PYTHON_BYTES


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each of FINDINGS."""
    folder = tmp_path_factory.mktemp("findings")
    arches = {finding.arch for finding in FINDINGS.values()}
    originals = {arch: fuzz.original(arch, folder) for arch in arches}  # type: ignore[arg-type]
    paths = {}
    for name, finding in FINDINGS.items():
        parts = copy.deepcopy(originals[finding.arch])
        finding.change(parts)
        paths[name] = folder / f"{name}.gguf"
        paths[name].write_bytes(parts.to_bytes())
    return paths


@pytest.mark.parametrize("name", FINDINGS)
def test_what_the_fuzzer_found_is_refused_by_name(findings: dict[str, Path], name: str) -> None:
    error = outcome(findings[name])
    assert error is not None
    assert FINDINGS[name].cause in str(error)
    assert error.file == findings[name] and error.field and error.offset >= 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_what_the_fuzzer_found_still_ends_llama_cpp(findings: dict[str, Path]) -> None:
    """Unchecked, each is still the end of the process: a finding that no longer is may lose its rule."""
    ends = loaded(list(findings.values()), "--unchecked")
    assert {path for path, (status, _) in ends.items() if status in (0, 1)} == set()


VALID = [(arch, "F16") for arch in tiny_models.ARCHITECTURES]
VALID += [("qwen3moe", kind) for kind in ("Q8_0", "Q4_0", "Q4_K_M", "Q2_K")] + [("gpt-oss", "MXFP4")]
ALL_VALID = [(arch, kind) for arch in tiny_models.ARCHITECTURES for kind in ("Q8_0", "Q4_K_M", "IQ4_XS", "IQ3_S")]


@pytest.mark.parametrize("models", [VALID, pytest.param(ALL_VALID, marks=pytest.mark.slow)], ids=["some", "all"])
def test_valid_files_pass(bundled: tuple[Path, Path], tiny, models: list[tuple[str, str]]) -> None:
    for path in [*bundled, tiny.dense(), *(tiny.moe(arch, kind, n_layer=2) for arch, kind in models)]:
        expected = gguf.GGUFReader(path)
        file = check_model(path)
        sizes = {tensor.name: (tensor.tensor_type.name, tensor.n_bytes) for tensor in expected.tensors}
        assert {tensor.name: (tensor.type, tensor.n_bytes) for tensor in file.tensors.values()} == sizes
        assert len(file.fields) == expected.fields["GGUF.kv_count"].parts[0][0]


def test_a_file_cut_anywhere_in_its_header_is_refused(small: Path, tmp_path: Path) -> None:
    assert outcome(small) is None
    raw = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    for n in range(len(raw)):
        cut.write_bytes(raw[:n])
        assert outcome(cut) is not None, f"{n} of {len(raw)} bytes"


@functools.cache
def raw_and_starts(whole: Path) -> tuple[bytes, list[int]]:
    file = container.read(whole)
    return whole.read_bytes(), [item.offset for item in (*file.fields.values(), *file.tensors.values())]


def mutated(whole: Path, seed: int) -> bytes:
    """The file with one to three bytes of its header changed, often where a value begins."""
    rng = random.Random(seed)
    original, starts = raw_and_starts(whole)
    raw = bytearray(original)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        anywhere = rng.randrange(4, max(starts) + 80)
        at = rng.choice((anywhere, rng.choice(starts) + rng.randrange(40)))
        raw[at] = rng.choice((0, 1, 128, 255, rng.randrange(256), raw[at] ^ 1 << rng.randrange(8)))
    return bytes(raw)


@pytest.mark.parametrize("n", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutations_end_well(whole: Path, tmp_path: Path, n: int) -> None:
    """Within a bound on memory, and as GGUFError or not at all. Sequential seeds: a failure names its own."""
    path = tmp_path / "mutated.gguf"
    n_refused = 0
    tracemalloc.start()
    for seed in range(n):
        path.write_bytes(mutated(whole, seed))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        n_refused += outcome(path) is not None
        assert tracemalloc.get_traced_memory()[1] - before < MAX_PYTHON_BYTES, f"seed {seed}"
    tracemalloc.stop()
    assert n / 3 < n_refused < n


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("n", [40, pytest.param(1_000, marks=pytest.mark.slow)])
def test_what_passes_does_not_kill_llama_cpp(whole: Path, tmp_path: Path, n: int) -> None:
    """EdgeLlama loads or refuses each mutated file that the validator let through, in a process of its own."""
    passed: list[Path] = []
    seed = 0
    while len(passed) < n:
        seed += 1
        path = tmp_path / f"seed-{seed}.gguf"
        raw = mutated(whole, seed)
        if raw == whole.read_bytes():
            continue
        path.write_bytes(raw)
        if outcome(path) is None:
            passed.append(path)
        else:
            path.unlink()
    assert not {path: end for path, end in loaded(passed).items() if end[0] not in (0, 1)}


def loaded(paths: list[Path], *options: str) -> dict[str, tuple[int, str]]:
    """How load_gguf.py ended on each: the status and the last words."""
    done = subprocess.run(
        [sys.executable, str(LOADER), *options, *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ends: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return ends


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("n", [12, pytest.param(1_200, marks=pytest.mark.slow)])
def test_no_mutant_of_any_architecture_kills_llama_cpp(tmp_path: Path, n: int) -> None:
    """n structured mutants of each; tests/attacks/fuzz.py runs more and makes a finding again from its seed."""
    campaign = fuzz.Campaign()
    for arch in tiny_models.ARCHITECTURES:
        fuzz.run(arch, range(n), tmp_path, campaign)
    assert campaign.findings == []
    assert campaign.n_mutants / 3 < campaign.n_accepted < campaign.n_mutants
    assert campaign.n_decoded > campaign.n_accepted / 3


def split(whole: Path, folder: Path, n_parts: int = 2) -> list[Path]:
    """The parts of a model, as llama-gguf-split writes them."""
    parts = Parts.of(whole)
    n = -(-len(parts.entries) // n_parts)
    paths = []
    for i in range(n_parts):
        part = Parts(fields=list(parts.fields) if i == 0 else [])
        part.entries = parts.entries[i * n : (i + 1) * n]
        start = part.entries[0].offset
        end = parts.entries[(i + 1) * n].offset if i + 1 < n_parts else len(parts.data)
        part.data = parts.data[start:end]
        part.entries = [Entry(e.name, e.ne, e.kind, e.offset - start) for e in part.entries]
        part.set("split.no", U16, struct.pack("<H", i))
        part.set("split.count", U16, struct.pack("<H", n_parts))
        part.set("split.tensors.count", I32, struct.pack("<i", len(parts.entries)))
        paths.append(folder / f"model-{i + 1:05}-of-{n_parts:05}.gguf")
        paths[-1].write_bytes(part.to_bytes())
    return paths


def test_a_split_model_is_checked_as_one(whole: Path, tmp_path: Path) -> None:
    paths = split(whole, tmp_path)
    file = check_model(paths[0])
    assert file.paths == paths
    assert file.tensors.keys() == check_model(whole).tensors.keys()
    EdgeLlama(str(paths[0]), n_ctx=64, n_threads=1).close()
    second = outcome(paths[1])
    assert second is not None and "part 2 of 2" in second.message
    parts = Parts.of(paths[1])
    parts.set("split.no", I32, struct.pack("<i", 1))  # llama.cpp aborts on this one
    paths[1].write_bytes(parts.to_bytes())
    assert "16-bit" in str(outcome(paths[0]))
    paths[1].unlink()
    assert f"1 of 2 parts are missing: {paths[1].name}" in str(outcome(paths[0]))


def test_unknown_architectures_get_container_checks_only(whole: Path, tmp_path: Path) -> None:
    parts = Parts.of(whole)
    parts.fields = [(key.replace("qwen3moe", "martian"), kind, value) for key, kind, value in parts.fields]
    parts.set("general.architecture", STRING, string("martian"))
    ATTACKS["experts_in_two_dimensions"].change(parts)
    path = tmp_path / "martian.gguf"
    path.write_bytes(parts.to_bytes())
    assert outcome(path) is None
    with pytest.raises(EdgeError):
        EdgeLlama(str(path), n_ctx=64)


def test_a_large_vocabulary_is_checked_quickly(tmp_path: Path) -> None:
    n = 150_000
    parts = Parts()
    words = [string(f"token{i}") for i in range(n)]
    parts.set(container.TOKENS, ARRAY, struct.pack("<IQ", STRING, n) + b"".join(words))
    parts.set("tokenizer.ggml.merges", ARRAY, struct.pack("<IQ", STRING, n) + b"".join(words))
    parts.set("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ", I32, n) + bytes(4 * n))
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(parts.to_bytes())
    seconds = []
    for _ in range(3):
        start = time.process_time()
        check_model(path)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3


def test_inspect_shows_what_a_file_holds(bundled: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundled[0]), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    experts = shown["experts"]
    assert (shown["architecture"], experts["n_expert"], experts["n_expert_used"]) == ("qwen3moe", 32, 4)
    assert experts["total_bytes"] == sum(g["n_experts"] * g["expert_bytes"] for g in experts["groups"])
    by_role = {role: sum(types.values()) for role, types in shown["bytes_by_role_and_type"].items()}
    assert by_role.pop("expert") == experts["total_bytes"]
    assert sum(by_role.values()) == shown["dense_bytes"]
    assert main(["inspect", str(bundled[0])]) == 0
    text = capsys.readouterr().out
    assert "4 of 32 experts" in text and "IQ3_S" in text
    assert main(["inspect", str(bundled[1])]) == 0
    assert "experts" not in capsys.readouterr().out


def test_inspect_refuses_as_run_does(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = Parts.of(whole)
    ATTACKS["f64_router"].change(parts)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(parts.to_bytes())
    for path, code, cause in (
        (bad, 1, "a router of type F64"),
        ("none.gguf", 2, "not found"),
        (__file__, 2, "not a GGUF"),
    ):
        assert main(["inspect", str(path)]) == code
        out, err = capsys.readouterr()
        assert out == "" and cause in err and err.count("error:") == 1 and "hint:" in err
