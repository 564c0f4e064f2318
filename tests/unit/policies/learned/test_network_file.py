"""The file of learned foresight, which may come from anybody."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.learning import SMALL, made
from support.traces import EXPERTS

from edge_speq import EdgeError
from edge_speq.core import Experts
from edge_speq.policies.learned import network_file
from edge_speq.policies.learned.network_file import Weights


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    for draft in (None, SMALL, EXPERTS):
        before, path = made(draft=draft), tmp_path / "foresight.npz"
        network_file.write(before, path)
        after = network_file.read(path)
        assert after.meta == before.meta and (after.target, after.draft) == (before.target, before.draft)
        for field in dataclasses.fields(Weights):
            if field.name != "meta":
                np.testing.assert_array_equal(getattr(after, field.name), getattr(before, field.name))
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """/dev/null would be one afterwards, for everybody."""
    fifo = tmp_path / "fifo"
    try:
        os.mkfifo(fifo)
    except (AttributeError, OSError):
        pytest.skip("no named pipes here")
    for path in (fifo, tmp_path):
        with pytest.raises(EdgeError, match="not a file"):
            network_file.write(made(), path)
    assert fifo.is_fifo() and list(tmp_path.iterdir()) == [fifo]


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The file with other arrays; those of objects are pickled, as an attacker would."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez(path, allow_pickle=True, **arrays)


def with_meta(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        meta = json.loads(arrays["meta"].tobytes()) | changes
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)

    return change


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("something was unpickled",)


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.__setitem__(name, value)


@pytest.mark.parametrize(
    "change",
    [
        _set("out", np.array([Bomb()], dtype=object)),
        _set("meta", np.array([Bomb()], dtype=object)),
        _set("meta", np.frombuffer(b"{", dtype=np.uint8)),
        _set("meta", np.frombuffer(b"[" * 100_000, dtype=np.uint8)),
        _set("bias", np.zeros(7, dtype=np.float32)),
        _set("bias", np.zeros(6)),
        _set("out_bias", np.full(64, np.nan, dtype=np.float32)),
        _set("tokens", np.zeros(8, dtype=np.int32)),
        with_meta(target=[4, 16, 17]),
        with_meta(target=[1 << 40, 16, 2]),
        with_meta(target=[4096, 65536, 2]),
        with_meta(target=[4, 16, 2.0]),
        with_meta(draft=[3, 8, 2]),
        with_meta(hidden=0),
        with_meta(hidden=-1),
        with_meta(hash="0"),
        with_meta(version=2),
        lambda arrays: arrays.pop("twin"),
    ],
)
def test_a_file_that_is_not_sound_is_one_error(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = tmp_path / "foresight.npz"
    network_file.write(made(), path)
    rewritten(path, change)
    with pytest.raises(EdgeError) as caught:
        network_file.read(path)
    assert str(path) in caught.value.message and "--learn" in caught.value.hint


def test_a_corrupt_or_missing_file_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "foresight.npz"
    network_file.write(made(), path)
    whole = path.read_bytes()
    for bad in (b"", pickle.dumps(made().meta), whole[: len(whole) // 2], whole[:200] + b"\0" * 400 + whole[600:]):
        path.write_bytes(bad)
        with pytest.raises(EdgeError):
            network_file.read(path)
    with pytest.raises(EdgeError) as caught:
        network_file.read(tmp_path / "none.npz")
    assert caught.value.usage


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """A header of 8 GB over zeros that deflate to nothing is refused before they are read."""
    path = tmp_path / "bomb.npz"
    network_file.write(made(), path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                if name != "out":
                    np.lib.format.write_array(member, values)
                    continue
                header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 31,)}
                np.lib.format.write_array_header_1_0(member, header)
                for _ in range(64):
                    member.write(bytes(1 << 20))
    with pytest.raises(EdgeError, match="out is float32 of shape"):
        network_file.read(path)


def test_it_serves_the_models_that_it_was_learned_for() -> None:
    learned = made(draft=SMALL)
    learned.require(EXPERTS, SMALL)
    learned.require(EXPERTS, None)
    dense, other_types = Experts(0, 0, 0, ()), dataclasses.replace(EXPERTS, groups=())
    learned.require(other_types, dense)
    for target, draft, cause in (
        (SMALL, None, "2 of 16 experts in 4 blocks, the model has 2 of 8 experts in 3 blocks"),
        (EXPERTS, EXPERTS, "with a draft of 2 of 8 experts in 3 blocks, this draft has 2 of 16"),
    ):
        with pytest.raises(EdgeError, match=cause) as caught:
            learned.require(target, draft)
        assert caught.value.usage and caught.value.hint
    with pytest.raises(EdgeError, match="without routed experts"):
        made().require(EXPERTS, SMALL)


def test_a_file_and_a_policy_go_together_or_not(tmp_path: Path) -> None:
    network_file.write(made(), tmp_path / "f.npz")
    assert network_file.load_for_policy(None, "auto") is None
    assert network_file.load_for_policy(tmp_path / "f.npz", "auto") is not None
    for path, policy, cause in (
        (None, "learned", "needs a trained predictor"),
        (tmp_path / "f.npz", "lru", "does not use"),
    ):
        with pytest.raises(EdgeError, match=cause) as caught:
            network_file.load_for_policy(path, policy)
        assert caught.value.usage
