"""Token counts of one request, as OpenAI's API reports them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llama_cpp

if TYPE_CHECKING:
    from edge_speq.engine.llama import EdgeLlama


@dataclass(slots=True)
class TokenUsage:
    """Tokens as llama_cpp.Llama counts them: without end-of-text tokens, unlike Stats.timing."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@contextlib.contextmanager
def counted(llm: EdgeLlama) -> Iterator[TokenUsage]:
    """Count the tokens that llm.generate reads and yields while the block runs."""
    usage, generate = TokenUsage(), llm.generate
    vocab = llama_cpp.llama_model_get_vocab(llm.model)

    def counting(tokens: Sequence[int], *args: Any, **kwargs: Any) -> Iterator[int]:
        usage.prompt_tokens += len(tokens)
        with contextlib.closing(generate(tokens, *args, **kwargs)) as stream:
            for token in stream:
                usage.completion_tokens += not llama_cpp.llama_vocab_is_eog(vocab, token)
                yield token

    # llama_cpp's streams do not report usage, and a chat handler may call generate several times
    llm.generate = counting  # type: ignore[method-assign,assignment]
    try:
        yield usage
    finally:
        del llm.generate  # restores the class's method
