"""edge-speq doctor: what it finds on a sound installation and on broken ones."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_speq import EdgeError, system
from edge_speq.cli import doctor
from edge_speq.gguf import bundled
from edge_speq.tune import link_speed

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"package", "llama.cpp", "device", "built for", "driver", "cpu", "memory", "memlock", "pinned", "demo", "disk"}
NAMES |= {"disk speed", "link speed", "optional"}


def examined(*arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "edge_speq", "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def failed(report: dict[str, Any], status: str = "fail") -> list[dict[str, Any]]:
    return [finding for finding in report["findings"] if finding["status"] == status]


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., str]:
    """A PYTHONPATH with a llama_cpp like the installed one, but for files left out or replaced."""

    def make(leave_out: str = "", replaced: dict[str, str] | None = None) -> str:
        import llama_cpp

        copy, others = tmp_path / "llama_cpp", replaced or {}
        for folder in ("", "lib", "include"):
            (copy / folder).mkdir(exist_ok=True)
            for path in (Path(llama_cpp.__file__).parent / folder).iterdir():
                named = bool(leave_out) and leave_out in path.name
                if not named and path.name not in ("lib", "include", "__pycache__"):
                    (copy / folder / path.name).symlink_to(path)
        for name, text in others.items():
            (copy / name).unlink(missing_ok=True)
            (copy / name).write_text(text, encoding="utf-8")
        return os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    return make


def test_a_sound_installation_is_usable() -> None:
    code, report, errors = examined()
    assert (code, report["usable"], errors) == (0, True, "")
    assert {finding["name"] for finding in report["findings"]} >= NAMES
    for finding in report["findings"]:
        assert set(finding) == {"name", "status", "text", "remedy", "values"}
        assert finding["status"] in ("ok", "note", "warn")
        assert bool(finding["remedy"]) == (finding["status"] != "ok")


def test_the_numbers_are_the_machine_s() -> None:
    _, report, _ = examined()
    values = {finding["name"]: finding["values"] for finding in report["findings"]}
    assert values["package"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert 0 < values["memory"]["available_bytes"] <= values["memory"]["total_bytes"]
    assert values["disk"]["total_bytes"] == shutil.disk_usage(bundled.path(bundled.MODEL)).total
    assert 1 <= values["cpu"]["usable"] <= values["cpu"]["processors"] == os.cpu_count()
    assert len(values["llama.cpp"]["commit"]) > 0
    assert all(
        feature.isupper() or "_" in feature or feature[0].isupper() for feature in values["built for"]["features"]
    )


def test_the_text_has_a_line_for_each_finding_and_a_verdict() -> None:
    done = subprocess.run([sys.executable, "-m", "edge_speq", "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[-1] == "usable"
    assert all(line.startswith(("ok ", "note ", "warn ", "      ")) for line in lines[:-1])
    assert any("patched llama-cpp-python" in line for line in lines)


def test_the_stock_build_is_a_finding(package: Callable[..., str]) -> None:
    code, report, errors = examined(PYTHONPATH=package(leave_out="edge_speq"))
    assert (code, report["usable"], errors) == (1, False, "")
    (finding,) = failed(report)
    assert "stock build" in finding["text"]
    assert "pip install ./native ." in finding["remedy"]
    assert "memory" in {finding["name"] for finding in report["findings"]}  # the rest is examined all the same


def test_a_header_of_another_build_is_a_finding(package: Callable[..., str]) -> None:
    import llama_cpp

    header = (Path(llama_cpp.__file__).parent / "include" / "edge_speq.h").read_text(encoding="utf-8")
    code, report, _ = examined(PYTHONPATH=package(replaced={"include/edge_speq.h": header + "\n"}))
    assert code == 1
    assert "was not built from edge_speq.h" in failed(report)[0]["text"]


def test_a_package_that_does_not_import_is_a_finding(package: Callable[..., str]) -> None:
    code, report, errors = examined(PYTHONPATH=package(replaced={"__init__.py": "raise OSError('no libgomp.so.1')"}))
    assert (code, errors) == (1, "")
    assert "libgomp.so.1" in failed(report)[0]["text"]
    assert failed(report)[0]["remedy"]


def test_a_module_beside_the_libraries_that_does_not_load_is_a_warning(package: Callable[..., str]) -> None:
    path = package(replaced={"lib/libggml-cuda.so": "not a library"})
    code, report, errors = examined(PYTHONPATH=path)
    assert (code, errors) == (0, "")
    text = next(finding["text"] for finding in failed(report, "warn") if finding["name"] == "module")
    assert "libggml-cuda.so does not load" in text
    assert "invalid ELF header" in text or "file too short" in text  # the linker's own reason


def test_a_named_module_that_does_not_load_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "libggml-odd.so").write_text("not a library")
    code, report, errors = examined(EDGE_SPEQ_BACKENDS=str(tmp_path))
    assert (code, errors) == (1, "")
    assert "libggml-odd.so" in failed(report)[0]["text"]
    assert "EDGE_SPEQ_BACKENDS" in failed(report)[0]["remedy"]
    code, report, _ = examined(EDGE_SPEQ_BACKENDS=str(tmp_path / "nowhere"))
    assert code == 1
    assert "holds no ggml backend module" in failed(report)[0]["text"]


def test_missing_demo_models_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise EdgeError(f"the bundled model {name} is missing", "install edge_speq again")

    monkeypatch.setattr(bundled, "path", missing)
    findings = list(doctor.bundled_models())
    assert [finding.status for finding in findings] == ["warn", "warn"]
    assert all("missing" in finding.text and finding.remedy for finding in findings)
    assert doctor.disk().status in ("ok", "warn")  # of the current folder then


def test_a_full_disk_and_little_memory_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10 << 30, 10 << 30, 1 << 20))
    monkeypatch.setattr(system, "memory", lambda: (8 << 30, 100 << 20))
    for finding in (doctor.disk(), doctor.memory()):
        assert finding.status == "warn"
        assert finding.remedy


def test_an_unknown_system_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(system, "_read", lambda _: "")
    monkeypatch.setattr(psutil, "virtual_memory", unknown)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    assert system.memory() is None
    assert system.cores() is None
    assert system.cpu_model()
    assert doctor.memory().status == doctor.cpu().status == "ok"


def test_a_container_s_limit_bounds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/sys/fs/cgroup/memory.max": "1073741824\n", "/sys/fs/cgroup/memory.current": "268435456\n"}
    found = types.SimpleNamespace(total=8 << 30, available=6 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    monkeypatch.setattr(system, "_read", lambda path: files.get(path, ""))
    assert system.memory() == (1 << 30, 768 << 20)
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert system.memory() == (8 << 30, 6 << 30)


def test_memlock_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "locked_memory_limit", lambda: -1)
    assert doctor.locked_memory().text == "unlimited"
    assert doctor.locked_memory().values == {"limit_bytes": None}


# --- what is measured --------------------------------------------------------------------------------------


def test_it_takes_seconds() -> None:
    started = time.monotonic()
    code, _, _ = examined()
    assert code == 0
    assert time.monotonic() - started < 30  # a few on an idle machine


def test_the_disk_is_measured_with_the_named_file(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(range(256)) * (1 << 15))
    rate = link_speed.disk(path)
    if rate is None:
        pytest.skip("this system cannot drop cached file pages")
    assert rate.n_bytes == 8 << 20
    assert 1e5 < rate.bytes_per_s < 1e12
    finding = doctor.disk_rate(str(path))
    assert finding.status == "ok" and "large.bin" in finding.text and finding.values["bytes_per_s"] > 0


def test_reading_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(32 << 20))
    monkeypatch.setattr(link_speed, "SECONDS", 0.0)
    assert link_speed.disk(path) is None  # no time for a first piece
    monkeypatch.setattr(link_speed, "SECONDS", 1.0)
    monkeypatch.setattr(link_speed, "MOST", 8 << 20)
    rate = link_speed.disk(path)
    assert rate is None or rate.n_bytes == 8 << 20


def test_a_file_that_cannot_be_read_is_a_warning(tmp_path: Path) -> None:
    code, report, _ = examined(str(tmp_path / "none.gguf"))
    assert code == 0
    finding = next(finding for finding in failed(report, "warn") if finding["name"] == "disk speed")
    assert "none.gguf" in finding["text"] and finding["remedy"]


def test_without_a_gpu_the_link_is_left_out_with_a_reason() -> None:
    if link_speed.has_link():
        pytest.skip("there is a GPU")
    finding = doctor.link_rate(None)
    assert (finding.status, finding.values) == ("ok", {})
    assert "no GPU" in finding.text


def test_transfers_into_slots_are_timed(tiny: Any) -> None:
    """Here also without a GPU: then they are copies within RAM."""
    rate = link_speed.link()
    assert 1e7 < rate.bytes_per_s < 1e12
    assert 90 << 10 < rate.n_bytes < 110 << 10  # an expert of the bundled model
    with pytest.raises(EdgeError, match="no experts to transfer"):
        link_speed.link(str(tiny.dense()))


def test_page_locking_leaves_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_speq.runtime import loading

    monkeypatch.setattr(system, "memory", lambda: (16 << 30, 12 << 30))
    most = doctor.page_locked().values["most_bytes"]
    assert loading.fits_in_memory(most) and not loading.fits_in_memory(most + (1 << 20))
    monkeypatch.setattr(system, "memory", lambda: None)
    assert doctor.page_locked().status == "ok"


# --- extras ------------------------------------------------------------------------------------------------


def test_the_extras_are_those_of_the_package() -> None:
    tomli = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    extras = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"test", "lint"}
    for name, modules in doctor.EXTRAS.items():
        assert len(modules) == len(extras[name])


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"serve": ("json", "no_such_module"), "plot": ("json",)})
    serve, plot = doctor.extras()
    assert (serve.status, serve.remedy) == ("note", system.install_hint("serve"))
    assert serve.values == {"extra": "serve", "missing": ["no_such_module"]}
    assert (plot.status, plot.remedy) == ("ok", "")


def test_install_hints_name_packages() -> None:
    """The package is on no index: `pip install edge-speq[serve]` would fail."""
    pip, install, *packages = shlex.split(system.install_hint("serve"))
    names = [re.split(r"[<>=!~]", package)[0] for package in packages]
    assert (pip, install) == ("pip", "install") and {"fastapi", "uvicorn"} <= set(names)
    assert all(importlib.metadata.version(name) for name in names)


def test_a_hint_without_an_installed_package_names_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert system.install_hint("serve") == 'pip install ".[serve]"'


def test_drivers_are_named_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda path: path.name in ("nvidia", "xe"))
    monkeypatch.setattr(system, "_read", lambda path: "570.1\n" if "nvidia" in path else "")
    assert doctor.driver().text == "nvidia 570.1, xe"


@pytest.mark.parametrize(
    ("needs", "installed", "status", "needed"),
    [
        ("libcudart.so.13", "580.95.05", "ok", 580),
        ("libcudart.so.13", "575.64", "warn", 580),
        ("libcudart.so.12", "575.64", "ok", 525),
        ("libcublas.so.12", "", "warn", 525),
        ("libvulkan.so.1", "", "ok", None),
    ],
)
def test_the_driver_is_compared_with_what_the_backend_needs(
    needs: str, installed: str, status: str, needed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / f"libggml-{'cuda' if 'cu' in needs else 'vulkan'}.so"
    module.write_bytes(b"\x7fELF\0" + needs.encode() + b"\0libc.so.6\0")
    monkeypatch.setattr(doctor, "backend_modules", lambda: [module])
    monkeypatch.setattr(system, "_read", lambda path: installed if "nvidia" in path else "")
    finding = doctor.driver()
    assert (finding.status, finding.values["needed_driver"]) == (status, needed)
    assert finding.values["nvidia_driver"] == (installed or None)
    if needed is not None:
        assert status == "ok" or (str(needed) in finding.remedy and str(needed) in finding.text)


def test_a_cuda_module_without_graphs_is_named() -> None:
    cpu, cuda = "CPU : SSE3 = 1 | AVX = 1 |", " CUDA : ARCHS = 900 |"
    assert doctor.built_for(cpu).status == "ok"
    assert doctor.built_for(f"{cuda} USE_GRAPHS = 1 | {cpu}").status == "ok"
    slow = doctor.built_for(f"{cuda} {cpu}")
    assert slow.status == "warn"
    assert "GGML_CUDA_GRAPHS=ON" in slow.remedy
    assert slow.values == {"features": ["SSE3", "AVX"]}
