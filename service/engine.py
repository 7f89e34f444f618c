"""The event loop's side of the engine: admits requests, and switches and unloads the versions they run on.

Knows no HTTP. Lives on one event loop; the models belong to the worker's thread.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from core.errors import CheckpointError, ScaledownError
from core.model import Model
from service.admission import Gate
from service.caches.engine_caches import EngineCaches
from service.embedding_store import EmbeddingStore
from service.errors import GeneratorUnavailableError, NotReadyError, StoppingError, UnknownModelError
from service.generation.engine import GeneratorEngine
from service.generation.torch_engine import TorchEngine
from service.generation.vllm_engine import VllmEngine
from service.generation.vllm_server import VllmServer
from service.jobs import Failed, Outbox
from service.lane import Lane
from service.limits import AnyRequest, check_limits, estimated_tokens
from service.metrics import Metrics
from service.schemas import AnswerRequest
from service.session import Session
from service.settings import Settings
from service.worker import Worker

log = logging.getLogger(__name__)
WATCH_SECONDS = 2.0
REFUSED_SECONDS = 30.0  # until a version that is only held, and whose weights the generator lacks, is tried again
CHECKPOINT_HEADER = "X-Checkpoint"  # of a request that wants another version than the active one


@dataclass(eq=False)
class Version:
    """A loaded checkpoint. `sessions` counts requests that began with it and keep it in memory.

    refused_until   when its generator may be asked again, on the monotonic clock; the active version's always is
    """

    lane: Lane
    sessions: int = 0
    retired: bool = False
    refused_until: float = 0.0

    @property
    def model(self) -> Model:
        """The model itself; only the worker's thread runs it."""
        return self.lane.model


class Engine:
    """Serves requests on the active version. `ready` is true once a version is warm."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.gate = Gate(settings.max_requests, settings.max_tokens_in_flight)
        self.store = EmbeddingStore(settings.store_bytes, metrics)
        self.caches = EngineCaches(settings, metrics)
        self.pool = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenizer")
        self.worker = Worker(Outbox(asyncio.get_running_loop()), settings.batch_wait_ms / 1000)
        self.outbox = self.worker.outbox
        self.sessions: set[Session] = set()
        self.server = VllmServer(settings, metrics) if settings.generator_url else None
        self.active: Version | None = None
        self.offered: Mapping[str, Version] = {}  # what a request may name: the active version and others kept
        self.refusal: ScaledownError | None = None  # why nothing is admitted, while draining or dead
        self.worker.start()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.active is not None and self.refusal is None

    def open_version(self, model: Model) -> Version:
        """Give a model a lane of its own; it serves nobody until it is activated."""
        generator: GeneratorEngine = (
            TorchEngine(model, self.settings, self.metrics)
            if self.server is None
            else VllmEngine(model, self.server, self.outbox)
        )
        model = self.caches.attach(model)
        version = Version(Lane(model, self.settings, self.metrics, generator, self.caches.shared_rows()))
        self.worker.open(version.lane)
        return version

    def activate(self, version: Version) -> None:
        """From now on new requests start on `version`; those in flight stay on theirs."""
        if self.active is not None:
            self.metrics.checkpoint.labels(self.active.model.name).set(0)
        self.active = version
        self.metrics.checkpoint.labels(version.model.name).set(1)

    def find(self, name: str) -> Version:
        """A version in memory, by its full name. Raises UnknownModelError: no request makes the service load one."""
        if name not in self.offered:
            raise UnknownModelError(CHECKPOINT_HEADER, "names no version in memory; POST /admin/checkpoints loads one")
        return self.offered[name]

    def retire(self, version: Version) -> None:
        """Unload `version` as soon as its last request is done."""
        version.retired = True
        self.unload_if_idle(version)

    def unload_if_idle(self, version: Version) -> None:
        """Let go of a version that was retired and that no request is left of."""
        if version.retired and version.sessions == 0:
            name = version.model.name
            if self.active is None or self.active.model.name != name:  # it may have been loaded again meanwhile
                self.metrics.forget(name)
            self.worker.close(version.lane)

    async def open(self, body: AnyRequest, version: Version | None = None) -> Session:
        """Admit, tokenise and queue a request. The caller must close the session. Raises ScaledownError."""
        if self.refusal is not None:
            raise self.refusal
        version = version or self.active
        if version is None:
            raise NotReadyError("the model is still being loaded")
        if isinstance(body, AnswerRequest) and (trouble := version.lane.generator.trouble):
            raise GeneratorUnavailableError(trouble)
        check_limits(body, self.settings)
        answer_tokens = body.max_new_tokens if isinstance(body, AnswerRequest) else 0
        reservation = self.gate.reserve(estimated_tokens(body.query, body.passages) + answer_tokens)
        session = Session(self, version, reservation, body.timeout or self.settings.timeout_seconds)
        try:
            await session.start(body)
        except BaseException:
            session.close()
            raise
        return session

    def leave(self, session: Session) -> None:
        """Called by `Session.close`."""
        self.sessions.discard(session)
        session.version.sessions -= 1
        self.unload_if_idle(session.version)

    def refuse(self, reason: ScaledownError) -> None:
        """Admit nothing from now on."""
        self.refusal = reason

    def fail_all(self, reason: ScaledownError) -> None:
        """End every open request with `reason`."""
        for session in list(self.sessions):
            session.queue.put_nowait(Failed(reason))

    async def drain(self, seconds: float) -> None:
        """Admit nothing, wait up to `seconds` for what runs, then end the rest with a clear error."""
        self.refuse(StoppingError("the service is shutting down"))
        end = time.monotonic() + seconds
        while self.sessions and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.fail_all(StoppingError("the service is shutting down and could not finish this request in time"))

    async def watch_generator(self) -> None:
        """See for ever whether answers can be written; the generators' `trouble` says what was found.

        The active version is always looked at. Others that a request may name are while they are in trouble, apart from
        it: one that takes long must not hide that the active one is away.
        """
        await asyncio.gather(self._watch_active(), self._watch_held())

    async def _watch_active(self) -> None:
        while True:
            if self.active is not None:
                await self._look(self.active)
            await asyncio.sleep(WATCH_SECONDS)

    async def _watch_held(self) -> None:
        while True:
            for version in [each for each in self.offered.values() if each is not self.active]:
                if version.lane.generator.trouble and time.monotonic() >= version.refused_until:
                    await self._look(version)
            await asyncio.sleep(WATCH_SECONDS)

    async def _look(self, version: Version) -> None:
        try:
            await version.lane.generator.verify()
        except CheckpointError:
            version.refused_until = time.monotonic() + REFUSED_SECONDS
        except ScaledownError:  # `trouble` says it
            return
        except Exception:  # such as no memory for the golden example: who looks no more never sees it come back
            log.exception("the generator could not be looked at")

    async def stop(self) -> None:
        """Let go of the threads and connections."""
        if self.server is not None:
            await self.server.aclose()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.caches.close()
        self.worker.stop(timeout=5)
