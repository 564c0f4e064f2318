"""Profiles: stored whole, found by what they are for, applied only where nothing else was asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_speq import EdgeError, EdgeLlama
from edge_speq.planning import profile
from edge_speq.planning.profile import Key, TuneProfile

CHOSEN = {"draft_tokens": 2, "on_miss": "fetch", "n_threads": 1}
Pair = tuple[Path, Path]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(profile.FOLDER_VARIABLE, str(tmp_path / "config"))
    return tmp_path / "config" / "profiles"


def stored(bundled: Pair, *, bounds: dict[str, Any] | None = None, chosen: dict[str, Any] = CHOSEN) -> Path:
    made_for = profile.key(*bundled)
    return profile.store(TuneProfile(made_for, bounds or {"resident": "1/2", "vram_budget": None}, chosen, {}))


def applied(bundled: Pair, wanted: str | Path | None = "auto", **options: Any) -> dict[str, Any] | None:
    options = {"draft": bundled[1], "n_ctx": 256} | options
    with contextlib.closing(EdgeLlama(str(bundled[0]), profile=wanted, **options)) as model:
        found = model.stats().profile
        if found is not None:
            assert model._speculator._governor.k_max == found["applied"].get(
                "draft_tokens", model._plan.max_draft_tokens
            )
        return None if found is None else found["applied"]


def test_what_is_stored_is_read(bundled: Pair, folder: Path) -> None:
    path = stored(bundled)
    assert path.parent == folder
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    found = profile.read(path, profile.key(*bundled))
    assert (found.chosen, found.bounds["resident"]) == (CHOSEN, "1/2")
    assert stored(bundled, chosen=CHOSEN | {"draft_tokens": 0}) == path  # replaces the earlier one
    assert profile.read(path, profile.key(*bundled)).chosen["draft_tokens"] == 0
    older = json.loads(path.read_text())
    del older["draft_hash"]  # before tune chose drafts
    path.write_text(json.dumps(older))
    assert profile.read(path, profile.key(*bundled)).draft_hash is None


def test_it_fills_in_what_was_left_open(bundled: Pair) -> None:
    path = stored(bundled)
    everything = {"resident": "1/2", "draft_tokens": 2, "on_miss": "fetch", "n_threads": 1}
    assert applied(bundled) == everything
    assert applied(bundled, path) == everything
    assert applied(bundled, resident=0.5) == CHOSEN
    assert applied(bundled, draft_tokens=1, n_threads=2) == {"resident": "1/2", "on_miss": "fetch"}
    assert applied(bundled, None) is None


@pytest.mark.parametrize(
    "options",
    [
        {"resident": "1/4"},
        {"resident": "1/2", "vram_budget": "100MiB"},
        {"resident": "1/2", "deterministic": True},
        {"resident": "1/2", "throttle_link": "5GB/s"},
        {"policy": "lru", "resident": "1/2"},
        {"draft": None, "resident": "1/2"},
    ],
    ids=str,
)
def test_other_requests_do_without_it(bundled: Pair, options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    stored(bundled)
    with caplog.at_level(logging.WARNING, "edge_speq"):
        assert applied(bundled, **options) is None
    assert not caplog.records


def test_the_text_is_the_same_with_it(bundled: Pair) -> None:
    stored(bundled)
    texts = []
    for wanted in (None, "auto"):
        with contextlib.closing(EdgeLlama(str(bundled[0]), draft=bundled[1], profile=wanted, n_ctx=256)) as model:
            texts.append(model.create_completion("The old house", max_tokens=24, seed=5)["choices"][0]["text"])
    assert texts[0] == texts[1]


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_text("{"), "is corrupt"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is corrupt"),
        (lambda path: path.write_text("[]"), "is corrupt"),
        (lambda path: edited(path, chosen={"draft_tokens": 999, "on_miss": "fetch", "n_threads": 1}), "is corrupt"),
        (lambda path: edited(path, chosen={"draft_tokens": 1, "on_miss": "magic", "n_threads": 1}), "is corrupt"),
        (lambda path: edited(path, chosen={"draft_tokens": 1, "on_miss": "auto", "n_threads": 10**9}), "is corrupt"),
        (lambda path: edited(path, chosen={"verbose": True}), "is corrupt"),
        (lambda path: edited(path, bounds={"resident": "most"}), "is corrupt"),
        (lambda path: edited(path, processors=999), "is stale: processors"),
        (lambda path: edited(path, version=0), "is stale: version"),
        (lambda path: edited(path, llama_cpp="another"), "is stale: llama_cpp"),
        (lambda path: edited(path, key={"model": "0" * 64, "draft": None, "device": "x"}), "made for another model"),
    ],
)
def test_a_spoilt_one_is_ignored_with_a_warning(
    bundled: Pair, spoil: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = stored(bundled)
    spoil(path)
    with caplog.at_level(logging.WARNING, "edge_speq"):
        assert applied(bundled, resident="1/2") is None
    (record,) = caplog.records
    assert str(path) in record.getMessage() and says in record.getMessage()
    assert "edge-speq tune" in record.getMessage()


def test_a_path_that_is_no_file_is_an_error(bundled: Pair, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="there is no profile"):
        applied(bundled, tmp_path / "none.json")


def test_a_missing_model_is_still_what_is_reported(bundled: Pair, tmp_path: Path) -> None:
    stored(bundled)
    with pytest.raises(EdgeError, match="model file not found"):
        EdgeLlama(str(tmp_path / "none.gguf"), profile="auto")


def test_names_tell_models_drafts_and_devices_apart() -> None:
    key = Key("a" * 64, "b" * 64, "CUDA0 (NVIDIA / RTX 4050: Laptop)")
    others = [dataclasses.replace(key, **{name: "c" * 64}) for name in ("model", "draft", "device")]
    names = {k.file_name for k in (key, *others, dataclasses.replace(key, draft=None))}
    assert len(names) == 5
    assert all(set(name) <= set("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-.") for name in names)


def test_a_folder_that_cannot_be_made_is_an_error(
    bundled: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(profile.FOLDER_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(EdgeError, match="cannot make the folder"):
        stored(bundled)
    assert applied(bundled) is None


def test_the_folder_of_profiles_is_the_system_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(profile.FOLDER_VARIABLE, str(tmp_path / "named"))
    assert profile.folder() == tmp_path / "named" / "profiles"
    monkeypatch.delenv(profile.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    base = {"win32": Path.home() / "AppData" / "Roaming", "darwin": Path.home() / "Library" / "Application Support"}
    assert profile.folder() == base.get(sys.platform, tmp_path) / "edge_speq" / "profiles"
