"""native/edge_build.py on a miniature sdist: no network, no compiler, no scikit-build-core (patch-ng where marked)."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "native"))

import edge_build
from _build import cache, source, toolchain
from _build.digest import file_sha256
from _build.patches import apply_patches
from _build.upstream import Upstream

VERSION = "0.3.36"
FOLDER = f"llama_cpp_python-{VERSION}"
GRAPH = "vendor/llama.cpp/src/llama-graph.cpp"
FILES = {
    "CMakeLists.txt": "upstream's\n",
    "llama_cpp/__init__.py": f'__version__ = "{VERSION}"\n',
    "vendor/llama.cpp/CMakeLists.txt": "",
    "vendor/llama.cpp/LICENSE": "MIT\n",
    "vendor/llama.cpp/convert_hf_to_gguf.py": "import conversion\n",
    "vendor/llama.cpp/conversion/base.py": "base\n",
    "vendor/llama.cpp/gguf-py/gguf/vocab.py": "vocab\n",
    "vendor/llama.cpp/models/templates/chat.jinja": "{{ chat }}\n",
    GRAPH: "one\ntwo\nthree\n",
}
PATCH = f"Reason: two is too few.\n\n--- a/{GRAPH}\n+++ b/{GRAPH}\n@@ -1,3 +1,3 @@\n one\n-two\n+many\n three\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def tar_of(path: Path, members: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write(tmp_path / "tree", FILES)


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    return tar_of(tmp_path / f"{FOLDER}.tar.gz", {f"{FOLDER}/{name}": text for name, text in FILES.items()})


@pytest.fixture
def upstream(sdist: Path) -> Upstream:
    return Upstream("llama-cpp-python", VERSION, file_sha256(sdist), "0c1e57", ["0001-hook.patch"])


@pytest.fixture
def native(tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature native/ that the backend takes for its own, with its own build cache."""
    toml = (
        f'name = "{upstream.name}"\nversion = "{upstream.version}"\nsha256 = "{upstream.sha256}"\n'
        f'llama_cpp_commit = "{upstream.llama_cpp_commit}"\npatches = ["0001-hook.patch"]\n'
    )
    files = {
        "upstream.toml": toml,
        "pyproject.toml": "ours\n",
        "LICENSE": "ours\n",
        "CMakeLists.txt": "ours\n",
        "edge_build.py": "",
        "_build/source.py": "",
        "patches/0001-hook.patch": PATCH,
        "src/slots.cpp": "int slots;\n",
        "include/edge_speq.h": "int edge;\n",
    }
    folder = write(tmp_path / "native", files)
    monkeypatch.setattr(edge_build, "NATIVE", folder)
    monkeypatch.setenv("EDGE_SPEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(source.VARIABLE, raising=False)
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setattr(toolchain, "version", lambda command: f"{command} 12.2\n")
    return folder


def test_upstream_toml_and_pyproject_agree() -> None:
    upstream = Upstream.load(edge_build.NATIVE / "upstream.toml")
    pyproject = (edge_build.NATIVE / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{upstream.version}+edgespeq.' in pyproject
    assert sorted(upstream.patches) == sorted(path.name for path in (edge_build.NATIVE / "patches").glob("*.patch"))
    assert len(upstream.sha256) == 64 and len(upstream.llama_cpp_commit) == 40


# --- the source ---------------------------------------------------------------------------------------------------


def test_wrong_sha256_names_file_expected_and_got(
    sdist: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(source.VARIABLE, str(sdist))
    with pytest.raises(SystemExit) as failure:
        source.identify(replace(upstream, sha256="0" * 64))
    message = str(failure.value)
    assert str(sdist) in message and "0" * 64 in message and file_sha256(sdist) in message


def test_missing_source_names_the_path(tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(source.VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(SystemExit, match=r"absent, which does not exist\nhint: give the absolute path"):
        source.identify(upstream)


def test_tree_of_another_version_is_refused(tree: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(source.VARIABLE, str(tree))
    with pytest.raises(SystemExit, match=r"holds llama-cpp-python 0\.3\.36, expected 0\.3\.37"):
        source.identify(replace(upstream, version="0.3.37"))


def test_tree_without_llama_cpp_is_refused(tree: Path, upstream: Upstream) -> None:
    (tree / "vendor/llama.cpp/CMakeLists.txt").unlink()
    with pytest.raises(SystemExit, match="is not an unpacked llama-cpp-python sdist"):
        source.check_tree(tree, upstream)


def test_tree_is_known_by_its_contents(tree: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(source.VARIABLE, str(tree))
    before = source.identify(upstream)
    write(tree, {".git/HEAD": "ignored"})
    assert source.identify(upstream) == before
    write(tree, {GRAPH: "changed\n"})
    assert source.identify(upstream).digest != before.digest


def test_failed_download_says_how_to_build_without_a_network(
    native: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(native))
    with pytest.raises(SystemExit, match=r"pip could not download[^\n]*\nhint: without a network, set EDGE_SPEQ_LLAMA"):
        source.fetch(upstream)


def test_damaged_sdist_in_the_cache_is_downloaded_again(
    native: Path, sdist: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads: list[Path] = []

    def download(wanted: Upstream, into: Path) -> Path:
        downloads.append(into)
        return sdist

    monkeypatch.setattr(source, "download", download)
    kept = source.fetch(upstream)
    assert source.fetch(upstream) == kept and len(downloads) == 1
    kept.write_bytes(b"damaged")
    assert file_sha256(source.fetch(upstream)) == upstream.sha256 and len(downloads) == 2


def test_unpack_gives_private_copies_without_git(sdist: Path, tree: Path, tmp_path: Path) -> None:
    write(tree, {".git/config": "", GRAPH: FILES[GRAPH]})
    for index, origin in enumerate((sdist, tree)):
        copy = source.unpack(origin, tmp_path / f"work{index}")
        assert (copy / GRAPH).read_text(encoding="utf-8") == FILES[GRAPH]
        assert copy != origin and not (copy / ".git").exists()


@pytest.mark.parametrize("name", ["../outside", "/outside", f"{FOLDER}/../../outside", f"{FOLDER}\\..\\outside"])
def test_unsafe_member_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    evil = tar_of(tmp_path / "evil.tar.gz", {f"{FOLDER}/fine": "", name: "x"})
    with pytest.raises(SystemExit, match="unsafe member"):
        source.unpack(evil, tmp_path / "work")
    assert not (tmp_path / "work").exists() and not (tmp_path / "outside").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo(f"{FOLDER}/link")
    info.type, info.linkname = kind, "target"
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(SystemExit, match="unsafe member"):
        source.unpack(tmp_path / "evil.tar", tmp_path / "work")


# --- patches ------------------------------------------------------------------------------------------------------


def test_patch_applies_as_written(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("patch_ng", reason="needs patch-ng, a build requirement of native/")
    created = "--- /dev/null\n+++ b/llama_cpp/new.py\n@@ -0,0 +1 @@\n+X = 1\n"
    write(tmp_path, {"1.patch": PATCH, "2.patch": created})
    apply_patches([tmp_path / "1.patch", tmp_path / "2.patch"], tree)
    assert (tree / GRAPH).read_text(encoding="utf-8") == "one\nmany\nthree\n"
    assert (tree / "llama_cpp/new.py").read_text(encoding="utf-8") == "X = 1\n"


@pytest.mark.parametrize(
    ("patch", "found"),
    [
        pytest.param(PATCH, "one\nother\nthree\n", id="context differs"),
        pytest.param(PATCH, "zero\none\ntwo\nthree\n", id="right context on another line"),
        pytest.param(PATCH, "one\nmany\nthree\n", id="applied before"),
        pytest.param(PATCH.replace("src/llama-graph", "src/absent"), "one\ntwo\nthree\n", id="no such file"),
        pytest.param(f"--- /dev/null\n+++ b/{GRAPH}\n@@ -0,0 +1 @@\n+x\n", "one\n", id="would overwrite"),
        pytest.param("not a patch\n", "one\n", id="not a diff"),
    ],
)
def test_patch_that_does_not_apply_is_named(patch: str, found: str, tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("patch_ng", reason="needs patch-ng, a build requirement of native/")
    write(tmp_path, {"0001-hook.patch": patch})
    write(tree, {GRAPH: found})
    with pytest.raises(SystemExit, match=r"^error: 0001-hook\.patch does not apply:\n  \S"):
        apply_patches([tmp_path / "0001-hook.patch"], tree)
    assert (tree / GRAPH).read_text(encoding="utf-8") == found


def test_missing_patch_is_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"lists 0001-hook\.patch"):
        apply_patches([tmp_path / "0001-hook.patch"], tree)


# --- the toolchain and the key ------------------------------------------------------------------------------------


def current_key(settings: toolchain.Settings = None) -> str:
    upstream = Upstream.load(edge_build.NATIVE / "upstream.toml")
    ours = cache.recipe(edge_build.NATIVE, upstream)
    return cache.key({"source": upstream.sha256, "recipe": ours, **toolchain.toolchain(settings)})


@pytest.mark.parametrize(
    "name",
    [
        "upstream.toml",
        "pyproject.toml",
        "CMakeLists.txt",
        "edge_build.py",
        "_build/source.py",
        "patches/0001-hook.patch",
        "src/slots.cpp",
        "src/new/file.cpp",
        "include/edge_speq.h",
    ],
)
def test_key_follows_every_file_of_ours(name: str, native: Path) -> None:
    before = current_key()
    assert current_key() == before
    old = (native / name).read_text(encoding="utf-8") if (native / name).exists() else ""
    write(native, {name: f"{old}# changed\n"})
    assert current_key() != before


@pytest.mark.parametrize(
    "name", ["CMAKE_ARGS", "CXXFLAGS", "CUDAARCHS", "CMAKE_TOOLCHAIN_FILE", "SKBUILD_CMAKE_DEFINE"]
)
def test_key_follows_the_environment(name: str, native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = current_key()
    monkeypatch.setenv(name, "-DGGML_CUDA=on")
    assert current_key() != before


def test_key_ignores_the_number_of_jobs(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = current_key()
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "7")
    assert current_key() == before


def test_key_follows_settings_compiler_and_platform(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [current_key(), current_key({"cmake.build-type": "Debug"})]
    with monkeypatch.context() as change:
        change.setattr(toolchain, "version", lambda command: f"{command} 13.1\n")
        keys.append(current_key())
    with monkeypatch.context() as change:
        change.setattr("sysconfig.get_platform", lambda: "linux-riscv64")
        keys.append(current_key())
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("arguments", "settings", "depends"),
    [
        ("", None, True),
        ("-DGGML_NATIVE=ON", None, True),
        ("-DGGML_NATIVE=OFF", None, False),
        ("-DGGML_CUDA=on -D GGML_NATIVE:BOOL=off", None, False),
        ("-DGGML_NATIVE=OFF -DGGML_NATIVE=ON", None, True),
        ("", {"cmake.define.GGML_NATIVE": "OFF"}, False),
    ],
)
def test_key_follows_the_cpu_of_a_native_build(
    arguments: str, settings: toolchain.Settings, depends: bool, native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", arguments)
    keys = set()
    for model in ("avx2", "avx512"):
        monkeypatch.setattr(toolchain, "cpu", lambda model=model: model)
        keys.add(current_key(settings))
    assert len(keys) == (2 if depends else 1)


def test_no_compiler_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("CMake finds Visual Studio without PATH")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"^error: no C\+\+ compiler: none on PATH\nhint: install one"):
        toolchain.compiler("CXX", None)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="no-such-compiler -m64 does not run"):
        toolchain.compiler("CXX", None)


# --- the wheel ----------------------------------------------------------------------------------------------------


def build(out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Builds with a stand-in for CMake that keeps every file of the tree; returns the wheel's files."""

    def compile_wheel(tree: Path, folder: Path, upstream: Upstream, settings: toolchain.Settings) -> Path:
        with zipfile.ZipFile(folder / f"{FOLDER}-py3-none-any.whl", "w") as wheel:
            for path in filter(Path.is_file, tree.rglob("*")):
                wheel.writestr(path.relative_to(tree).as_posix(), path.read_bytes())
        return Path(wheel.filename or "")

    monkeypatch.setattr(edge_build, "compile_wheel", compile_wheel)
    out.mkdir()
    with zipfile.ZipFile(out / edge_build.build_wheel(str(out))) as wheel:
        return {name: wheel.read(name).decode() for name in wheel.namelist()}


def test_build_patches_and_overlays_then_serves_the_cache(
    native: Path, sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("patch_ng", reason="needs patch-ng, a build requirement of native/")
    before = file_sha256(sdist)
    monkeypatch.setenv(source.VARIABLE, str(sdist))
    files = build(tmp_path / "out", monkeypatch)
    assert files[GRAPH] == "one\nmany\nthree\n"
    assert files["CMakeLists.txt"] == files["pyproject.toml"] == "ours\n"
    for name in ("conversion/base.py", "gguf-py/gguf/vocab.py", "models/templates/chat.jinja", "LICENSE"):
        assert files[f"llama_cpp/_convert/{name}"] == FILES[f"vendor/llama.cpp/{name}"]
    assert files["llama_cpp/_convert/convert_hf_to_gguf.py"] == FILES["vendor/llama.cpp/convert_hf_to_gguf.py"]
    assert files["edge/src/slots.cpp"] == "int slots;\n" and files["edge/include/edge_speq.h"] == "int edge;\n"
    assert file_sha256(sdist) == before

    # The same source by its pinned hash: neither fetched nor unpacked.
    monkeypatch.delenv(source.VARIABLE)
    for step in ("fetch", "unpack"):
        monkeypatch.setattr(source, step, lambda *_: pytest.fail("the cached wheel was not used"))
    assert build(tmp_path / "again", monkeypatch) == files


def test_named_tree_is_not_modified(native: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("patch_ng", reason="needs patch-ng, a build requirement of native/")
    monkeypatch.setenv(source.VARIABLE, str(tree))
    before = source.identify(Upstream.load(native / "upstream.toml"))
    build(tmp_path / "out", monkeypatch)
    assert source.identify(Upstream.load(native / "upstream.toml")) == before


def test_damaged_or_partial_wheel_is_not_served(native: Path, tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"cut off")
    cache.store("key", tmp_path / "x.whl")
    assert cache.find("key") is None and cache.find("another key") is None


def test_cache_that_cannot_be_written_does_not_fail_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGE_SPEQ_CACHE", str(tmp_path / "file"))
    cache.store("key", tmp_path / "file")
    assert "warning: the wheel was not kept" in capsys.readouterr().out


def test_place_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "wheel.whl"
    for text in ("first", "second"):
        (tmp_path / "wheel.whl").write_text(text, encoding="utf-8")
        cache.place(tmp_path / "wheel.whl", target)
        assert target.read_text(encoding="utf-8") == text
    assert list(target.parent.iterdir()) == [target]


def test_digest_is_plain_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
