"""All work on one checkpoint version: batches of chunks are compressed, and prompts handed to what writes answers.

Synchronous and single-threaded: only the worker's thread calls it. Knows no event loop and no HTTP. A batch holds
rows of one lane, so it never mixes versions.
"""

import logging
from collections.abc import Sequence

from core.compressed import CompressedChunk
from core.errors import ScaledownError
from core.hops import merge_hops, second_hop
from core.model import Model
from core.pipeline import build_prompt, compress_rows, gather
from core.planning import choose_modes
from core.rows import ChunkRow, plan_batches
from service.batching import FairQueue, Picked
from service.caches.embeddings import Place, SharedRows
from service.failures import free_memory, shown
from service.generation.engine import GeneratorEngine
from service.jobs import Compressed, Failed, Finished, Job
from service.limits import check_prompt
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)
PlacedRow = tuple[int, ChunkRow]


class Lane:
    """The queue of one model's chunks, the jobs they belong to, and the engine that writes the answers."""

    def __init__(
        self, model: Model, settings: Settings, metrics: Metrics, generator: GeneratorEngine, shared: SharedRows
    ) -> None:
        self.model = model
        self.generator = generator
        self._settings = settings
        self._metrics = metrics
        self._jobs: dict[Job, None] = {}  # those being compressed
        self._rows: FairQueue[Job, PlacedRow] = FairQueue()
        self._shared = shared

    @property
    def jobs(self) -> int:
        """Jobs that need `advance` to be called."""
        return len(self._jobs) + self.generator.jobs

    def add(self, job: Job) -> None:
        """Take a job in; its first event is `Compressed` or `Failed`."""
        self._jobs[job] = None
        self._read(job, list(zip(job.places, job.rows, strict=True)))

    def _read(self, job: Job, rows: Sequence[PlacedRow]) -> None:
        """Queue a job's rows but those whose outcome is known, or on its way to another job."""
        job.outstanding = len(rows)
        places = [Place(job, index, row) for index, row in rows]
        self._queue([place for place in places if self._shared.ask(place)])
        if not job.outstanding:
            job.mark("queue")
            self._gather(job)

    def cancel(self, job: Job) -> None:
        """Stop work on a job and free its slot; its caller has left, so no event follows."""
        job.done = True
        self._leave(job)
        self.generator.cancel(job)

    def close(self) -> None:
        """Give back what is kept between requests."""
        self._shared.close()
        if self.model.documents is not None:
            self.model.documents.close()

    def advance(self) -> None:
        """What the queue gives for one batch is compressed, then one turn of the generator."""
        self._compress_next()
        self.generator.advance()

    def _compress_next(self) -> None:
        taken = self._rows.take(self._settings.batch_tokens)
        for picked in taken:
            picked.job.mark("queue")
        for indices in plan_batches([picked.length for picked in taken], self._settings.batch_tokens):
            batch = [taken[i] for i in indices]
            self._metrics.observe_batch([picked.length for picked in batch])
            self._compress(batch)

    def _compress(self, batch: Sequence[Picked[Job, PlacedRow]]) -> None:
        """One forward pass. A batch that fails is halved until only the request that cannot be served is left."""
        batch = [picked for picked in batch if not picked.job.done]
        try:
            chunks = compress_rows(self.model, [picked.item[1] for picked in batch]) if batch else []
        except Exception as error:
            failure = error if len(batch) == 1 else error.with_traceback(None)
        else:
            for picked, chunk in zip(batch, chunks, strict=True):
                self._computed(picked.job, *picked.item, chunk)
            return
        # Outside the handler, and without its traceback: both would keep the failed batch's tensors alive.
        if len(batch) == 1:
            self._fail(batch[0].job, shown(failure, batch[0].job))
            return
        log.warning("a batch failed and is halved", extra={"rows": len(batch), "error": type(failure).__name__})
        self._metrics.split_batches.inc()
        free_memory()
        self._compress(batch[: len(batch) // 2])
        self._compress(batch[len(batch) // 2 :])

    def _computed(self, job: Job, index: int, row: ChunkRow, chunk: CompressedChunk) -> None:
        """A row of a job became `chunk`, as did those that equal it."""
        job.results[index] = chunk
        job.outstanding -= 1
        for each in dict.fromkeys((job, *self._shared.computed(row, chunk))):
            each.mark("queue")
            if not each.outstanding:
                self._gather(each)

    def _gather(self, job: Job) -> None:
        """All chunks of a job are there: hand out its passages and, for an answer, build its prompt."""
        try:
            if job.hops > 1 and self._second_hop(job):
                return
            job.mark("compress")
            passages = gather(self.model, job.request, job.results)
            if job.plan is None:
                job.emit(Compressed(passages, [], 0))
                del self._jobs[job]
                job.end(Finished())
                return
            new_tokens = job.plan.options.max_new_tokens
            policy = job.plan.policy
            choices = choose_modes(self.model, job.request, passages, policy, new_tokens)
            prompt = build_prompt(self.model, job.request, passages, [choice.mode for choice in choices])
            check_prompt(prompt.tokens, new_tokens, self.model, job.request.query, policy.mode)
        except Exception as error:
            self._fail(job, shown(error, job))
            return
        job.emit(Compressed(passages, choices, prompt.tokens))
        del self._jobs[job]
        self.generator.add(job, job.plan, prompt)

    def _second_hop(self, job: Job) -> bool:
        """Read some of a job's rows again, or put both readings together once that is done; whether it has begun."""
        chunks = [chunk for place in job.places if (chunk := job.results[place]) is not None]
        if job.first:
            for place, chunk in zip(job.places, merge_hops(job.first, chunks), strict=True):
                job.results[place] = chunk
            return False
        rows = second_hop(self.model, job.rows, chunks)
        if rows:
            job.first = chunks
            self._read(job, [(job.places[i], row) for i, row in rows.items()])
        return bool(rows)

    def _fail(self, job: Job, error: ScaledownError) -> None:
        job.end(Failed(error))
        self._leave(job)

    def _leave(self, job: Job) -> None:
        self._jobs.pop(job, None)
        self._rows.remove(job)
        self._queue(self._shared.leave(job))

    def _queue(self, places: Sequence[Place]) -> None:
        for job in dict.fromkeys(place.job for place in places):
            own = [place for place in places if place.job is job]
            lengths = [self.model.compressor.row_format.length(place.row) for place in own]
            self._rows.add(job, [(place.index, place.row) for place in own], lengths)
