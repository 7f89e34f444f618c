"""One of several worker processes: a whole service whose socket and whose checkpoint come from its supervisor.

Started by `service.supervisor`, never by hand.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.channel import Channel, Handler
from service.checkpoints import Checkpoint, CheckpointState, Replica
from service.logs import configure_logging
from service.shared_metrics import VARIABLE, share_metrics


class SupervisedCheckpoints:
    """The `CheckpointControl` of a worker: the supervisor is asked, and changes all workers or none."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._channel: Channel | None = None
        self._replica: Replica | None = None
        self._reading: asyncio.Task[None] | None = None

    async def first_folder(self) -> Path | None:
        """The folder that this process has to load."""
        handlers: dict[str, Handler] = {"prepare": self._prepare, "commit": self._commit, "discard": self._discard}
        self._channel = await Channel.open(self._connection, handlers)
        self._reading = asyncio.create_task(self._read(self._channel))
        folder = await self._channel.call("first_folder")
        return Path(folder) if folder else None

    async def join(self, replica: Replica, checkpoint: Checkpoint) -> None:
        """Take part from now on. When this returns, `replica` serves what all others serve."""
        self._replica = replica
        folder = str(checkpoint.folder) if checkpoint.folder else None
        await self._call("join", version=checkpoint.version, folder=folder)

    async def load(self, name: str) -> str:
        """Load a folder in every worker."""
        return str(await self._call("load", name=name))

    async def activate(self, name: str) -> str:
        """Serve a folder, or a version in memory, in every worker."""
        return str(await self._call("activate", name=name))

    async def roll_back(self) -> str:
        """Serve what was served before, in every worker."""
        return str(await self._call("roll_back"))

    async def follow_link(self) -> None:
        """Serve what the configured path points at now, in every worker."""
        await self._call("follow_link")

    async def state(self) -> CheckpointState:
        """Which versions there are."""
        state = await self._call("state")
        return CheckpointState(**{**state, "kept": tuple(state["kept"])})

    async def _call(self, method: str, **values: Any) -> Any:
        assert self._channel is not None  # first_folder comes first
        return await self._channel.call(method, **values)

    async def _read(self, channel: Channel) -> None:
        await channel.run()
        # Without its supervisor a worker could neither be told to stop nor take part in a change.
        os.kill(os.getpid(), signal.SIGTERM)

    async def _prepare(self, folder: str | None, version: str | None) -> str:
        return await self._own().prepare(Path(folder) if folder else None, version)

    async def _commit(self, active: str, kept: Sequence[str]) -> None:
        await self._own().commit(active, kept)

    async def _discard(self) -> None:
        await self._own().discard()

    def _own(self) -> Replica:
        assert self._replica is not None  # the supervisor speaks to a worker only after it has joined
        return self._replica


def main(arguments: Sequence[str]) -> int:
    """Serve until told to stop. `arguments`: number of the worker, its sockets' descriptors, the service's flags."""
    from service.__main__ import read_settings, serve

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the supervisor's; a terminal that closes sends it to everybody
    number, listeners, connection, *flags = arguments
    share_metrics(Path(os.environ[VARIABLE]), number)  # before anything that makes metrics is imported
    settings = read_settings(flags)
    configure_logging(settings.log_level, worker=int(number))
    import torch

    share = max(1, (settings.threads or torch.get_num_threads()) // settings.workers)
    settings = settings.model_copy(update={"threads": share})
    control = SupervisedCheckpoints(socket.socket(fileno=int(connection)))
    return serve(settings, [socket.socket(fileno=int(each)) for each in listeners.split(",")], control)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
