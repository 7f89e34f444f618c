"""The client that awaits: one method a call. What is sent and how it is read is in `calls.py`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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


class AsyncClient:
    """A service at one address, from one event loop. Use it in an `async with`, or await `close`.

    timeout     seconds of silence on the connection before a request is given up, unless its deadline is later
    http        an httpx client of your own (proxies, certificates); it is closed with this one

    UnreachableError is raised for a `base_url` that is none. Every method raises ServiceError: see `errors.py`.
    Cancelling a call stops its work in the service.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float = TIMEOUT_S,
        retry: Retry = DEFAULT_RETRY,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._base_url = address_of(base_url)
        self._keys = Keys(api_key, admin_key)
        self._retry = retry
        self._http = http or httpx.AsyncClient(timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def answer(self, query: str, passages: Passages, **options: Unpack[AnswerOptions]) -> Answer:
        """Answer a query from passages."""
        return await self._send(calls.answer_call(query, passages, options))

    @asynccontextmanager
    async def stream(
        self, query: str, passages: Passages, **options: Unpack[AnswerOptions]
    ) -> AsyncIterator[AsyncIterator[StreamEvent]]:
        """`async with client.stream(...) as events: async for event in events`. Leaving early stops the answer."""
        response = await self._open(calls.stream_call(query, passages, options))
        try:
            yield _events(response)
        finally:
            await response.aclose()

    async def compress(self, query: str, passages: Passages, **options: Unpack[CompressOptions]) -> Compression:
        """Compress passages for a query."""
        return await self._send(calls.compress_call(query, passages, options))

    async def rerank(self, query: str, passages: Passages, **options: Unpack[RerankOptions]) -> Ranking:
        """Put passages in order of their relevance to a query."""
        return await self._send(calls.rerank_call(query, passages, options))

    async def ready(self) -> Readiness:
        """Whether the service takes requests, and why not."""
        return await self._send(calls.ready_call())

    async def checkpoints(self) -> Checkpoints:
        """The versions there are. Needs the admin key."""
        return await self._send(calls.checkpoints_call())

    async def change_checkpoint(self, action: CheckpointAction, name: str | None = None) -> Checkpoints:
        """Load a checkpoint, serve it, or go back to the one before. Needs the admin key."""
        return await self._send(calls.change_call(action, name))

    async def _send(self, call: Call[T]) -> T:
        response = await self._open(call)
        try:
            return call.result(response.status_code, response.headers, await _content(response))
        finally:
            await response.aclose()

    async def _open(self, call: Call[Any]) -> httpx.Response:
        """A response with an accepted status, its body not read yet, after as many attempts as it takes."""
        tried = 0
        while True:
            tried += 1
            try:
                return await self._attempt(call)
            except ServiceError as error:
                wait = self._retry.wait(tried, error)
                if wait is None:
                    raise
            await asyncio.sleep(wait)

    async def _attempt(self, call: Call[Any]) -> httpx.Response:
        try:
            response = await self._http.send(request_of(self._http, self._base_url, self._keys, call), stream=True)
        except httpx.TransportError as error:
            raise unreachable(error) from error
        if response.status_code not in call.accepted:
            try:
                call.result(response.status_code, response.headers, await _content(response))
            finally:
                await response.aclose()
        return response


async def _content(response: httpx.Response) -> bytes:
    try:
        return await response.aread()
    except httpx.TransportError as error:
        raise unreachable(error) from error


async def _events(response: httpx.Response) -> AsyncIterator[StreamEvent]:
    reader = calls.EventReader()
    try:
        async for data in response.aiter_bytes():
            for event in reader.feed(data):
                yield event
    except httpx.TransportError as error:
        raise unreachable(error) from error
    reader.close()
