"""Check the JSON schemas of clients before llama_cpp's converter expands their repetitions.

runtime/grammar.py checks the grammar that the converter makes.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from llama_cpp.llama_grammar import json_schema_to_gbnf

from edge_speq.errors import EdgeError

MAX_REPETITIONS = 1000  # repetitions in a schema; llama.cpp refuses more than 2,000 of one kind
MAX_PATTERN = 1000  # characters of a regular expression
MAX_CHOICES = 10  # choices in a pattern: llama.cpp follows all parses of a token, up to 2^n, and cannot be cancelled
MAX_REPEATED_GROUPS = 3
COUNTS = ("minLength", "maxLength", "minItems", "maxItems")


def require_schema(schema: dict[str, Any]) -> None:
    """Refuse a schema that llama_cpp cannot turn into a grammar: its handlers would accept any JSON instead.

    Raises EdgeError.
    """
    try:
        _require_small(schema)
        json_schema_to_gbnf(json.dumps(schema))
    except EdgeError:
        raise
    except Exception as error:  # assertions and KeyErrors, mostly
        raise EdgeError(f"the JSON schema is not one that llama.cpp can follow: {error!r:.200}") from error


def _require_small(node: Any) -> None:
    if isinstance(node, list):
        for value in node:
            _require_small(value)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in COUNTS and isinstance(value, (int, float)) and not 0 <= value <= MAX_REPETITIONS:
                raise EdgeError(f"{key} of the JSON schema is not between 0 and {MAX_REPETITIONS}")
            if key == "pattern" and isinstance(value, str):
                _require_small_pattern(value)
            _require_small(value)


def _require_small_pattern(pattern: str) -> None:
    counts = [max(1, int(n[:9])) for n in re.findall(r"[{,]\s*(\d+)", pattern)]
    written_out = math.prod(counts) if "){" in pattern else sum(counts)  # repetitions of a group multiply
    if len(pattern) > MAX_PATTERN or written_out > MAX_REPETITIONS:
        raise EdgeError(
            "a pattern of the JSON schema is too large",
            f"at most {MAX_PATTERN} characters and {MAX_REPETITIONS} repetitions",
        )
    bare = re.sub(r"\\.|\[[^\]]*\]|\{\d+\}", "", pattern)
    n_choices = len(re.findall(r"[*+?{]", bare)) + (bare.count("|") if bare.count("(") > 1 else 0)
    if n_choices > MAX_CHOICES or len(re.findall(r"\)[*+?{]", bare)) > MAX_REPEATED_GROUPS:
        raise EdgeError(
            "a pattern of the JSON schema leaves too much open",
            f"at most {MAX_CHOICES} quantifiers and alternatives, {MAX_REPEATED_GROUPS} of groups",
        )
