"""Messages of a chat, kept within the model's context."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from edge_speq.errors import EdgeError

if TYPE_CHECKING:
    from edge_speq.engine.llama import EdgeLlama

Message = dict[str, str]  # role and content
Pieces = Generator[str, None, None]  # parts of a reply


class Conversation:
    """The turns of a chat. `ask` forgets the oldest turns if they and the reply do not fit in the context.

    The space for the reply is n_predict tokens, but at most a quarter of the context.
    """

    def __init__(self, llm: EdgeLlama, system: str | None, n_predict: int, temperature: float, seed: int | None):
        self.system = system
        self.turns: list[tuple[str, str]] = []  # message and reply
        self.finish_reason = ""  # for the last reply: "stop", "length" or "interrupted"
        self.n_forgotten = 0  # turns forgotten since the conversation began
        self._llm = llm
        self._n_predict = n_predict
        self._temperature = temperature
        self._seed = seed
        self._attempt = 0  # another reply to the same message takes another seed

    def ask(self, text: str) -> Pieces:
        """Yield the pieces of the reply to a message, and store both as a turn.

        If the generator is closed early, the turn has the text so far; without any text no turn is stored. Raises
        EdgeError if the message does not fit in the context or the chat template refuses it.
        """
        said: list[str] = []
        self.finish_reason = "interrupted"
        try:
            for chunk in self._complete(self._fit(text)):
                choice = chunk["choices"][0]
                piece = choice["delta"].get("content") or ""
                self.finish_reason = choice["finish_reason"] or self.finish_reason
                if piece:
                    said.append(piece)
                    yield piece
        finally:
            if said or self.finish_reason != "interrupted":
                self.turns.append((text, "".join(said)))
                self._attempt = 0

    def ask_again(self) -> Pieces:
        """Yield another reply to the last message. Raises EdgeError if there was no message."""
        if not self.turns:
            raise EdgeError("there is no reply to write again", "say something first")
        text, said = self.turns.pop()
        attempt = self._attempt = self._attempt + 1
        n_turns = len(self.turns)
        try:
            yield from self.ask(text)
        finally:
            self._attempt = attempt
            if len(self.turns) == n_turns:  # interrupted before its first piece
                self.turns.append((text, said))

    def clear(self) -> None:
        self.turns, self.n_forgotten, self._attempt = [], 0, 0

    def _messages(self, text: str) -> list[Message]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for user, assistant in self.turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return [*messages, {"role": "user", "content": text}]

    def _fit(self, text: str) -> list[Message]:
        n_ctx = self._llm.n_ctx()
        quarter = n_ctx // 4
        limit = n_ctx - (min(self._n_predict, quarter) if self._n_predict > 0 else quarter)
        while (n_prompt := self._count(self._messages(text))) > limit and self.turns:
            del self.turns[0]
            self.n_forgotten += 1
        if n_prompt >= n_ctx:
            raise EdgeError(
                f"the message makes a prompt of {n_prompt} tokens, the context holds {n_ctx}",
                "shorten it, or ask for a larger context with -c",
            )
        return self._messages(text)

    def _count(self, messages: list[Message]) -> int:
        """Return the number of prompt tokens that the model's chat format makes of the messages."""
        stand_in = _Tokenizer(self._llm)
        try:
            type(self._llm).create_chat_completion(stand_in, messages, stream=True)
        except (ValueError, TemplateError) as error:
            raise EdgeError(
                f"the model's chat template refuses the conversation: {error}",
                "some templates take no system message" if self.system else "try another model",
            ) from error
        return stand_in.n_prompt

    def _complete(self, messages: list[Message]) -> Iterator[Any]:
        seed = random.randrange(2**31) if self._seed is None else self._seed + self._attempt
        chunks: Iterator[Any] = self._llm.create_chat_completion(
            messages, stream=True, seed=seed, temperature=self._temperature, max_tokens=self._n_predict
        )
        return chunks


class _Tokenizer:
    """A stand-in for the model that takes the prompt of the chat handler without completing it."""

    def __init__(self, llm: EdgeLlama) -> None:
        self._llm = llm
        self.n_prompt = 0

    def create_completion(self, prompt: list[int], **_: object) -> Iterator[Any]:
        self.n_prompt = len(prompt)
        return iter(())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)
