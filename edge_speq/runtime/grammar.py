"""Check a grammar before llama.cpp uses it, since an invalid one can crash the process.

llama_sampler_init_grammar returns null for a grammar that it cannot parse. llama_cpp.Llama adds that null to its
sampler chain, which ends in a segmentation fault. llama.cpp's parser and matcher also recurse for each level of
brackets, so deep nesting overflows the stack.
"""

from __future__ import annotations

import llama_cpp

from edge_speq.errors import EdgeError

MAX_BYTES = 256 << 10
MAX_NESTING = 2000  # levels of brackets: a quarter of what overflows a stack of 8 MiB


def require_grammar(grammar: str, vocab: int) -> None:
    """Raise EdgeError if a grammar is too large or llama.cpp cannot parse it. vocab: a llama_vocab pointer."""
    if len(grammar) > MAX_BYTES or _nesting(grammar) > MAX_NESTING:
        raise EdgeError("the grammar is too large", f"at most {MAX_BYTES >> 10} KiB and {MAX_NESTING} levels")
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
    if not sampler:
        raise EdgeError("llama.cpp refuses the grammar", "names and values with quotes or backslashes are one cause")
    llama_cpp.llama_sampler_free(sampler)


def _nesting(grammar: str) -> int:
    """Return an upper bound of the nesting depth: the most opening brackets of a line, since a rule takes one line."""
    return max(line.count("(") for line in grammar.split("\n"))
