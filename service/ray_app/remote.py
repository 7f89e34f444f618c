"""The ingress's engine: it holds no weights, and has replicas do what models do. Knows no HTTP.

As with a vLLM server, the worker's thread only prepares; calls are made and awaited on the event loop.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial

from core.compressed import CompressedChunk
from core.model import Model
from core.prompts import Prompt
from service.caches.embeddings import Place, SharedRows
from service.engine import Engine, Version
from service.errors import GeneratorUnavailableError
from service.failures import shown
from service.generation.engine import GeneratorEngine
from service.generation.vllm_engine import NEVER, VllmEngine
from service.generation.vllm_server import VllmServer
from service.jobs import AnswerPlan, Delta, Failed, Job, Outbox
from service.lane import Lane
from service.metrics import Metrics
from service.ray_app.fleet import Fleet
from service.settings import Settings
from service.weights import forget_weights
from service.worker import Worker

Call = Callable[[], Coroutine[None, None, None]]


class Calls:
    """The calls that are out for each job. The worker's thread begins and cancels them, the event loop makes them."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._tasks: dict[Job, set[asyncio.Task[None]]] = {}  # the event loop's

    def begin(self, job: Job, call: Call) -> None:
        """Make a call, unless the job is done by then. Worker's thread only."""
        self.worker.outbox.call(partial(self._begin, job, call))

    def cancel(self, job: Job) -> None:
        """Cancel the calls of a job. Worker's thread only."""
        self.worker.outbox.call(partial(self._cancel, job))

    def _begin(self, job: Job, call: Call) -> None:
        if job.done:
            return
        task = asyncio.get_running_loop().create_task(call())
        tasks = self._tasks.setdefault(job, set())
        tasks.add(task)
        task.add_done_callback(partial(self._ended, job))

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        self._tasks[job].discard(task)
        if not self._tasks[job]:
            del self._tasks[job]

    def _cancel(self, job: Job) -> None:
        for task in self._tasks.get(job, ()):
            task.cancel()


class RemoteLane(Lane):
    """A lane whose rows are compressed by replicas, which batch them with those of other requests."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        metrics: Metrics,
        generator: GeneratorEngine,
        shared: SharedRows,
        fleet: Fleet,
        calls: Calls,
    ) -> None:
        super().__init__(model, settings, metrics, generator, shared)
        self._fleet = fleet
        self._calls = calls

    @property
    def jobs(self) -> int:
        """None: the worker's thread has nothing to do while replicas work."""
        return 0

    def cancel(self, job: Job) -> None:
        """Stop work on a job, here and in the replicas."""
        super().cancel(job)
        self._calls.cancel(job)

    def _queue(self, places: Sequence[Place]) -> None:
        for job in dict.fromkeys(place.job for place in places):
            job.mark("queue")
            own = [place for place in places if place.job is job]
            self._calls.begin(job, partial(self._compress_remotely, job, own))

    async def _compress_remotely(self, job: Job, places: Sequence[Place]) -> None:
        try:
            rows = [place.row for place in places]
            chunks = await self._fleet.compress(self.model.name, rows, job.request_id)
        except Exception as error:
            self._calls.worker.call(partial(self._fail, job, shown(error, job)))
        else:
            self._calls.worker.call(partial(self._arrived, places, chunks))

    def _arrived(self, places: Sequence[Place], chunks: Sequence[CompressedChunk]) -> None:
        for place, chunk in zip(places, chunks, strict=True):
            if not place.job.done:  # its caller may have left meanwhile, and others who waited have asked again
                self._computed(place.job, place.index, place.row, chunk)


class RemoteGenerator:
    """A `GeneratorEngine` for one version: generator replicas write its answers."""

    jobs = 0

    def __init__(self, version: str, fleet: Fleet, calls: Calls) -> None:
        self.trouble: str | None = None
        self._version = version
        self._fleet = fleet
        self._calls = calls

    def add(self, job: Job, plan: AnswerPlan, prompt: Prompt) -> None:
        """Send a prompt to a replica."""
        self._calls.begin(job, partial(self._write, job, plan, prompt))

    def cancel(self, job: Job) -> None:
        """Stop the replica that writes."""
        self._calls.cancel(job)

    def advance(self) -> None:
        """Nothing is written in this process."""

    async def verify(self) -> None:
        """Have all replicas of both kinds load this version, those too that were started since.

        Raises GeneratorUnavailableError and CheckpointError.
        """
        try:
            await self._fleet.prepare(self._version)
            self.trouble = None
        except GeneratorUnavailableError as error:
            self.trouble = error.message
            raise

    async def _write(self, job: Job, plan: AnswerPlan, prompt: Prompt) -> None:
        try:
            async for event in self._fleet.write(self._version, prompt, plan, job.request_id):
                if isinstance(event, Delta):
                    job.mark("first_token")
                    job.completion_tokens += 1  # at least: the end says how many there were
                    job.emit(event)
                else:
                    job.marks.setdefault("first_token", time.perf_counter() - event.decode_s)
                    job.mark("decode")
                    job.completion_tokens = event.finished.completion_tokens
                    job.end(event.finished)
        except Exception as error:
            job.end(Failed(shown(error, job)))


class PreparedVllmEngine(VllmEngine):
    """A `VllmEngine` that is not ready before the compressor replicas are."""

    def __init__(self, fleet: Fleet, model: Model, server: VllmServer, outbox: Outbox) -> None:
        super().__init__(model, server, outbox)
        self._fleet = fleet

    async def verify(self) -> None:
        """See that all compressor replicas have this version, and the server its weights.

        Raises GeneratorUnavailableError and CheckpointError.
        """
        try:
            await self._fleet.prepare(self._model.name)
        except GeneratorUnavailableError as error:
            self._trouble, self._verified_after = error.message, NEVER
            raise
        await super().verify()


class RemoteEngine(Engine):
    """An engine whose models run in the replicas of `fleet`."""

    def __init__(self, fleet: Fleet, settings: Settings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._fleet = fleet
        self._calls = Calls(self.worker)

    def open_version(self, model: Model) -> Version:
        """Give a model a lane that needs no weights; only for a vLLM server are they kept, to embed its text."""
        generator: GeneratorEngine
        if self.server is None:
            forget_weights(model.compressor)
            forget_weights(model.generator)
            generator = RemoteGenerator(model.name, self._fleet, self._calls)
        else:
            generator = PreparedVllmEngine(self._fleet, model, self.server, self.outbox)
        shared = self.caches.shared_rows()
        lane = RemoteLane(model, self.settings, self.metrics, generator, shared, self._fleet, self._calls)
        self.worker.open(lane)
        return Version(lane)
