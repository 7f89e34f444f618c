"""All work on one checkpoint version: batches of chunks, prompts that join the running decode batch, tokens.

Synchronous and single-threaded: only the worker's thread calls it. Knows no event loop and no HTTP. A batch holds
rows of one lane, so it never mixes versions.
"""

import logging
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch

from core.config import Mode
from core.decoding import DecodeBatch, Sequence
from core.errors import EngineError, OverloadedError, ScaledownError
from core.model import Model
from core.pipeline import CompressedPassage, build_prompt, choose_modes, compress_rows, gather
from core.prompts import Prompt
from core.rows import ChunkRow
from service.batching import FairQueue, Picked
from service.jobs import AnswerPlan, Compressed, Delta, Failed, Finished, Job
from service.limits import check_prompt
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)
PlacedRow = tuple[int, ChunkRow]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job whose prompt waits for a slot."""

    job: Job
    plan: AnswerPlan
    prompt: Prompt

    @property
    def room(self) -> int:
        """Positions that the prompt and its longest answer take."""
        return self.prompt.tokens + self.plan.options.max_new_tokens


@dataclass(eq=False, slots=True)
class Running:
    """A job whose answer is being generated."""

    job: Job
    sequence: Sequence
    text: list[str] = field(default_factory=list)
    tokens: int = 0


class Lane:
    """The queue, the decode batch and the jobs of one model."""

    def __init__(self, model: Model, settings: Settings, metrics: Metrics) -> None:
        self.model = model
        self._settings = settings
        self._metrics = metrics
        self._jobs: dict[Job, None] = {}
        self._rows: FairQueue[Job, PlacedRow] = FairQueue()
        self._ready: deque[Waiting] = deque()
        self._running: dict[Sequence, Running] = {}
        self._decoder: DecodeBatch | None = None
        self._widest = 0  # positions of the longest sequence the decoder has had: all its slots are as long

    @property
    def jobs(self) -> int:
        """Jobs that are not done."""
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """Take a job in; its first event is `Compressed` or `Failed`."""
        self._jobs[job] = None
        job.outstanding = len(job.rows)
        lengths = [self.model.compressor.row_format.length(row) for row in job.rows]
        self._rows.add(job, list(zip(job.places, job.rows, strict=True)), lengths)
        if not job.rows:
            job.mark("queue")
            self._gather(job)

    def cancel(self, job: Job) -> None:
        """Stop work on a job and free its slot; its caller has left, so no event follows."""
        if job in self._jobs:
            self._drop(job)
            self._rest()

    def advance(self) -> bool:
        """One compression batch, one group of prompts, one token for every running answer. False: nothing to do."""
        compressed = self._compress_next()
        joined = self._join()
        stepped = self._step()
        self._rest()
        return stepped or joined or compressed

    def _rest(self) -> None:
        """One long prompt makes every slot long: when nothing is running, that memory is given back."""
        if not self._running:
            self._decoder, self._widest = None, 0

    def _compress_next(self) -> bool:
        batch = self._rows.take(self._settings.batch_tokens)
        for picked in batch:
            picked.job.mark("queue")
        if batch:
            self._metrics.observe_batch([picked.length for picked in batch])
            self._compress(batch)
        return bool(batch)

    def _compress(self, batch: Items[Picked[Job, PlacedRow]]) -> None:
        """One forward pass. A batch that fails is halved until only the request that cannot be served is left."""
        batch = [picked for picked in batch if not picked.job.done]
        try:
            chunks = compress_rows(self.model, [picked.item[1] for picked in batch]) if batch else []
        except Exception as error:
            failure = error if len(batch) == 1 else error.with_traceback(None)
        else:
            for picked, chunk in zip(batch, chunks, strict=True):
                picked.job.results[picked.item[0]] = chunk
                picked.job.outstanding -= 1
                if not picked.job.outstanding:
                    self._gather(picked.job)
            return
        # Outside the handler, and without its traceback: both would keep the failed batch's tensors alive.
        if len(batch) == 1:
            self._fail(batch[0].job, _shown(failure, batch[0].job))
            return
        log.warning("a batch failed and is halved", extra={"rows": len(batch), "error": type(failure).__name__})
        self._metrics.split_batches.inc()
        _free_memory()
        self._compress(batch[: len(batch) // 2])
        self._compress(batch[len(batch) // 2 :])

    def _gather(self, job: Job) -> None:
        """All chunks of a job are there: hand out its passages and, for an answer, build its prompt."""
        job.mark("compress")
        try:
            passages = gather(self.model, job.request, [chunk for chunk in job.results if chunk is not None])
            if job.plan is None:
                job.emit(Compressed(passages, [], 0))
                self._finish(job, Finished())
                return
            modes = _modes(self.model, job, passages, job.plan)
            prompt = build_prompt(self.model, job.request, passages, modes)
            check_prompt(prompt.tokens, job.plan.options.max_new_tokens, self.model)
        except Exception as error:
            self._fail(job, _shown(error, job))
            return
        job.emit(Compressed(passages, modes, prompt.tokens))
        self._ready.append(Waiting(job, job.plan, prompt))

    def _join(self) -> bool:
        """Prompts that have a slot and fit the prefill budget join the running batch, first come, first served."""
        group: list[Waiting] = []
        width = 0
        while self._ready and self._has_room(self._ready[0], len(self._running) + len(group)):
            width = max(width, self._ready[0].prompt.tokens)
            if group and width * (len(group) + 1) > self._settings.prefill_tokens:
                break
            self._widest = max(self._widest, self._ready[0].room)
            group.append(self._ready.popleft())
        if group:
            self._prefill(group)
        return bool(group)

    def _has_room(self, waiting: Waiting, running: int) -> bool:
        """Whether one more sequence fits beside `running` others; one alone always does."""
        widest = max(self._widest, waiting.room)
        fits = (running + 1) * widest <= self._settings.kv_tokens
        return running < self._settings.max_sequences and (fits or not running)

    def _prefill(self, group: list[Waiting]) -> None:
        if self._decoder is None:
            self._decoder = DecodeBatch(
                self.model.generator, self._settings.max_sequences, self.model.generator.max_tokens
            )
        try:
            sequences = self._decoder.add([w.prompt for w in group], [w.plan.options for w in group])
        except Exception as error:
            failure = error if len(group) == 1 else error.with_traceback(None)
        else:
            for waiting, sequence in zip(group, sequences, strict=True):
                self._running[sequence] = Running(waiting.job, sequence)
            return
        if len(group) == 1:
            self._fail(group[0].job, _shown(failure, group[0].job))
            return
        log.warning("a prefill failed and is halved", extra={"prompts": len(group), "error": type(failure).__name__})
        self._metrics.split_batches.inc()
        _free_memory()
        self._prefill(group[: len(group) // 2])
        self._prefill(group[len(group) // 2 :])

    def _step(self) -> bool:
        if not self._running or self._decoder is None:
            return False
        self._metrics.decode_sequences.observe(len(self._running))
        try:
            events = self._decoder.step()
        except Exception as error:
            failure = error
        else:
            for event in events:
                self._token(self._running[event.sequence], event.text, event.finish_reason)
            return True
        # The batch stands as it did before the step. Without memory the largest leaves and the others go on.
        running = sorted(self._running.values(), key=lambda each: -each.sequence.tokens)
        for each in running[:1] if _out_of_memory(failure) else running:
            self._fail(each.job, _shown(failure, each.job))
        _free_memory()
        return True

    def _token(self, running: Running, text: str, finish_reason: str | None) -> None:
        job = running.job
        job.mark("first_token")
        running.tokens += 1
        if text:
            running.text.append(text)
            if job.plan is not None and job.plan.stream:
                job.emit(Delta(text))
        if finish_reason is not None:
            del self._running[running.sequence]
            job.mark("decode")
            self._finish(job, Finished("".join(running.text), finish_reason, running.tokens))

    def _finish(self, job: Job, event: Finished | Failed) -> None:
        job.done = True
        self._jobs.pop(job, None)
        job.emit(event)

    def _fail(self, job: Job, error: ScaledownError) -> None:
        if not job.done:
            self._drop(job)
            job.emit(Failed(error))

    def _drop(self, job: Job) -> None:
        job.done = True
        del self._jobs[job]
        self._rows.remove(job)
        self._ready = deque(waiting for waiting in self._ready if waiting.job is not job)
        for sequence in [s for s, running in self._running.items() if running.job is job]:
            del self._running[sequence]
            if self._decoder is not None:
                self._decoder.cancel(sequence)


def _modes(model: Model, job: Job, passages: list[CompressedPassage], plan: AnswerPlan) -> list[Mode]:
    """How each passage is shown. One whose text is unknown here stays compressed, whatever its relevance."""
    with_text = {chunk.passage for chunk in job.request.chunks if chunk.generator_ids}
    candidates = [passage for passage in passages if passage.index in with_text]
    chosen = choose_modes(model, candidates, plan.mode, plan.hybrid_top)
    modes: list[Mode] = ["compressed"] * len(passages)
    for passage, mode in zip(candidates, chosen, strict=True):
        modes[passage.index] = mode
    return modes


def _shown(error: Exception, job: Job) -> ScaledownError:
    """What the caller is told about a failure; anything that is not ours goes to the log only."""
    if isinstance(error, ScaledownError):
        return error
    if _out_of_memory(error):
        return OverloadedError("there is not enough memory for this request: send fewer or shorter passages", 30)
    log.error("the engine failed", exc_info=error, extra={"request_id": job.request_id})
    return EngineError("the engine failed")


def _out_of_memory(error: Exception) -> bool:
    # torch has a class for CUDA only; its CPU allocator raises RuntimeError with this text.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
