"""The sync and the async client against a real server: each scenario runs on both."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import (
    Answer,
    AsyncClient,
    AuthenticationError,
    Client,
    Done,
    InvalidRequestError,
    OverloadedError,
    Passage,
    PassagesRead,
    ProtocolError,
    RerankUsage,
    Retry,
    ServiceError,
    Token,
    UnreachableError,
)
from service.client.calls import AnswerOptions
from service.client.results import StreamEvent
from tests.service.calls import PASSAGES, QUERY, answer
from tests.service.conftest import Serve
from tests.service.test_security import HEAD
from tests.service.test_security import connect as open_socket
from tests.waiting import wait_until_empty

KEY, ADMIN = "alpha-0123456789abcdef", "admin-0123456789abcdef"
GIVEN = [PASSAGES[0], Passage(**PASSAGES[1]), Passage(**PASSAGES[2])]
NO_RETRY = Retry(attempts=1)
OPTIONS: AnswerOptions = {"max_new_tokens": 8, "rate": 8}


class Blocking:
    """`Client`, by the names that both kinds of test share."""

    def __init__(self, address: str, **values: Any) -> None:
        self.client = Client(address, http=httpx.Client(trust_env=False, timeout=30), **values)

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self.client, name)(*arguments, **options)

    def stream(self, most: int = 10**6, **options: Any) -> list[StreamEvent]:
        with self.client.stream(QUERY, GIVEN, **options) as events:
            return [event for event, _ in zip(events, range(most), strict=False)]

    def close(self) -> None:
        self.client.close()


class Awaiting:
    """`AsyncClient`, one event loop for all its calls."""

    def __init__(self, address: str, **values: Any) -> None:
        self.runner = asyncio.Runner()
        self.client = AsyncClient(address, http=httpx.AsyncClient(trust_env=False, timeout=30), **values)

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return self.runner.run(getattr(self.client, name)(*arguments, **options))

    def stream(self, most: int = 10**6, **options: Any) -> list[StreamEvent]:
        async def read() -> list[StreamEvent]:
            found: list[StreamEvent] = []
            async with self.client.stream(QUERY, GIVEN, **options) as events:
                async for event in events:
                    found.append(event)
                    if len(found) == most:
                        break
            return found

        return self.runner.run(read())

    def close(self) -> None:
        self.runner.run(self.client.close())
        self.runner.close()


Either = Blocking | Awaiting
Connect = Callable[..., AbstractContextManager[Either]]


@pytest.fixture(params=[Blocking, Awaiting], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Opens a client of either kind."""

    @contextmanager
    def opened(address: httpx.URL | str, **values: Any) -> Iterator[Either]:
        client: Either = request.param(str(address), **values)
        try:
            yield client
        finally:
            client.close()

    return opened


def test_answer(client: httpx.Client, connect: Connect) -> None:
    expected = answer(client, rate=8, explain=True)
    with connect(client.base_url) as ours:
        got = ours.call("answer", QUERY, GIVEN, explain=True, **OPTIONS)
    assert isinstance(got, Answer)
    assert got.answer == expected["answer"]
    assert [passage.id for passage in got.passages] == [None, "bread", None]
    assert set(expected["usage"]) == set(asdict(got.usage))
    assert got.usage.tokens_saved == expected["usage"]["tokens_saved"]
    assert got.answerable is not None
    assert got.answerable.probability == pytest.approx(expected["answerable"]["probability"])
    assert got.checkpoint == "untrained"


def test_stream_is_the_whole_answer_in_pieces(client: httpx.Client, connect: Connect) -> None:
    with connect(client.base_url) as ours:
        whole = ours.call("answer", QUERY, GIVEN, **OPTIONS)
        first, *tokens, last = ours.stream(**OPTIONS)
    assert isinstance(first, PassagesRead)
    assert first.passages == whole.passages
    assert all(isinstance(token, Token) for token in tokens)
    assert "".join(token.text for token in tokens if isinstance(token, Token)) == whole.answer
    assert isinstance(last, Done)
    assert (last.answer.answer, last.answer.usage) == (whole.answer, whole.usage)


def test_leaving_a_stream_early_frees_its_place(serve: Serve, connect: Connect) -> None:
    with serve() as client, connect(client.base_url) as ours:
        assert len(ours.stream(most=2, max_new_tokens=500)) == 2
        wait_until_empty(client)


def test_compress_then_answer_from_the_embeddings(client: httpx.Client, connect: Connect) -> None:
    with connect(client.base_url) as ours:
        whole = ours.call("answer", QUERY, GIVEN, **OPTIONS)
        for store in (True, False):
            made = ours.call("compress", QUERY, GIVEN, rate=8, store=store)
            assert [(p.embedding_id is not None) for p in made.passages] == [store] * 3
            assert made.usage.memory_tokens == sum(passage.memory_tokens for passage in made.passages)
            first = made.passages[0]
            assert [len(row) for row in first.embeddings.rows()] == [first.embeddings.shape[1]] * first.memory_tokens
            again = ours.call("answer", QUERY, [passage.as_passage() for passage in made.passages], **OPTIONS)
            assert again.answer == whole.answer
            with pytest.raises(InvalidRequestError, match="made for another query"):
                ours.call("answer", "Another query?", [passage.as_passage() for passage in made.passages])


