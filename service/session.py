"""One admitted request, on the event loop: its place, its version, its job, and what became of it. Knows no HTTP."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from core.errors import CancelledError, EngineError
from core.policy import Policy
from core.sampling import GenerationOptions
from service.admission import Reservation
from service.errors import DeadlineError
from service.jobs import AnswerPlan, Compressed, Delta, Failed, Finished, Job, JobEvent
from service.limits import AnyRequest, check_encoding, check_prompt, check_tokens
from service.logs import current_request_id
from service.metrics import STAGES
from service.preparation import Prepared, prepare_request
from service.recording import record_passages, record_work
from service.schemas import AnswerRequest, CompressRequest

if TYPE_CHECKING:
    from service.engine import Engine, Version


class Session:
    """One admitted request: its place, its version, its job. Use it in a `with` so that all three are given back."""

    def __init__(self, engine: "Engine", version: "Version", reservation: Reservation, timeout: float) -> None:
        self.engine = engine
        self.version = version
        self.queue: asyncio.Queue[JobEvent] = asyncio.Queue()
        self.prepared: Prepared | None = None
        self.text_tokens = 0
        self.prompt_tokens = 0
        self.failure = ""  # the code of the error that ended the request
        self.explain = False
        self._reservation = reservation
        self._timeout = timeout
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._began = time.perf_counter()
        self._queued = self._began
        self._job: Job | None = None
        self._closed = False
        self._first_token_recorded = False
        self._work_recorded = False
        version.sessions += 1
        engine.sessions.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def start(self, body: AnyRequest) -> None:
        """Tokenise and look up chunks in the pool, correct the reservation, hand the job to the worker."""
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
            hops=prepared.policy.hops,
            emit=lambda event: outbox.put(queue, event),
        )
        self.engine.worker.add(self.version.lane, self._job)

    def _prepare(self, body: AnyRequest) -> None:
        model = self.version.model
        rate = body.rate if isinstance(body, AnswerRequest | CompressRequest) else None
        policy, answer_tokens = Policy(hops=body.hops), 0
        if isinstance(body, AnswerRequest):
            policy, answer_tokens, self.explain = body.policy, body.max_new_tokens, body.explain
        store = self.engine.store
        self.prepared = prepare_request(model, body.query, body.passages, rate, store, policy, answer_tokens)
        check_tokens(self.prepared.passage_tokens, self.engine.settings)
        if isinstance(body, CompressRequest):
            rows = sum(row.memory_tokens for row in self.prepared.rows)
            check_encoding(body, rows * model.generator.hidden_size)
        if isinstance(body, AnswerRequest):
            self.text_tokens = self.prepared.text_prompt_tokens(model)
            if policy.mode == "text" and policy.max_prompt_tokens is None and not policy.min_relevance:
                check_prompt(self.text_tokens, body.max_new_tokens, model, body.query, policy.mode)
        self.engine.caches.fetch(model, self.prepared.rows)

    async def next_event(self) -> JobEvent:
        """The job's next event. Raises what the job failed with, and DeadlineError."""
        async with self._until_deadline():
            event = await self.queue.get()
        match event:
            case Failed():
                self.failure = event.error.code
                raise event.error
            case Compressed():
                self.prompt_tokens = event.prompt_tokens
                record_passages(self.engine.metrics, self.version.model.name, event.passages)
            case Delta():
                self._record_first_token()
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
    def plan(self) -> AnswerPlan | None:
        """What an answer was asked for; None for other requests, and before they are queued."""
        return self._job.plan if self._job else None

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer so far."""
        return self._job.completion_tokens if self._job else 0

    @property
    def stage(self) -> str:
        """The stage that the request is in or waits for, as `timings_ms` names them."""
        if self._job is None:
            return "tokenize"
        return next((stage for stage in STAGES[1:] if stage not in self._job.marks), STAGES[-1])

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, less than 0 once it has passed."""
        return self._deadline - asyncio.get_running_loop().time()

    def stage_times(self) -> list[tuple[str, float, float]]:
        """(stage, begin, end) of what the request has been through, in seconds of `time.perf_counter`.

        The last is the one that a request which failed was in.
        """
        marks = self._job.marks if self._job else {}
        times, last = [("tokenize", self._began, self._queued)], self._queued
        for stage in STAGES[1:]:
            if stage in marks:
                times.append((stage, last, marks[stage]))
                last = marks[stage]
        if self.failure and self._job and self.stage not in marks:
            times.append((self.stage, last, time.perf_counter()))
        return times

    def timings_ms(self) -> dict[str, float]:
        """Milliseconds of each stage the request has been through, and in all."""
        stages = {stage: end - begin for stage, begin, end in self.stage_times()}
        stages["total"] = time.perf_counter() - self._began
        return {stage: round(1000 * seconds, 3) for stage, seconds in stages.items()}

    def seconds_to_first_token(self) -> float | None:
        """Seconds from arrival to the answer's first token; None while there is none."""
        mark = self._job.marks.get("first_token") if self._job else None
        return None if mark is None else mark - self._began

    def record(self) -> None:
        """Count the work that was done so far. Once: at the end, or just before a stream tells its client of it."""
        if self._job is not None and not self._work_recorded:
            self._work_recorded = True
            self._record_first_token()
            record_work(self)

    def _record_first_token(self) -> None:
        seconds = self.seconds_to_first_token()
        if seconds is not None and not self._first_token_recorded:
            self._first_token_recorded = True
            self.engine.metrics.first_token_seconds.observe(seconds)

    def close(self) -> None:
        """Stop what still runs and give back the place and the version. Idempotent."""
        if self._closed:
            return
        self._closed = True
        job = self._job
        if job is not None and not job.done:
            self.failure = self.failure or CancelledError.code
            self.engine.worker.cancel(self.version.lane, job)
        self._reservation.release(served=job is not None and job.done)
        try:
            self.record()  # before the version may be unloaded, and its labels with it
        finally:
            self.engine.leave(self)

    @contextlib.asynccontextmanager
    async def _until_deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(self._deadline):
                yield
        except TimeoutError:
            self.failure = DeadlineError.code
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
