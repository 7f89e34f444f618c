"""Requests of OpenAI's chat and completions, with retrieved documents. Knows no HTTP.

What would change the answer and is not supported is refused by its type (`n: 2`, `logprobs: true`); what would not
(`user`, `reasoning_effort`) is accepted, and so are `tools`, which agents send always and a model may leave uncalled;
a call that is required is refused. What nobody knows is refused: a misspelt option must not pass in silence.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.policy import RequestMode
from service.policy_schemas import Hops, HybridTop, MaxPromptTokens, MinRelevance
from service.schemas import (
    BY_KIND,
    IS_OTHER,
    IS_TEXT,
    QUERY,
    TEXT,
    Explain,
    FilledText,
    Finite,
    Identifier,
    Rate,
    Strict,
    Text,
    Timeout,
)
from service.settings import EarlierMessages

IGNORED: Any = Field(default=None, description="accepted, and without effect here")
ALIAS = "scaledown"
SAMPLING = ("temperature", "top_p", "top_k", "seed", "stream", "timeout")
SHOWING = ("mode", "rate", "hybrid_top", "max_prompt_tokens", "min_relevance", "hops", "explain")
Zero = Annotated[float, Field(ge=0, le=0)]


class OwnKeys(BaseModel):
    """An object that also holds keys of the caller's own, which are passed over."""

    model_config = ConfigDict(strict=True, frozen=True)


class Document(OwnKeys):
    """A retrieved document: `text` and `title`, or Cohere's `data` with either; other keys are the caller's own."""

    id: Identifier | int | None = None
    title: Text = ""
    text: FilledText

    @model_validator(mode="before")
    @classmethod
    def _unpack(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        data = value.get("data", value)
        data = data if isinstance(data, dict) else {"text": data}
        # Cohere's own examples call it a snippet.
        return {"id": value.get("id"), "title": data.get("title") or "", **_first(data, "text", "snippet")}


def _first(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return next(({"text": data[name]} for name in names if name in data), {})


Stop = Annotated[Text, Field(min_length=1, max_length=256)]


Stops = Annotated[
    Annotated[Stop, IS_TEXT] | Annotated[list[Stop], Field(fail_fast=True), IS_OTHER],
    BY_KIND,
]
Prompt = Annotated[
    Annotated[FilledText, IS_TEXT] | Annotated[list[FilledText], Field(min_length=1, max_length=1), IS_OTHER],
    BY_KIND,
]


Documents = Annotated[
    list[Annotated[Annotated[FilledText, IS_TEXT] | Annotated[Document, IS_OTHER], BY_KIND]],
    Field(fail_fast=True, description="retrieved documents: texts, or objects with `text` and optionally `title`"),
]


class TextPart(OwnKeys):
    """A part of a message's content. Only text can be read."""

    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, IS_TEXT] | Annotated[list[TextPart], Field(fail_fast=True), IS_OTHER],
    BY_KIND,
]


class ChatMessage(OwnKeys):
    """A message. The last `user` message is the question; `tool` messages after it, and `context`, are documents."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function", "context"]
    content: Content | None = None
    tool_calls: Any = None

    @property
    def texts(self) -> list[str]:
        """Its parts that hold text."""
        parts = [self.content or ""] if not isinstance(self.content, list) else [part.text for part in self.content]
        return [part for part in parts if part.strip()]


class TextFormat(Strict):
    """The only format of an answer."""

    type: Literal["text"]


class StreamOptions(OwnKeys):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None


class Generation(Strict):
    """What chat and completions have in common, and the service's own options. Unset: the service's defaults."""

    model: Annotated[str, Field(max_length=512)] = Field(
        examples=[ALIAS], description=f"a name that /v1/models lists; `{ALIAS}` is always one"
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100), Finite] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    mode: RequestMode | None = Field(default=None, description="how documents reach the generator, as in /answer")
    rate: Rate | None = None
    hybrid_top: HybridTop | None = None
    max_prompt_tokens: MaxPromptTokens | None = None
    min_relevance: MinRelevance | None = None
    hops: Hops | None = None
    explain: Explain | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    timeout: Timeout | None = None

    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: Any = IGNORED

    def options(self) -> dict[str, Any]:
        """What was given of the service's own options, by its own names."""
        given = {name: value for name in SAMPLING + SHOWING if (value := getattr(self, name)) is not None}
        if self.seed is not None:
            given["seed"] = self.seed % 2**63  # the service's own seeds are not negative
        if self.max_tokens is not None:
            given["max_new_tokens"] = self.max_tokens
        if self.stop is not None:
            given["stop"] = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        return given

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Generation):
    """OpenAI's chat request, with `documents` as vLLM and Cohere take them."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] = Field(
        examples=[[{"role": "user", "content": QUERY}]]
    )
    documents: Documents | None = Field(default=None, examples=[[TEXT, {"title": "Butter", "text": "Melts at 32 °C."}]])
    earlier_messages: EarlierMessages | None = Field(
        default=None,
        description="system messages and earlier turns, which no checkpoint is trained on: refuse the request, leave "
        "them out, or put them before the question as text; unset: as the service is set, refuse if nothing is said",
    )
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    tools: Any = Field(default=None, description="accepted; the model never calls one, and requiring a call is refused")
    tool_choice: Literal["none", "auto"] | None = None
    functions: Any = Field(default=None, description="older name of tools")
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = IGNORED
    metadata: Any = IGNORED
    store: Any = IGNORED
    service_tier: Any = IGNORED
    prompt_cache_key: Any = IGNORED
    prompt_cache_options: Any = IGNORED
    prompt_cache_retention: Any = IGNORED
    prediction: Any = IGNORED
    reasoning_effort: Any = IGNORED
    verbosity: Any = IGNORED
    safety_identifier: Any = IGNORED

    def options(self) -> dict[str, Any]:
        """As in `Generation`, and the newer name of `max_tokens`."""
        newer = self.max_completion_tokens
        return super().options() | ({} if newer is None else {"max_new_tokens": newer})


class CompletionRequest(Generation):
    """OpenAI's older completions request: `prompt` is the question."""

    prompt: Prompt = Field(examples=[QUERY])
    documents: Annotated[Documents, Field(min_length=1)] = Field(examples=[[TEXT]])

    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None

    @property
    def query(self) -> str:
        """The question."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]
