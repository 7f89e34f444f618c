"""Clients that take a response slowly, or not at all: what is left of it is in the service's memory."""

import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Response
from starlette.types import Receive, Scope, Send

from service.server import PatientProtocol
from tests.service.conftest import serve_app

LARGE = 32 * 2**20  # more than the kernel takes off the service's hands
PATIENCE = 1.0


class Abandoned(Response):
    """A stream that is given up while it waits for its client, as `service.streaming` does past the deadline."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * LARGE, "more_body": True})


class Pausing(Response):
    """A stream that goes on when its client does."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, False):
            await send({"type": "http.response.body", "body": b"x" * (LARGE // 2), "more_body": more})


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    monkeypatch.setattr(PatientProtocol, "slow_reader_seconds", PATIENCE)
    app = FastAPI()
    app.add_api_route("/whole", lambda: Response(b"x" * LARGE), response_model=None)
    app.add_api_route("/abandoned", lambda: Abandoned(), response_model=None)
    app.add_api_route("/stream", lambda: Pausing(), response_model=None)
    with serve_app(app) as client:  # its end waits for connections: it fails where one is left
        yield client


def ask(client: httpx.Client, path: str) -> socket.socket:
    """A connection that has asked for `path` and has read nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    connection.settimeout(10)
    connection.connect((client.base_url.host, client.base_url.port or 80))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return connection


def read(connection: socket.socket, enough: int) -> int:
    """How many bytes come, up to `enough` or the end."""
    received = 0
    while received < enough:
        try:
            data = connection.recv(min(2**20, enough - received))
        except ConnectionResetError:
            break
        if not data:
            break
        received += len(data)
    return received


@pytest.mark.parametrize("path", ["/whole", "/abandoned"])
def test_a_client_that_reads_nothing_is_dropped(
    client: httpx.Client, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ask(client, path) as connection:
        end = time.monotonic() + 20
        while "a client does not read its response, and is dropped" not in caplog.messages:
            assert time.monotonic() < end, "it is waited for"
            time.sleep(0.05)
        assert read(connection, LARGE) < LARGE


def test_a_client_that_reads_slowly_gets_it_all(client: httpx.Client) -> None:
    with ask(client, "/whole") as connection:
        step = 64 * 1024  # so little that the kernel asks the service for no more within its patience
        for _ in range(15):
            assert read(connection, step) == step
            time.sleep(PATIENCE / 5)
        rest = LARGE - 15 * step
        assert read(connection, rest) == rest


def test_a_stream_waits_for_its_client(client: httpx.Client) -> None:
    with ask(client, "/stream") as connection:
        time.sleep(2 * PATIENCE)
        assert read(connection, LARGE) == LARGE
