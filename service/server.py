"""uvicorn with our ending and our patience: signals drain, heads arrive in time, and responses are read."""

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import signal
import socket
import sys
import termios
from collections.abc import Coroutine
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.listening import address_error
from service.settings import Settings
from service.streaming import SLOW_READER_SECONDS

log = logging.getLogger(__name__)
HEAD_SECONDS = 10.0
# A load balancer keeps its connections for a minute. One that it uses in the moment it is closed costs a request (502).
IDLE_SECONDS = 75
BACKLOG = 2048


class PatientProtocol(H11Protocol):
    """Closes a connection whose request line and headers do not arrive in time (uvicorn waits for ever).

    The body has a time limit of its own, and silence between two requests is uvicorn's `timeout_keep_alive`.
    Drops one whose client takes nothing of a response for so long: what is left of it is in this process's memory, and
    its request holds no place any more. A stream that has not ended has a limit of its own, `service.streaming`'s.
    """

    head_seconds = HEAD_SECONDS
    slow_reader_seconds = SLOW_READER_SECONDS
    _timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None
    _left = 0  # bytes that the client had not taken when it last took some
    _taken_at = 0.0  # when that was

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """A client has sent something."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client has left."""
        self._stop()
        self._watch_reader()  # nothing is left to take: this ends it
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """What a client has not taken has become much."""
        super().pause_writing()
        self._watch_reader()

    def on_response_complete(self) -> None:
        """A response is on its way as a whole."""
        super().on_response_complete()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """Measure from now on for how long the client takes nothing."""
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None
        if self.transport.get_write_buffer_size():
            self._left, self._taken_at = untaken(self.transport), self.loop.time()
            self._check_reader_later()

    def _check_reader_later(self) -> None:
        self._reader_timer = self.loop.call_later(self.slow_reader_seconds / 10, self._check_reader)

    def _check_reader(self) -> None:
        self._reader_timer = None
        if not self.transport.get_write_buffer_size():
            return
        left, now = untaken(self.transport), self.loop.time()
        streaming = self.cycle.response_started and not self.cycle.response_complete
        if left < self._left or (streaming and not self.transport.is_closing()):
            self._left, self._taken_at = left, now
        if now - self._taken_at < self.slow_reader_seconds:
            self._check_reader_later()
            return
        log.warning("a client does not read its response, and is dropped", extra={"bytes": left})
        self.transport.abort()  # to close would be to wait for it

    def _watch(self) -> None:
        cycle = getattr(self, "cycle", None)  # None before the first request, whatever uvicorn's annotation says
        if cycle is not None and not cycle.response_complete:
            self._stop()  # a request has begun: its head is here
        elif self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self._give_up)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()


def untaken(transport: asyncio.WriteTransport) -> int:
    """Bytes written to a client that it has not taken: those in memory here, and those the kernel still has.

    The kernel takes more only when much of what it has is gone: of a slow client the first alone would stand still.
    """
    left = transport.get_write_buffer_size()
    with contextlib.suppress(OSError):  # not every kernel tells
        sent = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        left += int.from_bytes(sent, sys.byteorder)
    return left


class Server(uvicorn.Server):
    """uvicorn's server with our shutdown: running requests get a limit, the rest a clear error, the exit code is 0."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",  # `startup` runs it, which lets an error pass: uvicorn would print all of its traceback
            host=settings.host,
            port=settings.port,
            http=PatientProtocol,
            ws="none",  # where a library for them is installed, their requests would pass by key, metrics and log line
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            # Ours comes first: it answers what it cannot finish. This one is for connections that never end.
            timeout_graceful_shutdown=int(settings.drain_seconds) + 5,
            h11_max_incomplete_event_size=64 * 1024,
            backlog=BACKLOG,
        )
        super().__init__(config)
        self._app = app
        self._drain_seconds = settings.drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # a task that nobody holds may be collected
        self._lifespan = contextlib.AsyncExitStack()
        self._alone = False  # whether the process is this server's, to end with it

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop. A process of its own ends here, and waits for none of its threads.

        One may be in a step of the model that nobody waits for any more: Python cannot end beside a thread that is in
        torch, which aborts the process. Another may be loading a checkpoint, for minutes.
        """
        await super().serve(sockets)
        if self._alone:
            os._exit(0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen. Raises what the application does, and PortError."""
        self._loop = asyncio.get_running_loop()
        await self._lifespan.enter_async_context(self._app.router.lifespan_context(self._app))
        if sockets:
            # asyncio accepts this many connections at a time. One: none is taken by a worker while another is idle, and
            # where no open file is left for them, that is logged once a second, not as often as this.
            self.config.backlog = 1
        try:
            await super().startup(sockets)
        except OSError as error:  # another process that was being started at the same time was sooner
            await self._lifespan.aclose()
            raise address_error(error, self.config.host, self.config.port) from None
        for shared in sockets or ():
            shared.listen(BACKLOG)  # what the kernel queues is another matter than what asyncio takes at a time
            host, port = shared.getsockname()[:2]
            log.info("listening", extra={"host": host, "port": port})
        self.settle()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop as usual, then the application, unless nobody wants to wait for it."""
        await super().shutdown(sockets)
        if not self.force_exit:
            await self._lifespan.aclose()

    def settle(self) -> None:
        """Once it serves, in a process of its own: tidy up, listen for SIGHUP, and end the process at the end."""
        # Libraries and the model are hundreds of thousands of objects: to look through them again and again would hold
        # up every request for tenths of a second. A version that is unloaded later has no cycles, and is freed anyway.
        gc.collect()
        gc.freeze()
        self._alone = True
        signal.signal(signal.SIGHUP, lambda *_: self._call(self._follow_link))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop admitting at once; a second Ctrl-C stops without waiting. The signal is not raised again at the end.

        While the model is loaded the process ends at once: nobody is served, and a thread that loads cannot be stopped.
        """
        if not self.started:
            try:
                log.info("stopped during the start", extra={"signal": signal.Signals(sig).name})
            finally:
                os._exit(128 + sig if sig == signal.SIGINT else 0)
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        if not self.should_exit:
            self._call(self._drain)
        self.should_exit = True

    def _call(self, action: Any) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(action)

    def _follow_link(self) -> None:
        checkpoints = getattr(self._app.state, "checkpoints", None)
        if checkpoints is not None:
            self._keep(checkpoints.follow_link())

    def _drain(self) -> None:
        engine = getattr(self._app.state, "engine", None)
        if engine is not None:
            log.info("draining", extra={"requests": engine.gate.requests})
            self._keep(engine.drain(self._drain_seconds))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
