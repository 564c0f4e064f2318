"""The model of a server: an EdgeLlama that says how far it is loaded, what a request used, and who is resident."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp

from edge_speq.engine.llama import EdgeLlama
from edge_speq.errors import EdgeError
from edge_speq.runtime.cancellation import CANCELLED

Progress = Callable[[float], bool]  # takes the fraction that is loaded, says whether to go on


@dataclass(slots=True)
class Usage:
    """Tokens of one request, as llama_cpp.Llama counts them: an end-of-text token is none."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    began: bool = False  # the prompt was accepted

    def to_dict(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class ServedModel(EdgeLlama):
    """Used by one thread, its worker's; cancel(), stats() and residency() may be called from others."""

    def __init__(self, model_path: str, progress: Progress, **options: Any) -> None:
        self._loading = progress
        self.usage = Usage()
        self.is_abandoned: Callable[[], bool] = lambda: False  # whether the client of the present request has gone
        super().__init__(model_path, **options)

    def _configure(self, model_params: Any, context_params: Any) -> None:
        super()._configure(model_params, context_params)

        def progress(fraction: float, _user: object) -> bool:
            return self._loading(fraction)

        self._callback: Any = llama_cpp.llama_progress_callback(progress)  # must outlive the load
        model_params.progress_callback = self._callback

    def _forget_cancellation(self) -> None:
        super()._forget_cancellation()
        if self.is_abandoned():  # a cancellation that came too early to count has just been forgotten
            raise EdgeError(CANCELLED)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Iterator[int]:  # type: ignore[override]
        """As EdgeLlama.generate, and counts the tokens. Raises EdgeError for tokens and grammars that would end the
        process instead."""
        if any(not 0 <= token < self._n_vocab for token in tokens):
            raise EdgeError(f"a token of the prompt is not below {self._n_vocab}, the size of the vocabulary")
        stream = super().generate(tokens, *args, **kwargs)
        return self._counted(stream, len(tokens))

    def _counted(self, stream: Any, n_prompt: int) -> Iterator[int]:
        self.usage.prompt_tokens += n_prompt
        try:
            for token in stream:
                self.usage.began = True
                self.usage.completion_tokens += not llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
                yield token
        finally:
            stream.close()

    def residency_rows(self) -> list[str] | None:
        """For each block one digit an expert: 0 absent, 1 loading, 2 resident, 3 in use. None without slots."""
        hook = self._hook
        with self._cancellation.lock:  # nothing native is freed meanwhile
            if hook is None or self._cancellation.also is None:  # closed
                return None
            states = hook.states()
        return ["".join(map(str, row)) for row in states]
