"""Errors in the shape that each dialect's clients know, so that they raise their own exceptions. Knows no engine.

A middleware, because keys and bodies are refused before any route runs: it rewrites what would leave in the service's
own shape. Where a dialect has one status for what are two here (OpenAI: 400 for 413 and 422), its status is taken.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import error_response
from service.unknown_fields import UNKNOWN

Detail = Mapping[str, Any]


class OpenAIErrorDetail(BaseModel):
    """What went wrong; `param` is the part of the request that is at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorResponse(BaseModel):
    """OpenAI's error, and vLLM's."""

    error: OpenAIErrorDetail


class JinaErrorResponse(OpenAIErrorResponse):
    """vLLM's error with Jina's `detail`: each client finds its own."""

    detail: str


class CohereErrorResponse(BaseModel):
    """Cohere's error."""

    message: str


class TeiErrorResponse(BaseModel):
    """TEI's error."""

    error: str
    error_type: str


@dataclass(frozen=True)
class Dialect:
    """How errors are said: `write` makes the body, `statuses` and `fields` translate what differs."""

    write: Callable[[int, Detail], dict[str, Any]]
    statuses: Mapping[int, int] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)


def openai_error(status: int, detail: Detail) -> dict[str, Any]:
    """OpenAI's body of an error."""
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    error = {"message": detail["message"], "type": kind, "param": detail["field"], "code": detail["code"]}
    return {"error": error}


def _jina_error(status: int, detail: Detail) -> dict[str, Any]:
    return {"detail": detail["message"], **openai_error(status, detail)}


def _cohere_error(_: int, detail: Detail) -> dict[str, Any]:
    return {"message": detail["message"]}


def _tei_error(status: int, detail: Detail) -> dict[str, Any]:
    kind = {422: "Validation", 429: "Overloaded", 503: "Unhealthy"}.get(status, "Backend")
    return {"error": detail["message"], "error_type": kind}


BAD_REQUEST = {413: 400, 422: 400, 403: 401}
ANSWERED = {"passages": "documents", "max_new_tokens": "max_tokens"}
DIALECTS = {
    "chat": Dialect(openai_error, BAD_REQUEST, {**ANSWERED, "query": "messages"}),
    "completions": Dialect(openai_error, BAD_REQUEST, {**ANSWERED, "query": "prompt"}),
    "jina": Dialect(_jina_error, BAD_REQUEST, {"passages": "documents"}),
    "cohere": Dialect(_cohere_error, BAD_REQUEST, {"passages": "documents"}),
    "tei": Dialect(_tei_error, {413: 422, 500: 424}, {"passages": "texts"}),
}
PATHS = {"/v1/rerank": "jina", "/v2/rerank": "cohere", "/v1/completions": "completions"}


class DialectErrors:
    """Rewrites error responses of the dialects' paths, and of requests whose state names a `dialect`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        rewriter = _Rewriter(scope, receive, send)
        try:
            await self.app(scope, receive, rewriter.send)
        except Exception as error:
            if not rewriter.started:
                await error_response(error)(scope, receive, rewriter.send)
            raise  # to be logged


class _Rewriter:
    """Holds an error response back until it is complete, then sends it as the dialect has it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.started = False
        self._scope = scope
        self._receive = receive
        self._send = send
        self._dialect: Dialect | None = None
        self._head: Message = {}
        self._body = b""

    async def send(self, message: Message) -> None:
        """Pass on one message of the response, or keep it."""
        if message["type"] == "http.response.start":
            self.started = True
            self._dialect = _dialect_of(self._scope) if message["status"] >= 400 else None
            self._head = message
        if self._dialect is None:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._rewritten(self._dialect)(self._scope, self._receive, self._send)

    def _rewritten(self, dialect: Dialect) -> JSONResponse:
        status = dialect.statuses.get(self._head["status"], self._head["status"])
        detail = _renamed(json.loads(self._body)["error"], dialect.fields)
        response = JSONResponse(dialect.write(status, detail), status)
        ours = Headers(raw=self._head["headers"])
        response.headers.update({k: v for k, v in ours.items() if k not in ("content-length", "content-type")})
        return response


def _dialect_of(scope: Scope) -> Dialect | None:
    path = get_route_path(scope)
    name = PATHS.get(path) or ("chat" if path.startswith("/v1/") else scope.get("state", {}).get("dialect"))
    return DIALECTS[name] if name else None


def _renamed(detail: Detail, fields: Mapping[str, str]) -> Detail:
    """`detail` with its field by the dialect's name, in the message too; an unknown one stays as the caller sent it."""
    old = detail["field"]
    if old is None or old.partition(".")[0] not in fields or detail["message"].startswith(f"{old}: {UNKNOWN}"):
        return detail
    head, dot, rest = old.partition(".")
    new = fields[head] + dot + rest
    return {**detail, "field": new, "message": new + detail["message"].removeprefix(old)}
