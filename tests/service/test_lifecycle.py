"""Deadlines, clients that leave, a worker that dies or is stuck, batches that fail, shutdown."""

import asyncio
import json
import socket
import sys
import threading
from typing import Any

import httpx
import pytest
import torch
from starlette.types import Message

from core import pipeline
from core.model import Model
from service import lane as lane_module
from service.app import create_app
from service.engine import Engine
from tests.service.calls import PASSAGES, QUERY, answer, error, events
from tests.service.conftest import Serve, make_settings
from tests.waiting import wait_for, wait_until_empty

LONG: dict[str, Any] = {"query": QUERY, "passages": PASSAGES, "max_new_tokens": 500}


def engine_of(client: httpx.Client) -> Engine:
    """The engine behind the socket."""
    engine: Engine = client.app.state.engine  # type: ignore[attr-defined]  # the fixture put it there
    return engine


def lane_jobs(client: httpx.Client) -> int:
    """Jobs in the worker's hands."""
    version = engine_of(client).active
    assert version is not None
    return version.lane.jobs


def test_health(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {
        "status": "ready",
        "checkpoint": "untrained",
        "trained": False,
        "document_cache": "does not apply: needs an n_layers compressor with order document_first, "
        "this is n_layers, query_first",
    }


def test_health_is_readyz_by_another_name(client: httpx.Client) -> None:
    assert client.get("/health").json() == client.get("/readyz").json()


@pytest.mark.parametrize(
    ("path", "near"),
    [("/answers", "/answer"), ("/answer/", "/answer"), ("/v1/chat/completion", "/v1/chat/completions"), ("/x", None)],
)
def test_a_path_that_is_not_there_leads_to_those_that_are(client: httpx.Client, path: str, near: str | None) -> None:
    response = client.get(path)
    assert response.status_code == 404
    message = response.json()["error"]["message"]  # under /v1/ in OpenAI's shape
    assert message.startswith("there is nothing at this path: see /openapi.json")
    assert ("did you mean" in message) == (near is not None)
    assert near is None or f"did you mean {near}?" in message


def test_head_is_answered_wherever_get_is(client: httpx.Client) -> None:
    for path in (
        "/livez",
        "/readyz",
        "/health",
        "/metrics",
        "/",
        "/page/page.js",
        "/page/state",
        "/v1/models",
        "/openapi.json",
    ):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
    for path in ("/answer", "/v1/rerank", "/v2/rerank", "/v1/chat/completions"):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (405, b"")
        assert head.headers["content-length"] == got.headers["content-length"]
    assert client.head("/nothing").status_code == 404


def test_a_deadline_ends_a_request_and_frees_its_slot(serve: Serve) -> None:
    with serve() as client:
        response = client.post("/answer", json={**LONG, "timeout": 0.2})
        assert response.status_code == 504
        assert error(response)["code"] == "deadline"
        wait_until_empty(client)
        wait_for(lambda: lane_jobs(client) == 0, 2)
        text = client.post("/answer", json={**LONG, "timeout": 0.2, "stream": True}).text
        name, data = events(text)[-1]
        assert name == "error"
        assert data["error"]["code"] == "deadline"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_slot(serve: Serve, stream: bool) -> None:
    with serve() as client:
        request = client.build_request("POST", "/answer", json={**LONG, "stream": stream})
        with socket.create_connection((request.url.host, request.url.port or 80)) as connection:
            head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
            connection.sendall(f"POST /answer HTTP/1.1\r\n{head}\r\n".encode() + request.read())
            wait_for(lambda: lane_jobs(client) == 1)
        wait_until_empty(client)
        wait_for(lambda: lane_jobs(client) == 0, 2)
        assert answer(client)["answer"]


def test_a_client_that_reads_nothing_frees_its_slot(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.streaming.SLOW_READER_SECONDS", 0.1)
    app = create_app(make_settings(), model)
    body = json.dumps({"query": QUERY, "passages": PASSAGES, "stream": True, "timeout": 5}).encode()
    arriving: list[Message] = [{"type": "http.request", "body": body}]
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/answer", "query_string": b"", "headers": headers, "state": {}}

    async def receive() -> Message:
        return arriving.pop() if arriving else await asyncio.Future[Message]()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Future[None]()  # as a socket's buffer that stays full

    async def stream() -> int:
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, receive, send), 60)
            return len(app.state.engine.sessions)

    assert asyncio.run(stream()) == 0


