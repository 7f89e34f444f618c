"""The inference endpoints: each admits a request, awaits the engine and shapes the response. Knows no models."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.responses import Response

from core.errors import CancelledError
from service.engine import Engine, Session
from service.errors import ErrorResponse
from service.jobs import Compressed
from service.limits import AnyRequest
from service.responses import (
    NO_EVIDENCE,
    answer_response,
    compress_response,
    evidence_of,
    record_response,
    rerank_response,
)
from service.schemas import (
    AnswerRequest,
    AnswerResponse,
    CompressRequest,
    CompressResponse,
    Evidence,
    RerankRequest,
    RerankResponse,
)
from service.streaming import AnswerStream, until_disconnect

T = TypeVar("T")
ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorResponse, "description": "no key"},
    403: {"model": ErrorResponse, "description": "a key that is not valid"},
    408: {"model": ErrorResponse, "description": "the body came too slowly"},
    413: {"model": ErrorResponse, "description": "over a limit, which `limit` gives"},
    415: {"model": ErrorResponse, "description": "not application/json"},
    422: {"model": ErrorResponse, "description": "a value is wrong; `field` says which"},
    429: {"model": ErrorResponse, "description": "no room now; see Retry-After"},
    500: {"model": ErrorResponse, "description": "the service failed"},
    503: {"model": ErrorResponse, "description": "not ready, or shutting down"},
    504: {"model": ErrorResponse, "description": "the deadline passed"},
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
router = APIRouter(responses=ERRORS)


def engine_of(request: Request) -> Engine:
    """The application's engine."""
    engine: Engine = request.app.state.engine
    return engine


ThisEngine = Annotated[Engine, Depends(engine_of)]


@router.post("/compress", response_model=CompressResponse)
async def compress(body: CompressRequest, request: Request, engine: ThisEngine) -> Response:
    """Compress passages for a query into memory embeddings."""
    with await _open(request, engine, body) as session:
        compressed = await _unless_disconnected(request, session.compressed)
        await session.finished()
        # Encoding and rendering megabytes of numbers would hold up every other request.
        return await asyncio.get_running_loop().run_in_executor(
            engine.pool, lambda: _json(session, compressed, compress_response(session, body, compressed))
        )


@router.post("/rerank", response_model=RerankResponse)
async def rerank(body: RerankRequest, request: Request, engine: ThisEngine) -> Response:
    """Score passages for a query, best first."""
    with await _open(request, engine, body) as session:
        compressed = await _unless_disconnected(request, session.compressed)
        await session.finished()
        return _json(session, compressed, rerank_response(session, compressed.passages, body.top_n))


@router.post("/answer", response_model=AnswerResponse, responses=STREAM)
async def answer(body: AnswerRequest, request: Request, engine: ThisEngine) -> Response:
    """Answer a query from its passages, in one piece or as a stream of events."""
    session, stays_open = await _open(request, engine, body), False
    try:
        compressed = await _unless_disconnected(request, session.compressed)
        evidence = await _evidence(session, compressed) if body.explain else NO_EVIDENCE
        if body.stream:
            stays_open = True  # the stream closes it
            return AnswerStream(session, compressed, evidence, engine.settings.keepalive_seconds)
        finished = await _unless_disconnected(request, session.finished)
        return _json(session, compressed, answer_response(session, compressed, finished, evidence))
    finally:
        if not stays_open:
            session.close()


async def _open(request: Request, engine: Engine, body: AnyRequest) -> Session:
    session = await engine.open(body)
    request.state.checkpoint = session.version.model.name  # for the log line
    return session


async def _evidence(session: Session, compressed: Compressed) -> Mapping[int, Evidence]:
    """Found in the pool: the worker writes the answer meanwhile, and the event loop stays free."""
    return await asyncio.get_running_loop().run_in_executor(session.engine.pool, evidence_of, session, compressed)


async def _unless_disconnected(request: Request, wait: Callable[[], Awaitable[T]]) -> T:
    """Await the engine, but give up, and with it the slot, as soon as the client leaves."""
    waiting = asyncio.ensure_future(wait())
    leaving = asyncio.ensure_future(until_disconnect(request.receive))
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise CancelledError("the client left")
        return waiting.result()
    finally:
        waiting.cancel()
        leaving.cancel()


def _json(session: Session, compressed: Compressed, response: BaseModel) -> Response:
    record_response(session, compressed, response)
    return Response(response.model_dump_json(), media_type="application/json")
