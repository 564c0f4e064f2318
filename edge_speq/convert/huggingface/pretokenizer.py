"""Recognize llama.cpp's pre-tokenizer by the definition in a tokenizer.json.

llama.cpp's converter recognizes pre-tokenizers by a hash of the tokens of one text, which depends on the vocabulary. It
does not know a new vocabulary with an old rule. The rules below are the regular expressions of src/llama-vocab.cpp of
the pinned llama.cpp, in the form of tokenizer.json files.
"""

from __future__ import annotations

from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORDS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED_REST = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
QWEN35 = rf"{_CONTRACTIONS}|{_MARKED_WORDS}|\p{{N}}|{_MARKED_REST}"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}"
GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}"

# (rule, ignore_merges: words that are tokens are not merged) -> llama.cpp's name
_BY_RULE: dict[tuple[str, bool], str] = {
    (GPT2, False): "gpt-2",
    (LLAMA3, True): "llama-bpe",
    (LLAMA3, False): "smaug-bpe",
    (QWEN2, False): "qwen2",
    (QWEN35, False): "qwen35",
    (TEKKEN, True): "tekken",
    (GPT4O, False): "gpt-4o",
}
NAMES = tuple(sorted({*_BY_RULE.values(), "smollm"}))


def recognize(definition: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the content of a tokenizer.json; None if it is unknown or not byte-level BPE."""
    model = definition.get("model") or {}
    if model.get("type") != "BPE" or not _plain(definition.get("normalizer")):
        return None
    steps = _steps(definition.get("pre_tokenizer"))
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    takes_words = bool(model.get("ignore_merges"))
    if not steps[-1].get("use_regex", True):
        rule = _split_rule(steps[:-1])
        return None if rule is None else _BY_RULE.get((rule, takes_words))
    if len(steps) == 1:
        return _BY_RULE.get((GPT2, takes_words))
    if len(steps) == 2 and steps[0] == {"type": "Digits", "individual_digits": True} and not takes_words:
        return "smollm"
    return None


def _plain(normalizer: dict[str, Any] | None) -> bool:
    """Return true if the normalizer is missing or NFC. llama.cpp does not normalize, but most text is NFC already."""
    if normalizer is None or normalizer.get("type") == "NFC":
        return True
    return normalizer.get("type") == "Sequence" and all(map(_plain, normalizer.get("normalizers", [])))


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [step for inner in pre_tokenizer.get("pretokenizers", []) for step in _steps(inner)]
    return [pre_tokenizer]


def _split_rule(steps: list[dict[str, Any]]) -> str | None:
    """Return the regular expression if there is one step, which splits a text into its matches."""
    if len(steps) != 1 or steps[0].get("type") != "Split":
        return None
    pattern, behavior = steps[0].get("pattern") or {}, steps[0].get("behavior")
    kept = (behavior == "Isolated" and not steps[0].get("invert")) or (
        behavior == "Removed" and bool(steps[0].get("invert"))
    )
    rule = pattern.get("Regex")
    return str(rule) if kept and rule is not None else None