def test_a_worker_that_dies_is_noticed_within_seconds(serve: Serve) -> None:
    died = threading.Event()
    with serve(on_fatal=died.set) as client:
        responses: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: responses.append(client.post("/answer", json=LONG)))
        asking.start()
        wait_for(lambda: lane_jobs(client) == 1)
        engine_of(client).worker.call(sys.exit)
        asking.join(5)
        assert responses, "the request hangs"
        assert responses[0].status_code in (500, 503)
        error(responses[0])
        assert client.get("/livez").status_code == 503
        assert client.get("/readyz").status_code == client.get("/health").status_code == 503
        assert client.post("/answer", json=LONG).status_code == 503
        assert died.wait(5)


def test_a_worker_that_is_stuck_is_noticed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    died, stuck = threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        stuck.wait(20)
        raise RuntimeError("the test is over")

    with serve(on_fatal=died.set, stall_seconds=0.3) as client:
        monkeypatch.setattr(lane_module, "compress_rows", hang)
        response = client.post("/rerank", json={"query": QUERY, "passages": PASSAGES})
        assert response.status_code == 500
        assert "path" not in response.text
        assert died.wait(5)
        assert client.get("/livez").status_code == 503
        stuck.set()


def test_out_of_memory_splits_the_batch(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def small_memory(model: Model, rows: Any) -> Any:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no room for more than two rows")
        return pipeline.compress_rows(model, rows)

    with serve() as client:
        expected = answer(client)
        monkeypatch.setattr(lane_module, "compress_rows", small_memory)
        assert answer(client)["answer"] == expected["answer"]
        assert "scaledown_split_batches_total 0.0" not in client.get("/metrics").text


def test_only_the_request_that_cannot_be_served_fails(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(model: Model, rows: Any) -> Any:
        if any(len(row.query_ids) > 30 for row in rows):
            raise RuntimeError("internal detail at /some/path")
        return pipeline.compress_rows(model, rows)

    with serve(batch_wait_ms=50) as client:
        monkeypatch.setattr(lane_module, "compress_rows", poisoned)
        results: dict[str, httpx.Response] = {}

        def ask(query: str) -> None:
            results[query] = client.post("/rerank", json={"query": query, "passages": PASSAGES})

        queries = [QUERY, "poison " * 40, "What is bread made of?"]
        threads = [threading.Thread(target=ask, args=(query,)) for query in queries]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert [results[query].status_code for query in queries] == [200, 500, 200]
        assert "/some/path" not in results[queries[1]].text
        assert error(results[queries[1]])["code"] == "internal"


def test_draining_finishes_what_runs_and_admits_nothing(serve: Serve) -> None:
    with serve() as client:
        expected = answer(client, max_new_tokens=60)["answer"]
        responses: list[httpx.Response] = []
        body = {**LONG, "max_new_tokens": 60}
        asking = threading.Thread(target=lambda: responses.append(client.post("/answer", json=body)))
        asking.start()
        wait_for(lambda: lane_jobs(client) == 1)
        loop = engine_of(client).outbox._loop
        draining = asyncio.run_coroutine_threadsafe(engine_of(client).drain(20), loop)
        wait_for(lambda: not engine_of(client).ready)
        refused = client.post("/answer", json=body)
        assert refused.status_code == 503
        assert error(refused)["code"] == "stopping"
        assert client.get("/readyz").status_code == 503
        assert client.get("/livez").status_code == 200
        draining.result(20)
        asking.join(20)
        assert responses[0].json()["answer"] == expected


def test_what_cannot_finish_in_time_gets_a_clear_error(serve: Serve) -> None:
    with serve() as client:
        responses: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: responses.append(client.post("/answer", json=LONG)))
        asking.start()
        wait_for(lambda: lane_jobs(client) == 1)
        asyncio.run_coroutine_threadsafe(engine_of(client).drain(0), engine_of(client).outbox._loop).result(5)
        asking.join(5)
        assert responses[0].status_code == 503
        assert error(responses[0])["code"] == "stopping"
