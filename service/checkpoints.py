"""Changes the checkpoint under load, in one process or in several at once: all of them switch, or none does.

Two phases. Every replica loads the new checkpoint beside the old one, verifies it and warms it up; only when all have
done so does any switch. What one replica refuses changes nothing anywhere. Versions are immutable: `<folder>@<start of
the manifest's sha256>`, so a folder that was replaced is another version. Knows no HTTP, no models and no processes.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from core.errors import CheckpointError
from core.links import followed
from service.file_thread import LOOK_SECONDS, FileThread
from service.settings import SHIPPED, Settings

log = logging.getLogger(__name__)
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A version and the folder it is loaded from; None: the untrained model of the settings."""

    version: str
    folder: Path | None


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """The version that serves; those that served before and are kept, the next rollback last; one that is to serve.

    changing    what a change that is under way is about, by the name it was asked for
    """

    active: str
    kept: tuple[str, ...]
    loaded: str | None = None
    changing: str | None = None


class Replica(Protocol):
    """One process's loaded versions. `prepare` may fail; `commit` and `discard` do not, unless the process is gone."""

    async def prepare(self, folder: Path | None, version: str | None) -> str:
        """Have the folder's version in memory, verified and warm, and return its name; it must be `version` if given.

        Raises CheckpointError.
        """

    async def commit(self, active: str, kept: Sequence[str]) -> None:
        """Start new requests on `active` and unload what is neither that nor among `kept`: all that are to stay."""

    async def discard(self) -> None:
        """Forget what was prepared since the last commit."""


class CheckpointControl(Protocol):
    """What one process sees of the changes: `Checkpoints` itself, or a link to the one in another process."""

    async def first_folder(self) -> Path | None:
        """The folder that a process which starts now has to load; None: whatever the settings say."""

    async def join(self, replica: Replica, checkpoint: Checkpoint) -> None:
        """Take in a replica that has prepared `checkpoint`; when this returns, it serves the active version."""

    async def load(self, name: str) -> str:
        """Load and verify a folder under the root, to serve it later; return its version. Raises CheckpointError.

        One version is held so: another one that was loaded, and has not been activated since, makes room for it.
        """

    async def activate(self, name: str) -> str:
        """Serve a folder under the root, or a version in memory; return its version. Raises CheckpointError."""

    async def roll_back(self) -> str:
        """Serve the version that served before. Raises CheckpointError where it is not in memory."""

    async def follow_link(self) -> None:
        """Serve what the configured checkpoint path points at now; log, and keep the old one, where that fails."""

    async def state(self) -> CheckpointState:
        """Which versions there are."""


