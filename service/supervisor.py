"""Several workers behind one socket: starts them, replaces those that die, changes their checkpoint, stops them.

Serves no requests and loads no model: the kernel hands each connection to a worker that accepts it.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from service.channel import Channel, Handler
from service.checkpoints import Checkpoint, Checkpoints
from service.exit_status import REFUSED, SETTINGS, refuse_start, shell_status
from service.metrics import Metrics
from service.settings import Settings
from service.shared_metrics import VARIABLE, clear, forget_worker, note_worker, share_metrics

log = logging.getLogger(__name__)
MAX_PAUSE_S = 30.0
# Beyond the drain: for responses to leave and for threads to end.
GRACE_S = 15.0


class RemoteReplica:
    """The `Replica` in a worker process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def prepare(self, folder: Path | None, version: str | None) -> str:
        """Load in the worker."""
        return str(await self._channel.call("prepare", folder=folder and str(folder), version=version))

    async def commit(self, active: str, kept: Sequence[str]) -> None:
        """Switch the worker."""
        await self._channel.call("commit", active=active, kept=list(kept))

    async def discard(self) -> None:
        """Forget what the worker has prepared."""
        await self._channel.call("discard")


class Supervisor:
    """Keeps `settings.workers` processes running. `flags` is the command line they get."""

    def __init__(
        self, settings: Settings, flags: Sequence[str], listeners: Sequence[socket.socket], metrics_folder: Path
    ) -> None:
        metrics = Metrics()
        self._settings = settings
        self._flags = flags
        self._folder = metrics_folder
        self._exits = metrics.worker_exits
        self._checkpoints = Checkpoints(settings, lambda result: metrics.swaps.labels(result).inc())
        self._listeners = listeners  # each worker has them: the kernel hands a connection to one that accepts it
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Serve until a signal; the exit status: 0 unless a worker could not start or did not stop in time."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._start_task(self._checkpoints.follow_link()))
        if self._settings.watch_seconds:
            self._start_task(self._checkpoints.watch())
        host, port = self._listeners[0].getsockname()[:2]
        log.info("starting workers", extra={"workers": self._settings.workers, "host": host, "port": port})
        keepers = [asyncio.create_task(self._keep(number)) for number in range(self._settings.workers)]
        await self._stopping.wait()
        for listener in self._listeners:  # with the last worker's: a client is refused and does not wait in vain
            listener.close()
        _, late = await asyncio.wait(keepers, timeout=self._settings.drain_seconds + GRACE_S)
        if late:
            log.error("workers did not stop in time and are killed", extra={"workers": len(late)})
            self._status = self._status or 1
            self._signal(signal.SIGKILL)
        await asyncio.gather(*keepers)
        for task in self._tasks:
            task.cancel()
        return self._status

    async def _keep(self, number: int) -> None:
        """Run worker `number`, and another one in its place whenever it ends before it is told to."""
        pause = 0.0
        while not self._stopping.is_set():
            joined, status = await self._run_worker(number)
            if self._stopping.is_set():
                self._status = self._status or (shell_status(status) if joined else 0)
            elif not joined and not self._checkpoints.replicas:
                if status not in (SETTINGS, REFUSED):  # then it has said why
                    log.critical("no worker can start", extra={"worker": number, "status": status})
                self._status = shell_status(status) or 1
                self._stop(signal.SIGTERM)
            else:
                pause = 0.0 if joined else min(MAX_PAUSE_S, 2 * pause + 1)
                log.error("a worker ended and is started again", extra={"worker": number, "status": status})
                self._exits.inc()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause)

    async def _run_worker(self, number: int) -> tuple[bool, int]:
        """One process from start to end: whether it came to serve, and its exit status."""
        try:
            process, ours = await self._start_worker(number)
        except OSError as error:  # the machine or the container has no room for one more process now
            log.error("a worker cannot be started", extra={"worker": number, "reason": str(error)})
            return False, os.EX_OSERR
        note_worker(self._folder, number, process.pid)
        self._processes[number] = process
        if self._stopping.is_set():  # the signal came while the process was being made
            process.terminate()
        channel, joined = await self._serve_worker(ours, number)
        running = asyncio.create_task(channel.run())
        status = await process.wait()
        del self._processes[number]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        self._checkpoints.replicas = [r for r in self._checkpoints.replicas if r not in joined]
        forget_worker(self._folder, number)
        return bool(joined), status

    async def _start_worker(self, number: int) -> tuple[asyncio.subprocess.Process, socket.socket]:
        """A new process and our end of the connection to it. Raises OSError."""
        ours, theirs = socket.socketpair()
        listeners = [listener.fileno() for listener in self._listeners]
        command = [sys.executable, "-m", "service.worker_process", str(number), ",".join(map(str, listeners))]
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command, str(theirs.fileno()), *self._flags, pass_fds=(*listeners, theirs.fileno())
                )
            except OSError:
                ours.close()
                raise
        return process, ours

    async def _serve_worker(self, connection: socket.socket, number: int) -> tuple[Channel, list[RemoteReplica]]:
        """The channel to a worker, and a list that holds its replica once it has joined."""
        joined: list[RemoteReplica] = []
        control = self._checkpoints

        async def first_folder() -> str | None:
            folder = await control.first_folder()
            return str(folder) if folder else None

        async def join(version: str, folder: str | None) -> None:
            replica = RemoteReplica(channel)
            await control.join(replica, Checkpoint(version, Path(folder) if folder else None))
            joined.append(replica)
            log.info("a worker serves", extra={"worker": number})

        async def state() -> dict[str, Any]:
            return asdict(await control.state())

        handlers: dict[str, Handler] = {
            "first_folder": first_folder,
            "join": join,
            "load": control.load,
            "activate": control.activate,
            "roll_back": control.roll_back,
            "follow_link": control.follow_link,
            "state": state,
        }
        channel = await Channel.open(connection, handlers)
        return channel, joined

    def _stop(self, number: signal.Signals) -> None:
        """Have every worker drain. A second Ctrl-C is handed on: it ends them without waiting."""
        again = self._stopping.is_set()
        self._stopping.set()
        self._signal(signal.SIGINT if again and number == signal.SIGINT else signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _start_task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def supervise(settings: Settings, flags: Sequence[str], listeners: Sequence[socket.socket]) -> int:
    """Run several workers until told to stop; the exit status. The folder of their metrics is made and removed here."""
    given = os.environ.get(VARIABLE)
    try:
        folder = Path(given or tempfile.mkdtemp(prefix="scaledown-metrics-"))
        clear(folder)
        share_metrics(folder, "supervisor")
        supervisor = Supervisor(settings, flags, listeners, folder)
    except OSError as error:
        return refuse_start(ConfigError(f"{VARIABLE}: the metrics of the workers cannot be kept ({error})"))
    try:
        return asyncio.run(supervisor.run())
    finally:
        clear(folder)
        if not given:
            shutil.rmtree(folder, ignore_errors=True)
