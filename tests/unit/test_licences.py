"""The licences of the code, the weights and the native wheel agree with the packages' metadata."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_both_packages_are_mit_and_carry_the_same_text() -> None:
    assert text("LICENSE").startswith("MIT License\n")
    assert text("native/LICENSE") == text("LICENSE")  # the build copies only what lies under native/
    for name in ("pyproject.toml", "native/pyproject.toml"):
        assert '\nlicense = "MIT"\n' in text(name)
    assert '\nlicense-files = ["LICENSE", "NOTICE", "models/LICENSE"]\n' in text("pyproject.toml")


def test_the_notice_names_what_is_under_another_copyright() -> None:
    assert "Apache License" in text("models/LICENSE")[:200]
    for name in ("models/LICENSE", "llama.cpp", "llama-cpp-python", "native/upstream.toml"):
        assert name in text("NOTICE")
