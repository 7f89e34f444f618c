"""The client that waits: one method a call. What is sent and how it is read is in `calls.py`."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from service.client import calls
from service.client.calls import (
    DEFAULT_RETRY,
    AnswerOptions,
    Call,
    CheckpointAction,
    CompressOptions,
    Keys,
    Passages,
    RerankOptions,
    Retry,
)
from service.client.errors import ServiceError
from service.client.results import Answer, Checkpoints, Compression, Ranking, Readiness, StreamEvent
from service.client.transport import TIMEOUT_S, address_of, request_of, unreachable

T = TypeVar("T")


class Client:
    """A service at one address. Use it in a `with`, or `close` it. Safe to share between threads.

    timeout     seconds of silence on the connection before a request is given up, unless its deadline is later
    http        an httpx client of your own (proxies, certificates); it is closed with this one

    UnreachableError is raised for a `base_url` that is none. Every method raises ServiceError: see `errors.py`.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float = TIMEOUT_S,
        retry: Retry = DEFAULT_RETRY,
        http: httpx.Client | None = None,
    ) -> None:
        self._base_url = address_of(base_url)
        self._keys = Keys(api_key, admin_key)
        self._retry = retry
        self._http = http or httpx.Client(timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def answer(self, query: str, passages: Passages, **options: Unpack[AnswerOptions]) -> Answer:
        """Answer a query from passages."""
        return self._send(calls.answer_call(query, passages, options))

    @contextmanager
    def stream(
        self, query: str, passages: Passages, **options: Unpack[AnswerOptions]
    ) -> Iterator[Iterator[StreamEvent]]:
        """`with client.stream(...) as events: for event in events`. Leaving the block early stops the answer."""
        response = self._open(calls.stream_call(query, passages, options))
        try:
            yield _events(response)
        finally:
            response.close()

    def compress(self, query: str, passages: Passages, **options: Unpack[CompressOptions]) -> Compression:
        """Compress passages for a query."""
        return self._send(calls.compress_call(query, passages, options))

    def rerank(self, query: str, passages: Passages, **options: Unpack[RerankOptions]) -> Ranking:
        """Put passages in order of their relevance to a query."""
        return self._send(calls.rerank_call(query, passages, options))

    def ready(self) -> Readiness:
        """Whether the service takes requests, and why not."""
        return self._send(calls.ready_call())

    def checkpoints(self) -> Checkpoints:
        """The versions there are. Needs the admin key."""
        return self._send(calls.checkpoints_call())

    def change_checkpoint(self, action: CheckpointAction, name: str | None = None) -> Checkpoints:
        """Load a checkpoint, serve it, or go back to the one before. Needs the admin key."""
        return self._send(calls.change_call(action, name))

    def _send(self, call: Call[T]) -> T:
        response = self._open(call)
        with closing(response):
            return call.result(response.status_code, response.headers, _content(response))

    def _open(self, call: Call[Any]) -> httpx.Response:
        """A response with an accepted status, its body not read yet, after as many attempts as it takes."""
        tried = 0
        while True:
            tried += 1
            try:
                return self._attempt(call)
            except ServiceError as error:
                wait = self._retry.wait(tried, error)
                if wait is None:
                    raise
            time.sleep(wait)

    def _attempt(self, call: Call[Any]) -> httpx.Response:
        try:
            response = self._http.send(request_of(self._http, self._base_url, self._keys, call), stream=True)
        except httpx.TransportError as error:
            raise unreachable(error) from error
        if response.status_code not in call.accepted:
            with closing(response):
                call.result(response.status_code, response.headers, _content(response))
        return response


def _content(response: httpx.Response) -> bytes:
    try:
        return response.read()
    except httpx.TransportError as error:
        raise unreachable(error) from error


def _events(response: httpx.Response) -> Iterator[StreamEvent]:
    reader = calls.EventReader()
    try:
        for data in response.iter_bytes():
            yield from reader.feed(data)
    except httpx.TransportError as error:
        raise unreachable(error) from error
    reader.close()
