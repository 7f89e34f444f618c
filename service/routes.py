"""The native inference endpoints. Knows no models."""

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service.auth import API_KEY
from service.dialects.bare_rerank import RerankBody, as_native, choose_dialect
from service.dialects.errors import JinaErrorResponse, TeiErrorResponse
from service.dialects.rerank_schemas import JinaResponse
from service.dialects.tei import TeiResponse
from service.errors import WITH_BODY, ErrorResponse, documented
from service.response_schemas import AnswerResponse, CompressResponse, RerankResponse
from service.responses import compress_response
from service.schemas import AnswerRequest, CompressRequest
from service.serving import (
    REQUEST_HEADERS,
    ThisEngine,
    json_response,
    open_session,
    serve_answer,
    serve_ranking,
    unless_disconnected,
)
from service.streaming import Events

NATIVE_ERRORS = (*WITH_BODY, 404, 504)
RERANK_ERRORS: dict[int | str, dict[str, Any]] = {
    **{
        status: {**response, "model": ErrorResponse | TeiErrorResponse | JinaErrorResponse}
        for status, response in documented(*NATIVE_ERRORS).items()
    },
    400: {"model": JinaErrorResponse, "description": "a value is wrong or over a limit, as Jina and vLLM say it"},
    424: {"model": TeiErrorResponse, "description": "the service failed, as TEI says it"},
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "model": AnswerResponse,
        "content": {
            "text/event-stream": {
                "example": 'event: token\ndata: {"text": " magnetism"}\n\n',
                "schema": {"type": "string", "description": "events: passages, token..., then done or error"},
            }
        },
    }
}
router = APIRouter(responses=documented(*NATIVE_ERRORS), dependencies=[API_KEY])


@router.post("/compress", response_model=CompressResponse, openapi_extra=REQUEST_HEADERS)
async def compress(body: CompressRequest, request: Request, engine: ThisEngine) -> Response:
    """Compress passages for a query into memory embeddings."""
    with await open_session(request, engine, body) as session:
        compressed = await unless_disconnected(request, session.compressed)
        await session.finished()
        # Encoding and rendering megabytes of numbers would hold up every other request.
        return await asyncio.get_running_loop().run_in_executor(
            engine.pool, lambda: json_response(compress_response(session, body, compressed))
        )


@router.post(
    "/rerank",
    response_model=RerankResponse | TeiResponse | JinaResponse,
    responses=RERANK_ERRORS,
    dependencies=[Depends(choose_dialect)],
    openapi_extra=REQUEST_HEADERS,
)
async def rerank(body: RerankBody, request: Request, engine: ThisEngine) -> Response:
    """Score passages for a query, best first. With `texts` in their place: as TEI does; with `documents`: as Jina."""
    native, written = as_native(body)
    return await serve_ranking(request, engine, native, written)


@router.post("/answer", response_model=AnswerResponse, responses=STREAM, openapi_extra=REQUEST_HEADERS)
async def answer(body: AnswerRequest, request: Request, engine: ThisEngine) -> Response:
    """Answer a query from its passages, in one piece or as a stream of events."""
    return await serve_answer(request, engine, body, Events())
