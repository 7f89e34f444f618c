"""What happens to every HTTP request before and after its route, as pure ASGI. Knows no routes' meaning.

Outermost first: request id, headers, log line and metrics; HEAD; keys; the body, read under limits before any route.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio
from starlette._utils import get_route_path  # the path as routes see it; a key is checked for no other
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import OverloadedError, TooLargeError
from service.auth import KeyRing
from service.errors import (
    CLIENT_LEFT,
    ClientLeftError,
    UnsupportedError,
    code_of,
    error_response,
    note_error,
    plain_response,
)
from service.limits import MAX_JSON_NUMBERS
from service.logs import set_request_id, set_trace_id
from service.metrics import Metrics
from service.settings import Settings
from service.tracing import Tracing

if TYPE_CHECKING:
    from service.session import Session

log = logging.getLogger(__name__)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
MAX_JSON_PARTS = 100_000  # no request needs as many, and a body of millions would hold up every other request
QUIET = frozenset({"/livez", "/readyz", "/health", "/metrics"})
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class RequestContext:
    """Names each request, adds the security headers, writes log line, metrics and trace, and hides what failed."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str], tracing: Tracing | None = None) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = paths
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        offered = Headers(scope=scope).get("x-request-id", "")
        request_id = offered if REQUEST_ID.fullmatch(offered) else secrets.token_hex(16)
        set_request_id(request_id)
        began, status = time.perf_counter(), 0
        path = get_route_path(scope)
        route = path if path in self.paths else "other"  # a caller's path is no metric's label
        state = scope.setdefault("state", {})  # shared by all copies of the scope
        span = self.tracing.begin(scope) if self.tracing is not None and route not in QUIET else None
        if span is not None:
            set_trace_id(span.trace_id)

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except Exception as error:
            log.exception("a request failed")
            note_error(scope, code_of(error))
            if not status:
                await error_response(error)(scope, receive, send_named)
        finally:
            session, code = state.get("session"), state.get("error_code")
            status = self._count_error(code, status)
            self._note(route, status, time.perf_counter() - began, state)
            if span is not None:
                span.end(scope["method"], route, status, request_id, session)

    def _count_error(self, code: str | None, status: int) -> int:
        """Count the error that a request ended in, if any; returns the status that log and metrics are to show."""
        if code is not None:
            self.metrics.errors.labels(code).inc()
        return CLIENT_LEFT if code == ClientLeftError.code else status  # a stream that was left began with 200

    def _note(self, route: str, status: int, seconds: float, state: Mapping[str, Any]) -> None:
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        extra: dict[str, Any] = {"route": route, "status": status, "ms": round(1000 * seconds, 1)}
        if "error_code" in state:
            extra |= {"error": state["error_code"], **state["error_over"]}
        if "session" in state:
            session: Session = state["session"]
            extra["checkpoint"] = session.version.model.name
        log.log(logging.DEBUG if route in QUIET else logging.INFO, "request", extra=extra)


class Authentication:
    """Lets a request through to its route only with the key that its path needs. Runs before the body is read."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            refusal = self.keys.refuse(get_route_path(scope), Headers(scope=scope))
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


class HeadAsGet:
    """Answers HEAD wherever GET is answered, with the status and headers of GET and no body: probes ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # A copy: the server and the log go on to see HEAD.
        await self.app({**scope, "method": "GET"}, receive, send_head)


class BodyLimit:
    """Reads the whole body before the route runs: no more of it than allowed, in the time allowed.

    Bodies in memory are counted together as they arrive, and one that passes the total is refused.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self.buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        reader = _BodyReader(self, Headers(scope=scope), receive)
        try:
            try:
                with anyio.fail_after(self.settings.body_seconds):
                    body = await reader.read()
            except TimeoutError:
                message = f"the body did not arrive within {self.settings.body_seconds:g} seconds"
                response = plain_response(408, message, {"Connection": "close"})
                await response(scope, receive, send)
                return
            except (TooLargeError, OverloadedError, UnsupportedError, ClientLeftError) as error:
                response = error_response(error, self.settings.overload_status)
                response.headers["Connection"] = "close"
                await response(scope, receive, send)
                return
            await self.app(scope, _replay(body, receive), send)
        finally:
            self.buffered -= reader.reserved


class _BodyReader:
    """Reads one body. `reserved` is what it holds of the common limit."""

    def __init__(self, limit: BodyLimit, headers: Headers, receive: Receive) -> None:
        self.limit = limit
        self.headers = headers
        self.receive = receive
        self.reserved = 0

    async def read(self) -> bytes:
        """The body. Raises TooLargeError, OverloadedError, UnsupportedError, ClientLeftError."""
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and len(declared) < 20:
            self._check_size(int(declared))
        content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        parts: list[bytes] = []
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError("the client left before its body was complete")
            part = message.get("body", b"")
            self._reserve(len(part))
            parts.append(part)
            if not message.get("more_body", False):
                break
        body = b"".join(parts)
        if body and content_type != "application/json":
            raise UnsupportedError("send JSON with Content-Type: application/json")
        if body and self.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise UnsupportedError("send the body as it is, without Content-Encoding")
        # Parsers guess UTF-16 and UTF-32 too, whose bytes the check below would misread.
        if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
            raise UnsupportedError("send JSON in UTF-8")
        _check_structure(body, self.limit.settings.max_json_depth)
        return body

    def _check_size(self, size: int) -> None:
        most = self.limit.settings.max_body_bytes
        if size > most:
            raise TooLargeError("body", f"is over the limit of {most} bytes", most)

    def _reserve(self, size: int) -> None:
        """Hold what has arrived. What is only declared is not held: 16 idle clients could shut out all others."""
        self._check_size(self.reserved + size)
        if self.limit.buffered + size > self.limit.settings.max_buffered_bytes:
            raise OverloadedError("too many large requests are being read: try again later", 1)
        self.limit.buffered += size
        self.reserved += size


def _check_structure(body: bytes, max_depth: int) -> None:
    """Refuse JSON that nests too deep or has too many parts or numbers, before a recursive parser sees it.

    Only the brackets of an acceptable body are looked at one by one: all else is the bytes' own fast searches.
    """
    opened = body.count(b"[") + body.count(b"{")
    many = body.count(b'"') > 2 * MAX_JSON_PARTS or body.count(b",") > MAX_JSON_NUMBERS
    if opened <= max_depth and not many:
        return
    # Without its escapes, whatever stands between an odd quote and the next one is a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = plain.count(b'"') // 2
    outside = b"".join(plain.split(b'"')[::2]) if strings <= MAX_JSON_PARTS else b""
    parts = strings + sum(map(outside.count, (b"[", b"]", b"{", b"}"))) // 2
    if parts > MAX_JSON_PARTS:
        message = f"has over {MAX_JSON_PARTS} strings, lists and objects: send fewer in a request"
        raise TooLargeError("body", message, MAX_JSON_PARTS)
    # A comma stands between any two values; those that are no parts are numbers (or true, false, null).
    if outside.count(b",") - parts > MAX_JSON_NUMBERS:
        message = f"has over {MAX_JSON_NUMBERS} numbers: send embeddings as base64, or fewer in a request"
        raise TooLargeError("body", message, MAX_JSON_NUMBERS)
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", outside):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise TooLargeError("body", f"nests deeper than {max_depth} levels", max_depth)


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A `receive` that hands out the body that was read, then whatever comes next: the disconnect."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
