"""A draft without a model: it proposes the tokens that followed the same n-gram earlier in the text.

Prompt lookup decoding (Saxena 2023, llama.cpp's examples/lookup) with an index that grows with the text. A draft costs
a few dictionary look-ups for any length of text. It helps if the text repeats itself: edited code, quotations, tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LONGEST, SHORTEST = 4, 2  # tokens of an n-gram; the longest match wins

Tokens = npt.NDArray[np.intc]


class NGramDraft:
    """A LlamaDraftModel for llama_cpp.Llama's draft_model. It indexes one text at a time; a new text resets the index.

    Args:
        n_draft: most tokens to propose.
        longest, shortest: tokens of the n-grams to match.

    Raises ValueError if these are not positive or shortest exceeds longest.
    """

    def __init__(self, n_draft: int = 16, *, longest: int = LONGEST, shortest: int = SHORTEST) -> None:
        if not 1 <= shortest <= longest or n_draft < 1:
            raise ValueError("n_draft and shortest are at least 1, and shortest at most longest")
        self._n_draft, self._sizes = n_draft, range(longest, shortest - 1, -1)
        self._text: Tokens = np.zeros(0, dtype=np.intc)  # indexed, except its last token
        self._next: dict[tuple[int, ...], int] = {}  # n-gram to the position after its last occurrence

    def __call__(self, input_ids: npt.NDArray[Any], /, **_: Any) -> Tokens:
        """Return at most n_draft tokens that may follow the text; none without a match. input_ids: the text, [n]."""
        text = np.asarray(input_ids, dtype=np.intc)
        self._index(text)
        tail = tuple(text[-self._sizes[0] :].tolist())
        for size in self._sizes:
            at = self._next.get(tail[-size:]) if len(tail) >= size else None
            if at is not None:
                return text[at : at + self._n_draft]
        return text[:0]

    def _index(self, text: Tokens) -> None:
        known = len(self._text)
        if known > len(text) or not np.array_equal(self._text, text[:known]):
            self._next, known = {}, 0
        tokens = text[max(0, known - self._sizes[0]) :].tolist()
        first = len(text) - len(tokens)
        for end in range(max(known, 1), len(text)):  # the token at `end` follows the n-grams that end before it
            for size in self._sizes:
                if size <= end:
                    self._next[tuple(tokens[end - size - first : end - first])] = end
        self._text = text.copy()
