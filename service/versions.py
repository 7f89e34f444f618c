"""The checkpoint versions in this process's memory: loaded, verified, warmed up, served, unloaded.

Does not decide which one serves: `service.checkpoints` does, for this process and others like it. Knows no HTTP.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from core.checkpoint import COMPRESSOR, MERGED
from core.errors import BaseModelError, CheckpointError, ConfigError
from core.manifest import MANIFEST, read_version
from core.model import Model
from core.tensor_files import read_header
from service.checkpoints import FOLDER_NAME, Checkpoint
from service.engine import Engine, Version
from service.errors import GeneratorUnavailableError
from service.file_thread import FileThread
from service.free_memory import free_bytes
from service.loading import compute_dtype, configured_folder, load_to_serve, warm_up
from service.settings import Settings

log = logging.getLogger(__name__)
# What a load needs for a moment beyond the weights themselves: file buffers, the golden example's activations.
LOADING_FACTOR = 1.2


class Versions:
    """A `Replica`: what this process has loaded. Used from the event loop only."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._loaded: dict[str, Version] = {}
        self._wanted: tuple[str, ...] = ()
        self._files = FileThread()

    async def start(self, model: Model | None, folder: Path | None) -> Checkpoint:
        """Load (unless given) and warm up the first version. Raises what the load raises, and CheckpointError.

        `max_model_bytes` bounds it too, and only that: what is free now, unlike at a swap, is all for this version.
        """
        if model is None:
            folder = folder or configured_folder(self._settings)
            if folder is not None and (limit := self._settings.max_model_bytes):
                self._check_room(folder.name, least_bytes(self._settings, folder), limit)
            model = await self._read(folder, None)
        else:
            await asyncio.get_running_loop().run_in_executor(None, warm_up, model)
        self._add(model)
        with contextlib.suppress(GeneratorUnavailableError):  # /readyz says so until it is there
            await self._loaded[model.name].lane.generator.verify()
        if folder is not None and (limit := self._settings.max_model_bytes):
            self._check_room(folder.name, model_bytes(model), limit)  # the base model is counted only here
        return Checkpoint(model.name, folder)

    async def prepare(self, folder: Path | None, version: str | None) -> str:
        """The version of `folder`, from memory or freshly loaded, verified and warm. Raises CheckpointError."""
        label = folder.name if folder else "the untrained model"
        try:
            if version is None or version not in self._loaded:
                version = await self._load(folder, version, label)
            await self._loaded[version].lane.generator.verify()
            return version
        except (BaseModelError, CheckpointError, ConfigError, GeneratorUnavailableError) as error:
            raise CheckpointError(error.message) from None
        except Exception as error:
            log.exception("a checkpoint could not be loaded")
            raise CheckpointError(f"{label}: could not be loaded ({type(error).__name__})") from None

    async def commit(self, active: str, kept: Sequence[str]) -> None:
        """New requests start on `active`; what is neither that nor kept is unloaded after its last request."""
        self._engine.activate(self._loaded[active])
        self._wanted = (active, *kept)
        self._engine.offered = {name: self._loaded[name] for name in self._wanted if name in self._loaded}
        await self.discard()

    async def discard(self) -> None:
        """Unload what nobody wants."""
        for name in [name for name in self._loaded if name not in self._wanted]:
            self.drop(name)

    def find(self, name: str) -> Version:
        """A version that was prepared."""
        return self._loaded[name]

    def drop(self, name: str) -> None:
        """Unload a version after its last request."""
        self._engine.retire(self._loaded.pop(name))
        self._measure()

    async def _load(self, folder: Path | None, version: str | None, label: str) -> str:
        seconds = self._settings.load_seconds
        if folder is not None:
            name, size = await self._files.run(label, seconds, _version_and_bytes, folder)
            if version is not None and name != version:
                raise CheckpointError(f"{label}: has changed on disk: it is {name} now and was {version}")
            if name in self._loaded:
                return name
            self._check_memory(label, size)
        model = await self._read(folder, seconds)
        if version is not None and model.name != version:
            raise CheckpointError(f"{label}: is {model.name} now and was {version}")
        self._add(model)
        return model.name

    async def _read(self, folder: Path | None, seconds: float | None) -> Model:
        """Load, verify and warm up. A large model takes minutes: the log says what it is that takes them."""
        name = folder.name if folder else "untrained"
        log.info("loading a checkpoint", extra={"checkpoint": name})
        model = await self._files.run(name, seconds, load_to_serve, self._settings, folder)
        format_and_place = {"dtype": model.number_format, "device": str(model.device)}
        log.info("a checkpoint is loaded", extra={"checkpoint": model.name, **format_and_place})
        return model

    def _add(self, model: Model) -> None:
        """Take a model in; whether what writes its answers has its weights is not known yet."""
        self._loaded[model.name] = self._engine.open_version(model)
        self._engine.metrics.checkpoint.labels(model.name).set(0)
        self._measure()

    def _measure(self) -> None:
        self._engine.metrics.model_bytes.set(sum(model_bytes(version.model) for version in self._loaded.values()))

    def _check_memory(self, name: str, file_bytes: int) -> None:
        """Refuse what would not fit beside the versions in memory, before it is loaded."""
        sizes = [model_bytes(version.model) for version in self._loaded.values()]
        needed = int(LOADING_FACTOR * max([file_bytes, *sizes]))
        limit = self._settings.max_model_bytes
        self._check_room(name, needed, limit - sum(sizes) if limit else free_bytes(), sum(sizes))

    def _check_room(self, name: str, needed: int, free: int, loaded: int = 0) -> None:
        if needed > free:
            raise CheckpointError(
                f"{name}: needs about {needed >> 20} MiB beside the {loaded >> 20} MiB that are loaded, "
                f"and {max(0, free) >> 20} MiB are free: see max_model_bytes"
            )


def version_of(folder: Path) -> str:
    """The name that `core.checkpoint.load_checkpoint` will give to what is in `folder`, without loading it."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder.name}: there is no checkpoint of this name")
    return read_version(folder)


def available_under(root: Path) -> list[str]:
    """Names of the checkpoint folders under `root`."""
    if not root.is_dir():
        return []
    names = sorted(path.name for path in root.iterdir() if (path / MANIFEST).is_file())
    return [name for name in names if FOLDER_NAME.fullmatch(name)]


def model_bytes(model: Model) -> int:
    """Bytes of a model's weights in memory."""
    parameters = [*model.generator.parameters(), *model.compressor.parameters()]
    return sum(parameter.nbytes for parameter in parameters)


def least_bytes(settings: Settings, folder: Path) -> int:
    """What the weights in `folder` will take at least, by the headers of their files. Raises CheckpointError."""
    kept = [COMPRESSOR] if settings.generator_url else [COMPRESSOR, f"{MERGED}/model.safetensors"]
    headers = [read_header(folder / name) for name in kept if (folder / name).is_file()]
    size = 1 if settings.quantize is not None else compute_dtype(settings, folder).itemsize
    return size * sum(shape.numel() for header in headers for shape, _ in header.values())


def _version_and_bytes(folder: Path) -> tuple[str, int]:
    return version_of(folder), sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
