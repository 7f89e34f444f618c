"""Changes the checkpoint under load: load beside the old one, verify, warm up, switch, drain, keep for rollback.

A checkpoint that fails at any step changes nothing. Versions are immutable: `<folder>@<start of the manifest's
sha256>`, so a folder that was replaced is another version. Knows no HTTP.
"""

import asyncio
import hashlib
import logging
import os
import re
from pathlib import Path

from core.errors import BaseModelError, CheckpointError, ConfigError
from core.manifest import MANIFEST, read_bounded
from core.model import Model
from service.engine import Engine, Version
from service.loading import SHIPPED, load_model, warm_up
from service.settings import Settings

log = logging.getLogger(__name__)
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# What a load needs for a moment beyond the weights themselves: file buffers, the golden example's activations.
LOADING_FACTOR = 1.2


class Checkpoints:
    """The versions in memory: the active one and those kept. Used from the event loop only."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._lock = asyncio.Lock()
        self.kept: list[Version] = []  # oldest first
        configured = settings.checkpoint or SHIPPED
        self.root = settings.checkpoint_root or configured.absolute().parent

    def available(self) -> list[str]:
        """Names of the checkpoint folders under the root."""
        if not self.root.is_dir():
            return []
        names = sorted(path.name for path in self.root.iterdir() if (path / MANIFEST).is_file())
        return [name for name in names if FOLDER_NAME.fullmatch(name)]

    async def start(self, model: Model | None) -> None:
        """Load (unless given), warm up and activate the first version."""
        loop = asyncio.get_running_loop()
        loaded = model if model is not None else await loop.run_in_executor(None, load_model, self._settings)
        await loop.run_in_executor(None, warm_up, loaded)
        self._engine.activate(self._engine.open_version(loaded))
        log.info("ready", extra={"checkpoint": loaded.name, "trained": loaded.config.trained})

    async def load(self, name: str) -> str:
        """Load and verify a folder under the root and keep it; return its version. Raises CheckpointError."""
        async with self._changing():
            version = await self._loaded(self._folder(name))
            if version is not self._engine.active and version not in self.kept:
                self._keep(version)
            return version.model.name

    async def activate(self, name: str) -> str:
        """Serve a folder under the root, or a version that is kept, from now on; return its version."""
        async with self._changing():
            kept = next((version for version in self.kept if version.model.name == name), None)
            return self._switch(kept or await self._loaded(self._folder(name)))

    async def roll_back(self) -> str:
        """Serve the version that was kept last. Raises CheckpointError where none is."""
        async with self._changing():
            if not self.kept:
                raise CheckpointError("no earlier checkpoint is kept in memory")
            return self._switch(self.kept[-1])

    async def follow_link(self) -> None:
        """Serve what the configured checkpoint path points at now; log, and keep the old one, where that fails."""
        if self._settings.checkpoint is None or self._lock.locked():
            return
        try:
            async with self._changing():
                folder = self._settings.checkpoint.resolve()
                active = self._engine.active
                if active is None or active.model.name != version_of(folder):
                    self._switch(await self._loaded(folder))
        except CheckpointError as error:
            log.error("the new checkpoint is refused", extra={"reason": error.message})

    async def watch(self) -> None:
        """Follow the link for ever. A link that points at something broken is tried once, not again and again."""
        seen = None
        while True:
            await asyncio.sleep(self._settings.watch_seconds)
            target = self._settings.checkpoint and self._settings.checkpoint.resolve()
            if target != seen:
                seen = target
                await self.follow_link()

    def _changing(self) -> asyncio.Lock:
        if self._lock.locked():
            raise CheckpointError("another change of the checkpoint is under way")
        return self._lock

    def _folder(self, name: str) -> Path:
        """The folder of that name under the root; nothing outside of it can be named, not through links either."""
        root = self.root.resolve()
        folder = (root / name).resolve()
        if not FOLDER_NAME.fullmatch(name) or not folder.is_relative_to(root):
            raise CheckpointError(f"name: must be a folder of the checkpoint root, got {name[:128]!r}")
        return folder

    async def _loaded(self, folder: Path) -> Version:
        """The version of `folder`, from memory or freshly loaded, verified and warm."""
        loop, engine = asyncio.get_running_loop(), self._engine
        try:
            name = await loop.run_in_executor(None, version_of, folder)
            for version in [*self.kept, *([engine.active] if engine.active else [])]:
                if version.model.name == name:
                    return version
            self._check_memory(folder)
            model = await loop.run_in_executor(None, load_model, self._settings, folder)
            await loop.run_in_executor(None, warm_up, model)
        except (BaseModelError, CheckpointError, ConfigError) as error:
            engine.metrics.swaps.labels("refused").inc()
            raise CheckpointError(error.message) from None
        except Exception as error:
            engine.metrics.swaps.labels("refused").inc()
            log.exception("a checkpoint could not be loaded")
            raise CheckpointError(f"{folder.name}: could not be loaded ({type(error).__name__})") from None
        return engine.open_version(model)

    def _check_memory(self, folder: Path) -> None:
        """Refuse what would not fit beside the versions in memory, before it is loaded."""
        active = self._engine.active
        needed = int(LOADING_FACTOR * max(_file_bytes(folder), model_bytes(active.model) if active else 0))
        loaded = sum(model_bytes(version.model) for version in self.kept) + (model_bytes(active.model) if active else 0)
        limit = self._settings.max_model_bytes
        free = limit - loaded if limit else _free_bytes()
        if needed > free:
            raise CheckpointError(
                f"{folder.name}: needs about {needed >> 20} MiB beside the {loaded >> 20} MiB that are loaded, "
                f"and {max(0, free) >> 20} MiB are free"
            )

    def _switch(self, version: Version) -> str:
        """New requests start on `version`; the one that served until now is kept."""
        old = self._engine.active
        if version is not old:
            self._engine.activate(version)
            self.kept = [kept for kept in self.kept if kept is not version]
            if old is not None:
                self._keep(old)
            self._engine.metrics.swaps.labels("ok").inc()
            log.info("checkpoint active", extra={"checkpoint": version.model.name, "before": old and old.model.name})
        return version.model.name

    def _keep(self, version: Version) -> None:
        self.kept.append(version)
        while len(self.kept) > self._settings.keep_checkpoints:
            self._engine.retire(self.kept.pop(0))


def version_of(folder: Path) -> str:
    """The name that `core.checkpoint.load_checkpoint` will give to what is in `folder`, without loading it."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder.name}: there is no checkpoint of this name")
    digest = hashlib.sha256(read_bounded(folder / MANIFEST)).hexdigest()
    return f"{folder.name}@{digest[:12]}"


def model_bytes(model: Model) -> int:
    """Bytes of a model's weights in memory."""
    parameters = [*model.generator.parameters(), *model.compressor.parameters()]
    return sum(parameter.nbytes for parameter in parameters)


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
