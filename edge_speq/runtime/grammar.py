"""A grammar checked before llama.cpp sees it.

llama_sampler_init_grammar returns null for a grammar that it cannot parse, and llama_cpp.Llama puts that null into its
chain of samplers, where the process ends with a segmentation fault. Its parser and its matcher call themselves for each
level of brackets, so deep ones end the process too.
"""

from __future__ import annotations

import llama_cpp

from edge_speq.errors import EdgeError

MAX_BYTES = 256 << 10
MAX_NESTING = 2000  # brackets: a quarter of what a stack of 8 MiB bears


def require_grammar(grammar: str, vocab: int) -> None:
    """Raises EdgeError for a grammar that llama.cpp refuses, or could not bear."""
    if len(grammar) > MAX_BYTES or _nesting(grammar) > MAX_NESTING:
        raise EdgeError("the grammar is too large", f"at most {MAX_BYTES >> 10} KiB and {MAX_NESTING} levels")
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
    if not sampler:
        raise EdgeError("llama.cpp refuses the grammar", "names and values with quotes or backslashes are one cause")
    llama_cpp.llama_sampler_free(sampler)


def _nesting(grammar: str) -> int:
    """At least how deep the brackets of a rule are: llama_cpp's converter writes a rule a line."""
    return max(line.count("(") for line in grammar.split("\n"))
