"""`/v1/chat/completions`, `/v1/completions` and `/v1/models` as OpenAI has them. Knows no models."""

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import Response

from service.auth import API_KEY
from service.dialects.errors import OpenAIErrorResponse
from service.dialects.openai_format import ChatFormat, TextFormat
from service.dialects.openai_responses import ChatResponse, CompletionResponse, ModelCard, ModelList
from service.dialects.openai_schemas import ALIAS, ChatRequest, CompletionRequest
from service.dialects.questions import chat_question, passages_of
from service.engine import Engine, Version
from service.errors import NotReadyError, UnknownModelError
from service.schemas import AnswerRequest, PassageIn
from service.serving import REQUEST_HEADERS, ThisEngine, named_version, serve_answer

STARTED = int(time.time())
STREAM_EXAMPLE = (
    'data: {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "1043"}}]}\n\n'
)
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"example": STREAM_EXAMPLE, "schema": {"type": "string"}}}}
}
router = APIRouter(
    tags=["OpenAI dialect"],
    dependencies=[API_KEY],
    responses={
        "4XX": {"model": OpenAIErrorResponse, "description": "the request cannot be served as it stands"},
        "5XX": {"model": OpenAIErrorResponse, "description": "the service cannot serve now"},
    },
)


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=STREAM, openapi_extra=REQUEST_HEADERS)
async def chat(body: ChatRequest, request: Request, engine: ThisEngine) -> Response:
    """Answer the last user message from `documents`, or from what `tool` and `context` messages hold."""
    check_model(engine, body.model, request)
    query, passages = chat_question(body, engine.settings.earlier_messages)
    return await serve_answer(
        request, engine, answer_request(query, passages, body.options()), ChatFormat(body.usage_wanted)
    )


@router.post("/v1/completions", response_model=CompletionResponse, responses=STREAM, openapi_extra=REQUEST_HEADERS)
async def complete(body: CompletionRequest, request: Request, engine: ThisEngine) -> Response:
    """Answer `prompt`, a question, from `documents`. The prompt is not continued: it is put into the template."""
    check_model(engine, body.model, request)
    native = answer_request(body.query, passages_of(body.documents), body.options())
    return await serve_answer(request, engine, native, TextFormat(body.usage_wanted))


@router.get("/v1/models")
async def list_models(engine: ThisEngine) -> ModelList:
    """The checkpoint that serves, by its version, its folder, the alias that is always good, and the set names."""
    return ModelList(data=[model_card(engine, name) for name in model_names(engine)])


@router.get("/v1/models/{model:path}")  # names may hold slashes
async def get_model(model: str, engine: ThisEngine) -> ModelCard:
    """One of them."""
    check_model(engine, model)
    return model_card(engine, model)


def model_card(engine: Engine, name: str) -> ModelCard:
    """The active version under one of its names."""
    assert engine.active is not None  # whoever has a name of it has found it there
    return ModelCard(id=name, created=STARTED, dtype=engine.active.model.number_format)


def model_names(engine: Engine, version: Version | None = None) -> list[str]:
    """What `model` may name now, of `version` or else of the active one. Raises NotReadyError."""
    version = version or engine.active
    if version is None:
        raise NotReadyError("the model is still being loaded")
    name = version.model.name
    return list(dict.fromkeys((name, name.partition("@")[0], ALIAS, *engine.settings.served_model_names)))


def check_model(engine: Engine, name: str, request: Request | None = None) -> None:
    """Refuse what does not serve `request`: whoever asks for another model must not get this one in silence."""
    names = model_names(engine, None if request is None else named_version(request, engine))
    if name not in names:
        message = f"is not served here; use one of {', '.join(names)}, or have it added to served_model_names"
        raise UnknownModelError("model", message)


def answer_request(query: str, passages: list[PassageIn], options: dict[str, Any]) -> AnswerRequest:
    """The service's own request, with its own checks. Raises RequestValidationError."""
    given = [passage.model_dump(exclude_none=True) for passage in passages]
    native = {"query": query, "passages": given, **options}
    try:
        return AnswerRequest.model_validate(native)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems, body=native) from None
