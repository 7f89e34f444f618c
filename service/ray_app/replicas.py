"""The two kinds of model replica. Each is an `Engine`, with its worker's thread and a lane a version. Knows no HTTP."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve

from core.compressed import CompressedChunk
from core.errors import CheckpointError, EngineError
from core.links import followed
from core.model import Model
from core.passages import Passage
from core.pipeline import PreparedRequest
from core.prompts import Prompt
from core.rows import ChunkRow
from service.checkpoints import checkpoint_root
from service.engine import Engine, Version
from service.health import worker_trouble
from service.jobs import AnswerPlan, Delta, Failed, Finished, Job, JobEvent
from service.loading import configured_folder
from service.logs import configure_logging
from service.metrics import Metrics
from service.ray_app.fleet import Written
from service.ray_app.settings import RaySettings
from service.settings import Settings
from service.versions import Versions, version_of
from service.weights import keep_compressor, keep_generator

log = logging.getLogger(__name__)
UNTRAINED = "untrained"


class PartEngine(Engine):
    """An engine that lets go of the weights that `part` does not keep."""

    def __init__(self, part: Callable[[Model], None], settings: Settings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._part = part

    def open_version(self, model: Model) -> Version:
        """Give what is left of a model a lane."""
        self._part(model)
        return super().open_version(model)


class Held:
    """A version as `serve.multiplexed` holds it, which calls `__del__`, in a thread, when another takes its place."""

    def __init__(self, version: Version, unload: Callable[[], object]) -> None:
        self.version = version
        self._unload: Callable[[], object] | None = unload

    def __del__(self) -> None:
        unload, self._unload = self._unload, None
        if unload is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and all with it
                unload()


class ModelReplica:
    """The last versions that this process was asked for: the active one, those kept, and one more."""

    def __init__(self, settings: RaySettings, part: Callable[[Model], None]) -> None:
        configure_logging(settings.log_level)
        self._settings = settings
        self._engine = PartEngine(part, settings, Metrics())
        self._versions = Versions(self._engine, settings)
        loop = asyncio.get_running_loop()

        async def load(version: str) -> Held:
            await self._versions.prepare(folder_of(settings, version), version)
            unload = self._versions.drop
            return Held(self._versions.find(version), lambda: loop.call_soon_threadsafe(unload, version))

        self._held: Any = serve.multiplexed(max_num_models_per_replica=settings.keep_checkpoints + 2)(load)

    async def start(self) -> None:
        """Load what the settings name. Where that is broken by now, the ingress says what to load instead."""
        try:
            folder = configured_folder(self._settings)
            await self.prepare(version_of(folder) if folder else UNTRAINED)
        except CheckpointError as error:
            log.error("the configured checkpoint is refused", extra={"reason": error.message})

    async def prepare(self, version: str) -> None:
        """Have a version in memory, verified and warm. Raises CheckpointError."""
        await self._held(version)

    def check_health(self) -> None:
        """Ray asks from time to time, and replaces a replica that raises EngineError here."""
        if trouble := worker_trouble(self._engine):
            raise EngineError(trouble)

    @contextlib.contextmanager
    def _in_use(self, version: Version) -> Iterator[None]:
        """Keep a version in memory, though others may take its place."""
        version.sessions += 1
        try:
            yield
        finally:
            version.sessions -= 1
            self._engine.unload_if_idle(version)

    def _job(self, request_id: str | None, rows: Sequence[ChunkRow]) -> tuple[Job, "asyncio.Queue[JobEvent]"]:
        """A job of these rows alone, and the queue of its events."""
        queue: asyncio.Queue[JobEvent] = asyncio.Queue()
        passages = 1 + max((row.chunk.passage for row in rows), default=-1)
        # Only how the chunks belong to passages matters here: the texts have stayed with the ingress.
        request = PreparedRequest("", (Passage(""),) * passages, [], tuple(row.chunk for row in rows))
        job = Job(
            request_id=request_id,
            request=request,
            rows=list(rows),
            places=list(range(len(rows))),
            results=[None] * len(rows),
            plan=None,
            emit=lambda event: self._engine.outbox.put(queue, event),
        )
        return job, queue

    async def _events(
        self, version: Version, job: Job, queue: "asyncio.Queue[JobEvent]"
    ) -> AsyncGenerator[JobEvent, None]:
        """A job's events to its end. Stops it where they are not waited for. Raises what it failed with."""
        try:
            while True:
                event = await queue.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            if not job.done:
                self._engine.worker.cancel(version.lane, job)


class CompressorReplica(ModelReplica):
    """Compresses rows of all requests that reach it, batched as `service.batching` has it."""

    async def __init__(self, settings: RaySettings) -> None:  # type: ignore[misc]  # Ray awaits it
        super().__init__(settings, keep_compressor)
        await self.start()

    async def compress(self, version: str, rows: Sequence[ChunkRow], request_id: str | None) -> list[CompressedChunk]:
        """What becomes of `rows`, in their order, on the CPU. Raises ScaledownError."""
        held: Version = (await self._held(version)).version
        with self._in_use(held):
            pool, fetch = self._engine.pool, self._engine.caches.fetch
            await asyncio.get_running_loop().run_in_executor(pool, fetch, held.model, rows)
            job, queue = self._job(request_id, rows)
            self._engine.worker.add(held.lane, job)
            async with contextlib.aclosing(self._events(held, job, queue)) as events:
                async for _ in events:
                    pass
        return [_on_cpu(chunk) for chunk in job.results if chunk is not None]


class GeneratorReplica(ModelReplica):
    """Writes the answers of all requests that reach it, in one decode batch a version."""

    async def __init__(self, settings: RaySettings) -> None:  # type: ignore[misc]  # Ray awaits it
        super().__init__(settings, keep_generator)
        await self.start()

    async def write(
        self, version: str, prompt: Prompt, plan: AnswerPlan, request_id: str | None
    ) -> AsyncGenerator[Delta | Written, None]:
        """An answer: its pieces if `plan` asks for them, then its end. Raises ScaledownError."""
        held: Version = (await self._held(version)).version
        with self._in_use(held):
            job, queue = self._job(request_id, ())
            generator = held.lane.generator
            self._engine.worker.call(lambda: generator.add(job, plan, prompt))
            async with contextlib.aclosing(self._events(held, job, queue)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        yield event
                    elif isinstance(event, Finished):
                        yield Written(event, job.marks["decode"] - job.marks["first_token"])


def folder_of(settings: Settings, version: str) -> Path | None:
    """The folder that holds `version`: the configured one, or one beside it; None for the untrained model.

    Raises CheckpointError where neither is there. Whether it still holds that version is seen when it is loaded.
    """
    if version == UNTRAINED:
        return None
    name = version.partition("@")[0]
    configured = configured_folder(settings)
    beside = [configured] if configured else []
    for folder in (*beside, followed(checkpoint_root(settings) / name)):
        if folder.name == name and folder.is_dir():
            return folder
    raise CheckpointError(f"{name}: there is no checkpoint of this name")


def _on_cpu(chunk: CompressedChunk) -> CompressedChunk:
    weights = None if chunk.weights is None else chunk.weights.cpu()
    return replace(chunk, memory=chunk.memory.cpu(), weights=weights)