class Checkpoints:
    """Decides which version serves in every replica. Used from one event loop only.

    `count` is told how each attempt ended: "ok" or "refused".
    """

    def __init__(self, settings: Settings, count: Callable[[str], None]) -> None:
        self.replicas: list[Replica] = []
        self._settings = settings
        self._count = count
        self._active: Checkpoint | None = None
        self._kept: list[Checkpoint] = []  # served before; oldest first
        self._loaded: Checkpoint | None = None  # apart from those: what has not served is nothing to roll back to
        self._exclusive = asyncio.Lock()
        self._changing: str | None = None
        self._files = FileThread()
        self._root = checkpoint_root(settings)
        self._followed: Path | None = None  # where the configured path pointed when it was last looked at

    async def first_folder(self) -> Path | None:
        """The active version's folder, or the configured one: its link is followed now, once for all replicas."""
        if self._active is not None:
            return self._active.folder
        return await self._linked()

    async def join(self, replica: Replica, checkpoint: Checkpoint) -> None:
        """Take in a replica. One that starts during a change waits for its end, and takes part in what follows."""
        async with self._exclusive:
            if self._active is None:
                self._active, self._followed = checkpoint, checkpoint.folder
            elif checkpoint.version != self._active.version:
                await replica.prepare(self._active.folder, self._active.version)
            await replica.commit(self._active.version, self._others())
            self.replicas.append(replica)

    async def load(self, name: str) -> str:
        """Have a folder under the root in memory, to be activated later, in place of what was loaded so before."""
        async with self._change(name):
            target = await self._prepare(await self._folder(name), None)
            if target.version not in (self._version(), *self._kept_names()):
                self._loaded = target
            await self._commit()
            return target.version

    async def activate(self, name: str) -> str:
        """Serve a folder under the root, or a version that is in memory, from now on."""
        async with self._change(name):
            in_memory = (self._active, self._loaded, *self._kept)
            known = next((each for each in in_memory if each is not None and each.version == name), None)
            if known is not None:
                return await self._switch(known.folder, known.version)
            return await self._switch(await self._folder(name), None)

    async def roll_back(self) -> str:
        """Serve the version that served before."""
        async with self._change("the one before"):
            if not self._kept:
                raise CheckpointError("no earlier checkpoint is kept in memory")
            return await self._switch(self._kept[-1].folder, self._kept[-1].version)

    async def follow_link(self) -> None:
        """Serve what the configured path points at now. Nothing happens while another change is under way."""
        try:
            target = await self._linked()
        except CheckpointError as error:
            log.error("the link is not followed", extra={"reason": error.message})
            return
        if target is not None and not await self._follow(target):
            log.warning("the link is not followed: a checkpoint is being loaded; ask again when it is done")

    async def watch(self) -> None:
        """Follow the link whenever it moves. One that points at something broken is tried once, not again and again."""
        seen = True
        while True:
            await asyncio.sleep(self._settings.watch_seconds)
            try:
                target = await self._linked()
            except CheckpointError as error:
                if seen:  # once, not as often as it is looked at
                    log.error("the link cannot be watched for now", extra={"reason": error.message})
                seen = False
                continue
            seen = True
            if target is not None and target != self._followed:
                await self._follow(target)

    async def _follow(self, target: Path) -> bool:
        """Serve what the link points at; False where another change is under way, and nothing was tried."""
        if self._changing is not None or self._active is None:
            return False
        self._followed = target
        with contextlib.suppress(CheckpointError):
            async with self._change(target.name):
                await self._switch(target, None)
        return True

    async def _linked(self) -> Path | None:
        path = self._settings.checkpoint
        return path and await self._files.run(path.name, LOOK_SECONDS, followed, path)

    async def state(self) -> CheckpointState:
        """Which versions there are."""
        loaded = self._loaded.version if self._loaded else None
        return CheckpointState(self._version(), self._kept_names(), loaded, self._changing)

    @contextlib.asynccontextmanager
    async def _change(self, wanted: str) -> AsyncIterator[None]:
        """One change at a time; a replica that joins meanwhile waits. Whoever asked for it, a refusal is logged."""
        if self._changing is not None:
            raise CheckpointError(f"another change of the checkpoint is under way: {self._changing}")
        self._changing = wanted
        try:
            async with self._exclusive:
                yield
        except CheckpointError as error:
            self._count("refused")
            log.error("the new checkpoint is refused", extra={"checkpoint": wanted, "reason": error.message})
            raise
        finally:
            self._changing = None

    async def _prepare(self, folder: Path | None, version: str | None) -> Checkpoint:
        """The first phase, one replica after the other: each checks the memory that those before have left."""
        if not self.replicas:
            raise CheckpointError("no worker is up that could load a checkpoint")
        try:
            for replica in tuple(self.replicas):
                version = await replica.prepare(folder, version)
        except BaseException:
            await asyncio.gather(*(replica.discard() for replica in self.replicas), return_exceptions=True)
            raise
        assert version is not None  # there is a replica, and it has named what it loaded
        return Checkpoint(version, folder)

    async def _switch(self, folder: Path | None, version: str | None) -> str:
        """New requests start on what is prepared here; the version that served until now is kept."""
        target, before = await self._prepare(folder, version), self._active
        if before is not None and target.version != before.version:
            self._kept = [kept for kept in self._kept if kept.version != target.version]
            self._keep(before)
            if self._loaded is not None and self._loaded.version == target.version:
                self._loaded = None
            self._active = target  # from here on it is decided: a replica that dies comes back with the new version
            await self._commit()
            self._count("ok")
            log.info("checkpoint active", extra={"checkpoint": target.version, "before": before.version})
        return target.version

    async def _commit(self) -> None:
        """The second phase. It can fail only in a replica whose process is gone."""
        commits = (replica.commit(self._version(), self._others()) for replica in tuple(self.replicas))
        for outcome in await asyncio.gather(*commits, return_exceptions=True):
            if isinstance(outcome, BaseException):
                log.error("a worker did not switch and has to start again", extra={"reason": str(outcome)})

    def _keep(self, checkpoint: Checkpoint) -> None:
        self._kept.append(checkpoint)
        del self._kept[: max(0, len(self._kept) - self._settings.keep_checkpoints)]

    def _version(self) -> str:
        return self._active.version if self._active else ""

    def _kept_names(self) -> tuple[str, ...]:
        return tuple(kept.version for kept in self._kept)

    def _others(self) -> tuple[str, ...]:
        """What stays in memory beside the active version."""
        return (*self._kept_names(), *((self._loaded.version,) if self._loaded else ()))

    async def _folder(self, name: str) -> Path:
        """The folder of that name under the root; nothing outside of it can be named, not through links either."""
        if FOLDER_NAME.fullmatch(name):
            root = await self._files.run(name, LOOK_SECONDS, followed, self._root)
            folder = await self._files.run(name, LOOK_SECONDS, followed, root / name)
            if folder.is_relative_to(root):
                return folder
        raise CheckpointError(f"name: must be a folder of the checkpoint root, got {name[:128]!r}")


def checkpoint_root(settings: Settings) -> Path:
    """The folder whose checkpoints may be swapped in."""
    return settings.checkpoint_root or (settings.checkpoint or SHIPPED).absolute().parent
