"""Traces over OTLP: a span for each request with its stages, under the caller's trace, and nothing of its content."""

import contextlib
import gzip
import http.server
import io
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.__main__ import main
from service.logs import JsonFormatter
from service.tracing import open_tracing
from tests.service.calls import PASSAGES, QUERY, answer
from tests.service.conftest import Serve, make_settings

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class CollectorDouble:
    """Stands in for an OpenTelemetry collector: takes OTLP over HTTP on a real socket and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self.services: set[str] = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(self.path, body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def request_span(self, name: str) -> Span:
        """The one span of that name, once it has arrived with all its children."""
        end = time.monotonic() + 20
        while not (found := [span for span in self.spans if span.name == name]):
            assert time.monotonic() < end, [span.name for span in self.spans]
            time.sleep(0.02)
        [span] = found
        return span

    def children(self, parent: Span) -> dict[str, Span]:
        return {span.name: span for span in self.spans if span.parent_span_id == parent.span_id}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def attributes(span: Span) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value") or "string_value") for a in span.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[CollectorDouble]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    double = CollectorDouble()
    yield double
    double.close()


@contextlib.contextmanager
def log_lines() -> Iterator[list[dict[str, Any]]]:
    """The log lines of the service, as the command would write them."""
    stream = io.StringIO()
    lines: list[dict[str, Any]] = []
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("service")
    level = logger.level
    logger.setLevel(logging.INFO)  # not `.level`: loggers remember what is enabled
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        lines += [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_answer_is_a_span_of_its_callers_trace_with_its_stages(serve: Serve, collector: CollectorDouble) -> None:
    with log_lines() as lines, serve(otlp_endpoint=collector.url) as client:
        client.headers["traceparent"] = f"00-{TRACE}-{PARENT}-01"
        usage = answer(client, mode="hybrid")["usage"]
        span = collector.request_span("POST /answer")
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.kind) == (TRACE, PARENT, Span.SPAN_KIND_SERVER)
    assert collector.services == {"scaledown"}
    shown = attributes(span)
    assert shown["http.response.status_code"] == 200
    assert shown["scaledown.checkpoint"] == "untrained"
    assert shown["scaledown.mode"] == "hybrid"
    assert shown["scaledown.passages"] == len(PASSAGES)
    for name in ("text_tokens", "prompt_tokens", "completion_tokens"):
        assert shown[f"scaledown.{name}"] == usage[name]
    stages = collector.children(span)
    assert list(stages) == ["prepare", "queue", "compress", "generate"]
    ends = [span.start_time_unix_nano]
    for stage in stages.values():
        assert ends[-1] <= stage.start_time_unix_nano + 1_000_000 <= stage.end_time_unix_nano + 1_000_000
        ends.append(stage.end_time_unix_nano)
    assert ends[-1] <= span.end_time_unix_nano + 1_000_000
    assert [event.name for event in stages["generate"].events] == ["first token"]
    [line] = [line for line in lines if line.get("route") == "/answer"]
    assert line["trace_id"] == TRACE
    assert line["request_id"] == shown["scaledown.request_id"]


def test_spans_hold_nothing_a_caller_wrote(serve: Serve, collector: CollectorDouble) -> None:
    key = "secret-key-0123456789"
    with serve(otlp_endpoint=collector.url, api_keys=key) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        text = answer(client)["answer"]
        assert client.post(f"/{key}", json={"query": QUERY}).status_code == 404
        collector.request_span("POST /answer")
        collector.request_span("POST other")
    sent = b"".join(collector.bodies)
    for hidden in (key, QUERY, text, "Marie Curie", "Bread", "made of flour"):
        assert hidden.encode() not in sent


def test_a_stream_that_fails_marks_the_stage_it_was_in(serve: Serve, collector: CollectorDouble) -> None:
    with serve(otlp_endpoint=collector.url) as client:
        body = {"query": QUERY, "passages": PASSAGES, "max_new_tokens": 500, "timeout": 0.3, "stream": True}
        assert "deadline" in client.post("/answer", json=body).text
        span = collector.request_span("POST /answer")
        stages = collector.children(span)
    assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, "deadline")
    failed = [name for name, stage in stages.items() if stage.status.code == Status.STATUS_CODE_ERROR]
    assert len(failed) == 1
    assert list(stages)[-1] == failed[0]


def test_probes_are_not_traced_and_a_bad_traceparent_begins_a_trace(serve: Serve, collector: CollectorDouble) -> None:
    with serve(otlp_endpoint=collector.url) as client:
        assert client.get("/readyz").status_code == 200
        body = {"query": QUERY, "passages": PASSAGES}
        assert client.post("/rerank", json=body, headers={"traceparent": "00-nonsense"}).status_code == 200
        span = collector.request_span("POST /rerank")
        assert list(collector.children(span)) == ["prepare", "queue", "compress"]
    assert not span.parent_span_id
    assert {span.name for span in collector.spans if not span.parent_span_id} == {"POST /rerank"}


def test_the_standard_variables_turn_it_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracing(make_settings()) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    tracing = open_tracing(make_settings())
    assert tracing is not None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracing(make_settings()) is None


def test_a_collector_that_is_gone_does_not_hold_up_anybody(serve: Serve) -> None:
    with serve(otlp_endpoint="http://127.0.0.1:1") as client:
        assert answer(client)["answer"]
        began = time.monotonic()
    assert time.monotonic() - began < 15


def test_without_the_packages_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["--otlp-endpoint", "http://127.0.0.1:4318"]) == 2
    assert ".[otel]" in capsys.readouterr().err


def test_off_it_is_not_even_imported() -> None:
    code = "import sys, service.app; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_requests_are_served_the_same_with_and_without(client: httpx.Client, serve: Serve) -> None:
    collector = CollectorDouble()
    with serve(otlp_endpoint=collector.url) as traced:
        assert answer(traced)["answer"] == answer(client)["answer"]
    collector.close()
