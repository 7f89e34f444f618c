"""The event loop's side of the engine: admits requests, prepares them off the loop, carries events to their callers.

Knows no HTTP. Lives on one event loop; the models belong to the worker's thread.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from core.errors import EngineError, ScaledownError
from core.model import Model
from core.policy import Policy
from core.sampling import GenerationOptions
from service.admission import Gate, Reservation
from service.embedding_store import EmbeddingStore
from service.errors import DeadlineError, GeneratorUnavailableError, NotReadyError, StoppingError
from service.generation.engine import GeneratorEngine
from service.generation.torch_engine import TorchEngine
from service.generation.vllm_engine import VllmEngine
from service.generation.vllm_server import VllmServer
from service.jobs import AnswerPlan, Compressed, Failed, Finished, Job, JobEvent, Outbox
from service.lane import Lane
from service.limits import AnyRequest, check_limits, check_prompt, check_tokens, estimated_tokens
from service.logs import current_request_id
from service.metrics import STAGES, Metrics
from service.preparation import Prepared, prepare_request
from service.schemas import AnswerRequest, CompressRequest
from service.settings import Settings
from service.worker import Worker

WATCH_SECONDS = 2.0


@dataclass(eq=False)
class Version:
    """A loaded checkpoint. `sessions` counts requests that began with it and keep it in memory."""

    lane: Lane
    sessions: int = 0
    retired: bool = False

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
        self.pool = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenizer")
        self.worker = Worker(Outbox(asyncio.get_running_loop()), settings.batch_wait_ms / 1000)
        self.outbox = self.worker.outbox
        self.sessions: set[Session] = set()
        self.server = VllmServer(settings, metrics) if settings.generator_url else None
        self.active: Version | None = None
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
            else VllmEngine(model, self.server, self.outbox, self.metrics)
        )
        version = Version(Lane(model, self.settings, self.metrics, generator))
        self.worker.open(version.lane)
        return version

    def activate(self, version: Version) -> None:
        """From now on new requests start on `version`; those in flight stay on theirs."""
        if self.active is not None:
            self.metrics.checkpoint.labels(self.active.model.name).set(0)
        self.active = version
        self.metrics.checkpoint.labels(version.model.name).set(1)

    def retire(self, version: Version) -> None:
        """Unload `version` as soon as its last request is done."""
        version.retired = True
        self._unload_if_idle(version)

    def _unload_if_idle(self, version: Version) -> None:
        if version.retired and version.sessions == 0:
            name = version.model.name
            if self.active is None or self.active.model.name != name:  # it may have been loaded again meanwhile
                self.metrics.forget(name)
            self.worker.close(version.lane)

    async def open(self, body: AnyRequest, version: Version | None = None) -> "Session":
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

    def leave(self, session: "Session") -> None:
        """Called by `Session.close`."""
        self.sessions.discard(session)
        session.version.sessions -= 1
        self._unload_if_idle(session.version)

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
        """See for ever whether the active version's answers can be written; `trouble` there says what was found."""
        while True:
            if self.active is not None:
                with contextlib.suppress(ScaledownError):
                    await self.active.lane.generator.verify()
            await asyncio.sleep(WATCH_SECONDS)

    async def stop(self) -> None:
        """Let go of the threads and connections."""
        if self.server is not None:
            await self.server.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.worker.stop(timeout=5)


