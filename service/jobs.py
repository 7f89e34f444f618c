"""What travels between the event loop and the worker: jobs one way, their events the other. Knows no HTTP."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from core.compressed import CompressedChunk, CompressedPassage
from core.errors import ScaledownError
from core.pipeline import PreparedRequest
from core.policy import Choice, Policy
from core.rows import ChunkRow
from core.sampling import GenerationOptions


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """What `/answer` asks for beyond compression; only a stream gets its answer in pieces."""

    policy: Policy
    stream: bool
    options: GenerationOptions


@dataclass(frozen=True, slots=True)
class Compressed:
    """All passages are compressed that are to be; for an answer, its prompt is built too, as `choices` say."""

    passages: list[CompressedPassage]
    choices: list[Choice]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The job is done. `finish_reason` and `text` are those of an answer, and empty without one."""

    text: str = ""
    finish_reason: str = ""
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The job ended without its result."""

    error: ScaledownError


JobEvent = Compressed | Delta | Finished | Failed
_numbers = itertools.count()


@dataclass(eq=False, slots=True)
class Job:
    """One request in the worker's hands, pinned to the checkpoint version it was prepared with.

    rows, places    rows still to compress, and where the result of each goes in `results`
    results         one entry a chunk of `request`; those of passages that came as embeddings are filled already, and
                    those that `auto` shows as text without reading them stay None
    hops            2: once all rows are compressed, those of all passages but the best are read again (`core.hops`)
    first           what became of all rows at first, from then on
    marks           when each stage ended (`time.perf_counter()`)
    completion_tokens   of the answer so far
    """

    request_id: str | None
    request: PreparedRequest
    rows: list[ChunkRow]
    places: list[int]
    results: list[CompressedChunk | None]
    plan: AnswerPlan | None
    emit: Callable[[JobEvent], None]
    hops: int = 1
    first: list[CompressedChunk] = field(default_factory=list)
    number: int = field(default_factory=lambda: next(_numbers))
    marks: dict[str, float] = field(default_factory=dict)
    outstanding: int = 0
    completion_tokens: int = 0
    done: bool = False

    def mark(self, stage: str) -> None:
        """Note that `stage` ended now, unless it ended before."""
        self.marks.setdefault(stage, time.perf_counter())

    def end(self, event: Finished | Failed) -> None:
        """Emit the last event; nothing happens where there was one, or where the job was cancelled."""
        if not self.done:
            self.done = True
            self.emit(event)


class Outbox:
    """Carries events to queues of the event loop: from the worker's thread, one wake-up for each batch of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._waiting: list[Callable[[], None]] = []

    def put(self, queue: "asyncio.Queue[JobEvent]", event: JobEvent) -> None:
        """Deliver `event`: in the worker's thread at the next flush, in the event loop's now."""
        if threading.get_ident() == self._thread:
            queue.put_nowait(event)
        else:
            self._waiting.append(partial(queue.put_nowait, event))

    def call(self, function: Callable[[], None]) -> None:
        """Have the event loop call `function` at the next flush, after the events before it. Worker's thread only."""
        self._waiting.append(function)

    def flush(self) -> None:
        """Hand over everything that waits. Worker's thread only."""
        if self._waiting and not self._loop.is_closed():
            batch, self._waiting = self._waiting, []
            self._loop.call_soon_threadsafe(_call_all, batch)


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
