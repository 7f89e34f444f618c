"""OpenTelemetry traces: a server span for each request, under its caller's, and a child for each stage it went through.

Spans hold counts, versions and durations, never a query, a passage, an answer or a key. Off unless configured, and then
not even imported. All spans are made when a request has ended, from times that are taken anyway.
"""

import asyncio
import importlib.util
import itertools
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from core.errors import ConfigError
from service.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from service.session import Session

STANDARD = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# Stages as `Session.stage_times` has them, and the span that each is part of.
SPANS = {
    "tokenize": "prepare",
    "queue": "queue",
    "compress": "compress",
    "first_token": "generate",
    "decode": "generate",
}
CLOSE_SECONDS = 3.0


def configured(settings: Settings) -> bool:
    """Whether traces are asked for. Raises ConfigError where they are and the packages for them are not installed."""
    wanted = settings.otlp_endpoint is not None or any(os.environ.get(name) for name in STANDARD)
    if not wanted or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    for package in ("opentelemetry.sdk", "opentelemetry.exporter"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # not even its parent
            found = None
        if found is None:
            raise ConfigError(
                "otlp_endpoint: traces need the packages of the extra `otel`: pip install '.[otel]' in the repository"
            )
    return True


def open_tracing(settings: Settings) -> "Tracing | None":
    """What records the traces of this process; None where none are asked for. Raises ConfigError."""
    if not configured(settings):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    base = settings.otlp_endpoint
    return Tracing(OTLPSpanExporter(endpoint=f"{base.rstrip('/')}/v1/traces" if base else None))


class Tracing:
    """Hands spans to `exporter` from a thread of its own, in batches. OTEL_* variables set names, sampling, batches."""

    def __init__(self, exporter: "SpanExporter") -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "scaledown"}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("scaledown")

    def begin(self, scope: Scope) -> "RequestSpan":
        """The span of a request that arrives now."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        return RequestSpan(self._tracer, self._tracer.start_span(scope["method"], parent, SpanKind.SERVER))

    async def close(self) -> None:
        """Send what waits, but do not wait long for a collector that does not answer."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, CLOSE_SECONDS)


class RequestSpan:
    """The server span of one request, and the children it gets at its end."""

    def __init__(self, tracer: Any, span: "Span") -> None:
        self._tracer = tracer
        self._span = span

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, as in `traceparent`."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def end(self, method: str, route: str, status: int, request_id: str, session: "Session | None") -> None:
        """End the span; `session` is the request's, where it came to have one."""
        from opentelemetry.trace import Status, StatusCode

        failed = session is not None and session.failure
        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "scaledown.request_id": request_id,
            }
        )
        if session is not None:
            self._span.set_attributes(_attributes(session))
            self._add_stages(session)
        if status >= 500 or failed:
            self._span.set_status(Status(StatusCode.ERROR, failed or ""))
        self._span.end()

    def _add_stages(self, session: "Session") -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        offset = time.time() - time.perf_counter()  # marks are of the clock that never jumps, spans of the calendar's
        context, times = set_span_in_context(self._span), session.stage_times()
        for name, parts in itertools.groupby(times, key=lambda each: SPANS[each[0]]):
            stages = {stage: (begin + offset, end + offset) for stage, begin, end in parts}
            span = self._tracer.start_span(name, context, start_time=_nanoseconds(min(stages.values())[0]))
            if "decode" in stages:
                span.add_event("first token", timestamp=_nanoseconds(stages["decode"][0]))
            if session.failure and session.stage in stages:
                span.set_status(Status(StatusCode.ERROR, session.failure))
            span.end(end_time=_nanoseconds(max(stages.values())[1]))


def _attributes(session: "Session") -> dict[str, str | int]:
    """What a span says of a request's work. Numbers and names of ours: nothing that a caller wrote."""
    found: dict[str, str | int] = {"scaledown.checkpoint": session.version.model.name}
    if session.prepared is not None:
        found["scaledown.passages"] = len(session.prepared.request.passages)
        found["scaledown.passage_tokens"] = session.prepared.passage_tokens
    if session.plan is not None:
        found["scaledown.mode"] = session.plan.policy.mode
        found["scaledown.text_tokens"] = session.text_tokens
        found["scaledown.prompt_tokens"] = session.prompt_tokens
        found["scaledown.completion_tokens"] = session.completion_tokens
    return found


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
