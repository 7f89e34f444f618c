"""Calls between two processes over a socket, in both directions: one JSON object a line. Does not know what for.

{"call": 7, "method": "prepare", "values": {...}}    then    {"answer": 7, "result": ...}  or  {..., "error": "..."}
"""

import asyncio
import itertools
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

from core.errors import CheckpointError

log = logging.getLogger(__name__)
Handler = Callable[..., Awaitable[Any]]
MAX_LINE_BYTES = 16 * 2**20  # a refusal may name every wrong key of a config.json, which has up to 1 MiB


class Channel:
    """One end. Refusals (CheckpointError) cross it with their message; anything else is logged where it happened."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handlers: Mapping[str, Handler]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._handlers = handlers
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # a task that nobody holds may be collected
        self.closed = False

    @classmethod
    async def open(cls, connection: socket.socket, handlers: Mapping[str, Handler]) -> Self:
        """The end of a connected socket. Nothing arrives before `run`."""
        reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_LINE_BYTES)
        return cls(reader, writer, handlers)

    async def call(self, method: str, **values: Any) -> Any:
        """The other side's result. Raises CheckpointError: the other side's, or that it is gone."""
        if self.closed:
            raise CheckpointError("the process is gone")
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send({"call": number, "method": method, "values": values})
        return await answer

    async def run(self) -> None:
        """Take calls and answers until the other side is gone; what still waits for an answer then fails."""
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if "call" in message:
                    task = asyncio.create_task(self._serve(message))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                else:
                    self._settle(message)
        except OSError:
            pass  # the same as the end of the stream: the other process is gone
        finally:
            self.close()

    def close(self) -> None:
        """Fail what waits and let go of the socket. Idempotent."""
        self.closed = True
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(CheckpointError("a worker process ended meanwhile"))
        self._waiting.clear()
        self._writer.close()

    async def _serve(self, message: Mapping[str, Any]) -> None:
        answer: dict[str, Any] = {"answer": message["call"]}
        try:
            answer["result"] = await self._handlers[message["method"]](**message["values"])
        except CheckpointError as error:
            answer["error"] = error.message
        except Exception as error:
            log.exception("a call between processes failed", extra={"method": message["method"]})
            answer["error"] = f"{message['method']} failed ({type(error).__name__})"
        self._send(answer)

    def _settle(self, message: Mapping[str, Any]) -> None:
        answer = self._waiting.pop(message["answer"], None)
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(CheckpointError(message["error"]))
        else:
            answer.set_result(message["result"])

    def _send(self, message: Mapping[str, Any]) -> None:
        if not self.closed:
            self._writer.write(json.dumps(message).encode() + b"\n")
