"""One request through the engine, whatever shape it came in and is answered in. Knows no endpoints and no models."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel
from starlette.responses import Response

from service.engine import CHECKPOINT_HEADER, Engine, Version
from service.errors import ClientLeftError
from service.jobs import Compressed
from service.limits import AnyRequest
from service.response_schemas import Evidence
from service.responses import NO_EVIDENCE, answer_response, evidence_of
from service.schemas import AnswerRequest, RerankRequest
from service.session import Session
from service.streaming import AnswerFormat, AnswerStream, until_disconnect

T = TypeVar("T")


async def engine_of(request: Request) -> Engine:
    """The application's engine. Async, though it waits for nothing: FastAPI sends what is not through a thread."""
    engine: Engine = request.app.state.engine
    return engine


ThisEngine = Annotated[Engine, Depends(engine_of)]


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}


# `openapi_extra` of the routes that take them, and no parameters: `named_version` and the middleware read them, and a
# parameter FastAPI would read at each request too.
REQUEST_HEADERS = {
    "parameters": [
        _header(CHECKPOINT_HEADER, "a version in memory that is to serve; unset: the active one"),
        _header("X-Request-Id", "the caller's name for this request, given back; unset: one is made"),
    ]
}


def named_version(request: Request, engine: Engine) -> Version | None:
    """The version that `X-Checkpoint` names, None where the active one is meant. Raises UnknownModelError."""
    named = request.headers.get(CHECKPOINT_HEADER)
    return engine.find(named) if named else None


async def open_session(request: Request, engine: Engine, body: AnyRequest) -> Session:
    """Admit a request, on the version it names or else the active one. The caller must close the session."""
    session = await engine.open(body, named_version(request, engine))
    request.state.session = session  # for the log line and the trace
    return session


async def serve_ranking(
    request: Request, engine: Engine, body: RerankRequest, written: Callable[[Session, Compressed], BaseModel]
) -> Response:
    """Score passages; `written` shapes the response."""
    with await open_session(request, engine, body) as session:
        compressed = await unless_disconnected(request, session.compressed)
        await session.finished()
        return json_response(written(session, compressed))


async def serve_answer(request: Request, engine: Engine, body: AnswerRequest, form: AnswerFormat) -> Response:
    """Answer in one piece or as a stream, as `body.stream` says; `form` shapes either."""
    session, stays_open = await open_session(request, engine, body), False
    try:
        compressed = await unless_disconnected(request, session.compressed)
        evidence = await _evidence(session, compressed) if body.explain else NO_EVIDENCE
        if body.stream:
            stays_open = True  # the stream closes it
            return AnswerStream(session, compressed, evidence, form)
        finished = await unless_disconnected(request, session.finished)
        response = answer_response(session, compressed, finished, evidence)
        return Response(form.whole(response), media_type="application/json")
    finally:
        if not stays_open:
            session.close()


async def unless_disconnected(request: Request, wait: Callable[[], Awaitable[T]]) -> T:
    """Await the engine, but give up, and with it the slot, as soon as the client leaves."""
    waiting = asyncio.ensure_future(wait())
    leaving = asyncio.ensure_future(until_disconnect(request.receive))
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientLeftError("the client left")
        return waiting.result()
    finally:
        waiting.cancel()
        leaving.cancel()


def json_response(response: BaseModel) -> Response:
    """Write a response."""
    return Response(response.model_dump_json(), media_type="application/json")


async def _evidence(session: Session, compressed: Compressed) -> Mapping[int, Evidence]:
    """Found in the pool: the worker writes the answer meanwhile, and the event loop stays free."""
    return await asyncio.get_running_loop().run_in_executor(session.engine.pool, evidence_of, session, compressed)