def test_rerank_and_readiness(client: httpx.Client, connect: Connect) -> None:
    with connect(client.base_url) as ours:
        ranking = ours.call("rerank", QUERY, GIVEN, top_n=2)
        assert len(ranking.results) == 2
        assert ranking.results[0].relevance >= ranking.results[1].relevance
        assert ranking.usage == RerankUsage(ours.call("compress", QUERY, GIVEN).usage.text_tokens)
        ready = ours.call("ready")
        assert (ready.ready, ready.status, ready.checkpoint, ready.trained) == (True, "ready", "untrained", False)


def test_errors_say_what_is_wrong_and_where(client: httpx.Client, connect: Connect) -> None:
    with connect(client.base_url) as ours:
        with pytest.raises(InvalidRequestError) as caught:
            ours.call("answer", QUERY, ["fine", " "])
        assert (caught.value.status, caught.value.code, caught.value.field) == (422, "invalid_input", "passages.1")
        assert caught.value.request_id
        with pytest.raises(InvalidRequestError) as large:
            ours.stream(max_new_tokens=10**6)
        assert (large.value.status, large.value.limit) == (413, 512)
        with pytest.raises(InvalidRequestError, match="modus: unknown field"):
            ours.call("answer", QUERY, GIVEN, modus="text")
        for wrong, message in (
            ("one text", "passages: must be a list"),
            ({"text": "one"}, "passages: must be a list"),
            (["fine", None], "passages.1: must be a text or an object"),
            (["fine", Passage("")], "passages.1.text: is empty"),
            ([{"text": "fine", "score": 1}], "passages.0.score: unknown field"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                ours.call("rerank", QUERY, wrong)
        with pytest.raises(InvalidRequestError, match="temperature: must be a finite number"):
            ours.call("answer", QUERY, GIVEN, temperature=float("nan"))
        with pytest.raises(InvalidRequestError, match="query: holds a lone surrogate"):
            ours.call("rerank", "caf\udce9?", GIVEN)  # what Python makes of a byte on a command line that is no UTF-8


@pytest.mark.parametrize("address", ["localhost:8000", "/tmp/socket", "ftp://host", "http://", "http://host:port"])
def test_what_is_no_address_is_refused(address: str, connect: Connect) -> None:
    with pytest.raises(UnreachableError, match="no address of a service"), connect(address):
        pass


def test_checkpoints(serve: Serve, root: Path, connect: Connect) -> None:
    with serve(api_keys=KEY, admin_key=ADMIN, checkpoint_root=root) as client:
        with connect(client.base_url, api_key=KEY) as stranger, pytest.raises(AuthenticationError):
            stranger.call("checkpoints")
        with connect(client.base_url, api_key=KEY, admin_key=ADMIN) as ours:
            before = ours.call("checkpoints")
            assert (before.active, before.available, before.version) == ("untrained", ("first", "second"), None)
            after = ours.call("change_checkpoint", "activate", "first")
            assert after.active == after.version
            assert after.version.startswith("first@")
            assert ours.call("answer", QUERY, GIVEN, max_new_tokens=1).checkpoint == after.version
            assert ours.call("change_checkpoint", "rollback").active == "untrained"
            with pytest.raises(InvalidRequestError) as caught:
                ours.call("change_checkpoint", "load", "nowhere")
            assert (caught.value.status, caught.value.code) == (409, "checkpoint")


def test_overload_is_waited_out(serve: Serve, connect: Connect) -> None:
    with (
        serve(max_buffered_bytes=10_000, body_seconds=0.6) as client,
        connect(client.base_url, retry=NO_RETRY) as hasty,
        connect(client.base_url) as patient,
        open_socket(client) as blocker,
    ):
        # Sends a body that takes all the room for bodies, but for its end. The service gives it up soon.
        blocker.sendall(f"{HEAD}Content-Length: 9995\r\n\r\n".encode() + b" " * 9990)
        time.sleep(0.2)
        with pytest.raises(OverloadedError) as caught:
            hasty.call("rerank", QUERY, GIVEN)
        assert caught.value.retry_after_s == 1
        assert patient.call("rerank", QUERY, GIVEN).results


def test_nobody_there(connect: Connect) -> None:
    with connect("http://127.0.0.1:1", retry=NO_RETRY) as ours:
        with pytest.raises(UnreachableError) as caught:
            ours.call("ready")
        assert not caught.value.sent


def test_something_else_there(connect: Connect) -> None:
    with foreign_server() as address, connect(address, retry=NO_RETRY) as ours:
        with pytest.raises(ProtocolError, match="status 501"):
            ours.call("answer", QUERY, GIVEN)
        with pytest.raises(ServiceError):
            ours.stream()


@contextmanager
def foreign_server() -> Iterator[str]:
    """An HTTP server that is not ours."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_client_needs_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'fastapi', 'core'} & set(sys.modules)"
    code = f"import service.client, sys; found = {heavy}; sys.exit(', '.join(found) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
