"""Names llama.cpp's pre-tokenizers by what a tokenizer's definition says.

llama.cpp's converter knows them by a hash of what a tokenizer makes of one text, which depends on the vocabulary: a new
vocabulary with an old rule is unknown to it. The rules themselves are few. Those below are the regular expressions of
src/llama-vocab.cpp of the pinned llama.cpp in the form that tokenizer.json files give them.
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

# (rule, whether whole words that are tokens are taken as they are) -> llama.cpp's name
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
    """llama.cpp's name of the rule of a tokenizer.json's content; None where it is none of those known here, or not
    byte-level BPE."""
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
    """llama.cpp does not normalize for BPE; composed text, which NFC makes, is what people write anyway."""
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
    """The regular expression of the one step that splits a text into its matches."""
    if len(steps) != 1 or steps[0].get("type") != "Split":
        return None
    pattern, behavior = steps[0].get("pattern") or {}, steps[0].get("behavior")
    kept = (behavior == "Isolated" and not steps[0].get("invert")) or (
        behavior == "Removed" and bool(steps[0].get("invert"))
    )
    rule = pattern.get("Regex")
    return str(rule) if kept and rule is not None else None
