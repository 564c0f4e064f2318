"""edge_speq.convert.huggingface.pretokenizer: rules are known by what they say, whatever the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from edge_speq.convert.huggingface import pretokenizer
from edge_speq.convert.huggingface.pretokenizer import GPT2, GPT4O, LLAMA3, QWEN2, QWEN35, TEKKEN, recognize

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_STEP = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}

# as tokenizer.json files of these models have it: Llama 3, Qwen 2
LLAMA3_FILE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_FILE = LLAMA3_FILE.replace("{1,3}", "")


def split(rule: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": rule}, "behavior": behavior, "invert": invert}


def definition(*steps: dict[str, Any], normalizer: Any = None, **model: Any) -> dict[str, Any]:
    pre: Any = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    return {"model": {"type": "BPE", **model}, "normalizer": normalizer, "pre_tokenizer": pre}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (definition(GPT2_STEP), "gpt-2"),
        (definition({"type": "ByteLevel", "add_prefix_space": False}), "gpt-2"),
        (definition(split(GPT2), BYTES), "gpt-2"),
        (definition(split(LLAMA3), BYTES, ignore_merges=True), "llama-bpe"),
        (definition(split(LLAMA3_FILE, "Removed", True), BYTES, ignore_merges=True), "llama-bpe"),
        (definition(split(LLAMA3), BYTES), "smaug-bpe"),
        (definition(split(QWEN2_FILE), BYTES, normalizer={"type": "NFC"}), "qwen2"),
        (definition({"type": "Sequence", "pretokenizers": [split(QWEN2)]}, BYTES), "qwen2"),
        (definition(split(QWEN35), BYTES), "qwen35"),
        (definition(split(TEKKEN), BYTES, ignore_merges=True), "tekken"),
        (definition(split(GPT4O), BYTES), "gpt-4o"),
        (definition(DIGITS, GPT2_STEP), "smollm"),
    ],
)
def test_known_rules_have_llama_cpps_names(given: dict[str, Any], name: str) -> None:
    assert recognize(given) == name and name in pretokenizer.NAMES


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model": {"type": "Unigram"}, "pre_tokenizer": GPT2_STEP},
        {"model": {"type": "BPE"}, "pre_tokenizer": None},
        definition({"type": "Whitespace"}),
        definition(GPT2_STEP | {"add_prefix_space": True}),
        definition(GPT2_STEP, ignore_merges=True),
        definition(GPT2_STEP, normalizer={"type": "Lowercase"}),
        definition(split(r"\p{N}"), BYTES),
        definition(split(QWEN2), BYTES, ignore_merges=True),
        definition(split(QWEN2, "MergedWithNext"), BYTES),
        definition(split(QWEN2, invert=True), BYTES),
        definition(split(QWEN2), split(LLAMA3), BYTES),
        definition(DIGITS | {"individual_digits": False}, GPT2_STEP),
    ],
)
def test_others_have_none(given: dict[str, Any]) -> None:
    assert recognize(given) is None


def test_rules_are_those_of_published_files() -> None:
    assert LLAMA3 == LLAMA3_FILE and QWEN2 == QWEN2_FILE
