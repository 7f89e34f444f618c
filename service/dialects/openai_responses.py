"""Responses of OpenAI's chat and completions, and the service's own part of them. Knows no HTTP."""

from typing import Literal

from pydantic import BaseModel

from service.policy_schemas import PlanOut
from service.response_schemas import Answerable, AnsweredPassage


class CompletionUsage(BaseModel):
    """Generator tokens. `text_tokens`: of the prompt had all been text; `tokens_saved`: that less the prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    text_tokens: int
    tokens_saved: int


class Passages(BaseModel):
    """The service's own part of a response, as /answer has it: what became of each document, and why."""

    passages: list[AnsweredPassage]
    answerable: Answerable | None
    plan: PlanOut


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatResponse(BaseModel):
    """A chat completion. `model` and `system_fingerprint` name the checkpoint that served."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    system_fingerprint: str
    scaledown: Passages


class TextChoice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class CompletionResponse(BaseModel):
    """A text completion."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage
    system_fingerprint: str
    scaledown: Passages


class ModelCard(BaseModel):
    """A checkpoint version. `created`: when this service began; `dtype`: what it computes in."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["scaledown"] = "scaledown"
    dtype: str


class ModelList(BaseModel):
    """What `model` may name."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
