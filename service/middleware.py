"""What happens to every HTTP request before and after its route, as pure ASGI. Knows no routes' meaning.

Outermost first: request id, headers, log line and metrics; keys; the body, read under limits before any route runs.
"""

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import OverloadedError, TooLargeError
from service.auth import KeyRing
from service.errors import UnsupportedError, error_response, plain_response
from service.logs import set_request_id, set_trace_id
from service.metrics import Metrics
from service.settings import Settings
from service.tracing import Tracing

if TYPE_CHECKING:
    from service.session import Session

log = logging.getLogger(__name__)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# A string need not end: one that fails to match would be tried again from each quote in it, in quadratic time.
JSON_PART = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)
QUIET = frozenset({"/livez", "/readyz", "/metrics"})
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
        route = scope["path"] if scope["path"] in self.paths else "other"  # a caller's path is no metric's label
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
            if not status:
                await error_response(error)(scope, receive, send_named)
        finally:
            session = scope.get("state", {}).get("session")
            self._note(route, status, time.perf_counter() - began, session)
            if span is not None:
                span.end(scope["method"], route, status, request_id, session)

    def _note(self, route: str, status: int, seconds: float, session: "Session | None") -> None:
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        extra = {"route": route, "status": status, "ms": round(1000 * seconds, 1)}
        if session is not None:
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
            refusal = self.keys.refuse(scope["path"], Headers(scope=scope))
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

    Bodies in memory are counted together, and one that would pass the total is refused before it is read.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self.buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
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
            except (TooLargeError, OverloadedError, UnsupportedError) as error:
                response = error_response(error, self.settings.overload_status)
                response.headers["Connection"] = "close"
                await response(scope, receive, send)
                return
            if body is not None:  # None: the client left before its body was complete
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

    async def read(self) -> bytes | None:
        """The body; None where the client left. Raises TooLargeError, OverloadedError, UnsupportedError."""
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and len(declared) < 20:
            self._reserve(int(declared))
        content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self.reserved:
                self._reserve(size)
            parts.append(part)
            if not message.get("more_body", False):
                break
        body = b"".join(parts)
        if body and content_type != "application/json":
            raise UnsupportedError("send JSON with Content-Type: application/json")
        _check_depth(body, self.limit.settings.max_json_depth)
        return body

    def _reserve(self, size: int) -> None:
        settings = self.limit.settings
        most = settings.max_body_bytes
        if size > most:
            raise TooLargeError("body", f"is over the limit of {most} bytes", most)
        if self.limit.buffered - self.reserved + size > settings.max_buffered_bytes:
            raise OverloadedError("too many large requests are being read: try again later", 1)
        self.limit.buffered += size - self.reserved
        self.reserved = size


def _check_depth(body: bytes, limit: int) -> None:
    """Refuse JSON that nests deeper than `limit`, before a recursive parser sees it."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    depth = 0
    for part in JSON_PART.finditer(body):
        match body[part.start()]:
            case 0x5B | 0x7B:  # [ {
                depth += 1
                if depth > limit:
                    raise TooLargeError("body", f"nests deeper than {limit} levels", limit)
            case 0x5D | 0x7D:  # ] }
                depth -= 1


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