class Session:
    """One admitted request: its place, its version, its job. Use it in a `with` so that all three are given back."""

    def __init__(self, engine: Engine, version: Version, reservation: Reservation, timeout: float) -> None:
        self.engine = engine
        self.version = version
        self.queue: asyncio.Queue[JobEvent] = asyncio.Queue()
        self.prepared: Prepared | None = None
        self.text_tokens = 0
        self.explain = False
        self._reservation = reservation
        self._timeout = timeout
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._began = time.perf_counter()
        self._queued = self._began
        self._job: Job | None = None
        self._closed = False
        version.sessions += 1
        engine.sessions.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def start(self, body: AnyRequest) -> None:
        """Tokenise in the pool, correct the reservation, hand the job to the worker."""
        async with self._until_deadline():
            await asyncio.get_running_loop().run_in_executor(self.engine.pool, self._prepare, body)
        prepared = self.prepared
        assert prepared is not None  # _prepare set it
        plan = answer_plan(body) if isinstance(body, AnswerRequest) else None
        answer_tokens = plan.options.max_new_tokens if plan else 0
        self._reservation.correct(prepared.passage_tokens + answer_tokens)
        outbox, queue = self.engine.outbox, self.queue
        self._queued = time.perf_counter()
        self._job = Job(
            request_id=current_request_id(),
            request=prepared.request,
            rows=prepared.rows,
            places=prepared.places,
            results=prepared.results,
            plan=plan,
            emit=lambda event: outbox.put(queue, event),
        )
        self.engine.worker.add(self.version.lane, self._job)

    def _prepare(self, body: AnyRequest) -> None:
        model = self.version.model
        rate = body.rate if isinstance(body, AnswerRequest | CompressRequest) else None
        policy, answer_tokens = Policy(), 0
        if isinstance(body, AnswerRequest):
            policy, answer_tokens, self.explain = body.policy, body.max_new_tokens, body.explain
        store = self.engine.store
        self.prepared = prepare_request(model, body.query, body.passages, rate, store, policy, answer_tokens)
        check_tokens(self.prepared.passage_tokens, self.engine.settings)
        if isinstance(body, AnswerRequest):
            self.text_tokens = self.prepared.text_prompt_tokens(model)
            if policy.mode == "text" and policy.max_prompt_tokens is None and not policy.min_relevance:
                check_prompt(self.text_tokens, body.max_new_tokens, model)

    async def next_event(self) -> JobEvent:
        """The job's next event. Raises what the job failed with, and DeadlineError."""
        async with self._until_deadline():
            event = await self.queue.get()
        if isinstance(event, Failed):
            raise event.error
        return event

    async def compressed(self) -> Compressed:
        """The job's first event: its passages are compressed."""
        event = await self.next_event()
        if not isinstance(event, Compressed):
            raise EngineError("events out of order")
        return event

    async def finished(self) -> Finished:
        """Wait for the end, passing over the pieces of the answer."""
        while not isinstance(event := await self.next_event(), Finished):
            pass
        return event

    @property
    def stage(self) -> str:
        """The stage that the request is in or waits for, as `timings_ms` names them."""
        if self._job is None:
            return "tokenize"
        return next((stage for stage in STAGES[1:] if stage not in self._job.marks), STAGES[-1])

    def timings_ms(self) -> dict[str, float]:
        """Milliseconds of each stage the request has been through, and in all."""
        marks = self._job.marks if self._job else {}
        stages, last = {"tokenize": self._queued - self._began}, self._queued
        for stage in STAGES[1:]:
            if stage in marks:
                stages[stage], last = marks[stage] - last, marks[stage]
        stages["total"] = time.perf_counter() - self._began
        return {stage: round(1000 * seconds, 3) for stage, seconds in stages.items()}

    def seconds_to_first_token(self) -> float:
        """Seconds from arrival to the answer's first token."""
        assert self._job is not None  # a session that is done had a job
        return self._job.marks["first_token"] - self._began

    def close(self) -> None:
        """Stop what still runs and give back the place and the version. Idempotent."""
        if self._closed:
            return
        self._closed = True
        job = self._job
        if job is not None and not job.done:
            self.engine.worker.cancel(self.version.lane, job)
        self._reservation.release(served=job is not None and job.done)
        self.engine.leave(self)

    @contextlib.asynccontextmanager
    async def _until_deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(self._deadline):
                yield
        except TimeoutError:
            raise DeadlineError(f"the deadline of {self._timeout:g} seconds has passed") from None


def answer_plan(body: AnswerRequest) -> AnswerPlan:
    """What the worker needs of an answer request."""
    options = GenerationOptions(
        max_new_tokens=body.max_new_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=tuple(body.stop),
    )
    return AnswerPlan(body.policy, body.stream, options)
