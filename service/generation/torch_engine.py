"""Answers written in this process: prompts wait for a slot, join the running decode batch, and get their tokens.

Synchronous and single-threaded: only the worker's thread calls it. Knows no event loop and no HTTP.
"""

import logging
from collections import deque
from dataclasses import dataclass, field

from core.decode_passes import read_prefix
from core.decoding import DecodeBatch, Sequence
from core.kv_slots import PromptPrefix
from core.model import Model
from core.prompts import Prompt
from service.failures import free_memory, out_of_memory, shown
from service.jobs import AnswerPlan, Delta, Failed, Finished, Job
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)


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
    plan: AnswerPlan
    sequence: Sequence
    text: list[str] = field(default_factory=list)


class TorchEngine:
    """The decode batch of one model, and the prompts that wait for a slot in it: a `GeneratorEngine`."""

    trouble: str | None = None

    def __init__(self, model: Model, settings: Settings, metrics: Metrics) -> None:
        self._generator = model.generator
        self._new_passes = model.decode_passes
        graphs = model.decode_passes()
        limit = settings.max_sequences
        self._slots = limit if graphs is None else min(limit, graphs.max_sequences)
        self._prefix_ids = model.template.prefix
        self._prefix: PromptPrefix | None = None  # read by the worker's thread, before its first prompt
        self._settings = settings
        self._metrics = metrics
        self._ready: deque[Waiting] = deque()
        self._running: dict[Sequence, Running] = {}
        self._decoder: DecodeBatch | None = None
        self._widest = 0  # positions of the longest sequence the decoder has had: all its slots are as long

    @property
    def jobs(self) -> int:
        """Jobs that wait or run."""
        return len(self._ready) + len(self._running)

    def add(self, job: Job, plan: AnswerPlan, prompt: Prompt) -> None:
        """Let a prompt wait for its slot."""
        self._ready.append(Waiting(job, plan, prompt))

    def cancel(self, job: Job) -> None:
        """Stop work on a job and free its slot."""
        self._ready = deque(waiting for waiting in self._ready if waiting.job is not job)
        for sequence in [s for s, running in self._running.items() if running.job is job]:
            self._drop(sequence)
        self._rest()

    def advance(self) -> None:
        """One group of prompts joins, and every running answer gets a token."""
        self._join()
        self._step()
        self._rest()

    async def verify(self) -> None:
        """The weights are in this process, and were verified when they were loaded."""

    def _rest(self) -> None:
        """One long prompt makes every slot long: when nothing is running, that memory is given back."""
        if not self._running:
            self._decoder, self._widest = None, 0

    def _join(self) -> None:
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

    def _has_room(self, waiting: Waiting, running: int) -> bool:
        """Whether one more sequence fits beside `running` others; one alone always does."""
        widest = max(self._widest, waiting.room)
        fits = (running + 1) * widest <= self._settings.kv_tokens
        return running < self._slots and (fits or not running)

    def _prefill(self, group: list[Waiting]) -> None:
        try:
            if self._decoder is None:
                self._decoder = self._new_decoder()
            sequences = self._decoder.add([w.prompt for w in group], [w.plan.options for w in group])
        except Exception as error:
            failure = error if len(group) == 1 else error.with_traceback(None)
        else:
            for waiting, sequence in zip(group, sequences, strict=True):
                self._running[sequence] = Running(waiting.job, waiting.plan, sequence)
            return
        # Outside the handler, and without its traceback: both would keep the failed batch's tensors alive.
        if len(group) == 1:
            group[0].job.end(Failed(shown(failure, group[0].job)))
            return
        log.warning("a prefill failed and is halved", extra={"prompts": len(group), "error": type(failure).__name__})
        self._metrics.split_batches.inc()
        free_memory()
        self._prefill(group[: len(group) // 2])
        self._prefill(group[len(group) // 2 :])

    def _new_decoder(self) -> DecodeBatch:
        """An empty batch; graphs read a prompt whole, the generator itself what follows the shared prefix."""
        slots, tokens, passes = self._slots, self._generator.max_tokens, self._new_passes()
        if passes is None and self._prefix is None:
            self._prefix = read_prefix(self._generator, self._prefix_ids)
        return DecodeBatch(self._generator, slots, tokens, self._prefix, passes)

    def _step(self) -> None:
        if not self._running or self._decoder is None:
            return
        self._metrics.decode_sequences.observe(len(self._running))
        try:
            events = self._decoder.step()
        except Exception as error:
            failure = error
        else:
            for event in events:
                self._token(self._running[event.sequence], event.text, event.finish_reason)
            return
        # The batch stands as it did before the step. Without memory the largest leaves and the others go on.
        running = sorted(self._running.values(), key=lambda each: -each.sequence.tokens)
        for each in running[:1] if out_of_memory(failure) else running:
            self._drop(each.sequence)
            each.job.end(Failed(shown(failure, each.job)))
        free_memory()

    def _token(self, running: Running, text: str, finish_reason: str | None) -> None:
        job = running.job
        job.mark("first_token")
        job.completion_tokens += 1
        if text:
            running.text.append(text)
            if running.plan.stream:
                job.emit(Delta(text))
        if finish_reason is not None:
            del self._running[running.sequence]
            job.mark("decode")
            job.end(Finished("".join(running.text), finish_reason, job.completion_tokens))

    def _drop(self, sequence: Sequence) -> None:
        del self._running[sequence]
        if self._decoder is not None:
            self._decoder.cancel(sequence)
