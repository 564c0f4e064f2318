"""Fields of requests, and their conversion to arguments of llama_cpp.Llama's methods.

A missing field keeps llama_cpp's default. Unknown fields are ignored, as OpenAI's clients expect. Known fields that are
not supported and would change the answer are refused.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_STOPS = 32
MAX_SEED = 2**32 - 1
UNLIMITED = -1
NO_PARAMETERS = {"type": "object", "properties": {}}

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]  # becomes part of prompts and grammars
Text = Annotated[str, Field(max_length=1000)]
Texts = Annotated[list[str], Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _no_empty_answer(limit: int) -> int:
    if limit == 0:
        raise ValueError("must be at least 1, or -1 for as many as fit")
    return limit


def _stops(given: str | list[str]) -> list[str]:
    stops = [stop for stop in ([given] if isinstance(given, str) else given) if stop]
    if len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop texts")
    return stops


def _one_prompt(given: Any) -> Any:
    if isinstance(given, list) and isinstance(given[0], str):
        if len(given) != 1:
            raise ValueError("one prompt a request: send a request for each")
        return given[0]
    return given


class _Strict(BaseModel):  # type: ignore[misc]  # pydantic is not seen by mypy
    model_config = ConfigDict(allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False


class _Request(_Strict):
    """The fields of both kinds of requests."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=UNLIMITED, le=2**31 - 1), AfterValidator(_no_empty_answer)] | None = None
    temperature: float | None = Field(None, ge=0.0, le=10.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    typical_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    repeat_penalty: float | None = Field(None, gt=0.0, le=10.0)
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    mirostat_mode: int | None = Field(None, ge=0, le=2)
    mirostat_tau: float | None = Field(None, ge=0.0, le=100.0)
    mirostat_eta: float | None = Field(None, ge=0.0, le=1.0)
    seed: int | None = Field(None, ge=-1, le=MAX_SEED)
    stop: Annotated[Text | list[Text], AfterValidator(_stops)] | None = None
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    n: int | None = Field(None, ge=1, le=1)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _arguments(self, *left_out: str) -> dict[str, Any]:
        """Return the given fields, with a random seed by default: llama_cpp.Llama would always use the same one."""
        given: dict[str, Any] = self.model_dump(exclude_none=True, exclude={"model", "stream_options", "n", *left_out})
        if given.get("seed", -1) < 0:
            given["seed"] = random.randrange(MAX_SEED)
        return given


class CompletionRequest(_Request):
    prompt: Annotated[str | Tokens | Texts, AfterValidator(_one_prompt)]
    suffix: str | None = None
    echo: bool = False
    logprobs: None = None  # not supported: needs the logits of every token of the context
    best_of: int | None = Field(None, ge=1, le=1)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of llama_cpp.Llama.create_completion."""
        return self._arguments("best_of", "logprobs")


class ContentPart(_Strict):
    type: Literal["text"]  # image models are not supported
    text: str


class CalledFunction(_Strict):
    name: Name
    arguments: str


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message for chat templates of text models, with one text as its content, possibly empty."""
        parts = self.content if isinstance(self.content, list) else []
        message: dict[str, Any] = self.model_dump(exclude_none=True)
        message["content"] = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        message["role"] = "system" if self.role == "developer" else self.role
        return message


class Function(_Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: dict(NO_PARAMETERS))


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class Named(_Strict):
    name: Name


class NamedTool(_Strict):
    type: Literal["function"]
    function: Named


class JsonSchema(_Strict):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # llama_cpp's form
    json_schema: JsonSchema | None = None

    def model_post_init(self, _context: Any, /) -> None:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")

    def plain(self) -> dict[str, Any]:
        schema = self.json_schema.schema_ if self.type == "json_schema" and self.json_schema else self.schema_
        return {"type": "json_object"} | ({"schema": schema} if schema is not None else {})


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    functions: list[Function] | None = None
    function_call: Literal["none", "auto"] | Named | None = None
    response_format: ResponseFormat | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None

    def model_post_init(self, _context: Any, /) -> None:
        names = [tool.function.name for tool in self.tools or []]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice names a function that is not among the tools")
        if self.tool_choice == "required":
            if len(names) != 1:
                raise ValueError('tool_choice "required" needs exactly one tool: name the one to call')
            self.tool_choice = NamedTool(type="function", function=Named(name=names[0]))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of llama_cpp.Llama.create_chat_completion."""
        given = self._arguments("messages", "response_format", "max_completion_tokens", "logprobs", "top_logprobs")
        given["messages"] = [message.plain() for message in self.messages]
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        if self.response_format is not None and self.response_format.type != "text":
            given["response_format"] = self.response_format.plain()
        return given

    def schemas(self) -> list[dict[str, Any]]:
        """Return the JSON schemas that an answer may have to follow."""
        found = [tool.function.parameters for tool in self.tools or []]
        found += [function.parameters for function in self.functions or []]
        if self.response_format is not None and "schema" in (plain := self.response_format.plain()):
            found.append(plain["schema"])
        return found
