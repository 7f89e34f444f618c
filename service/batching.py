"""Which chunks are compressed next: fair between requests, under a token budget.

Knows only lengths: a queue of (job, item, length), no model and no thread.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

J = TypeVar("J", bound=Hashable)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Picked(Generic[J, T]):
    """One item of a batch, the job it belongs to, and its length in tokens."""

    job: J
    item: T
    length: int


class FairQueue(Generic[J, T]):
    """Items of many jobs, taken in turns: each round of a batch takes at most one item of every job.

    A job with 200 items therefore never keeps one with a single item waiting for more than one batch (or for the
    turns of the jobs before it, when there are more jobs than a batch holds). Within a job the longest go first, so
    that items of like length meet.
    """

    def __init__(self) -> None:
        self._waiting: dict[J, deque[Picked[J, T]]] = {}

    def __len__(self) -> int:
        return sum(len(items) for items in self._waiting.values())

    def add(self, job: J, items: Sequence[T], lengths: Sequence[int]) -> None:
        """Queue items of a job, behind the turns of all others where it has none that wait."""
        added = (Picked(job, item, length) for item, length in zip(items, lengths, strict=True))
        longest_first = sorted((*self._waiting.get(job, ()), *added), key=lambda picked: -picked.length)
        if longest_first:
            self._waiting[job] = deque(longest_first)

    def remove(self, job: J) -> None:
        """Forget what is left of a job."""
        self._waiting.pop(job, None)

    def take(self, max_tokens: int) -> list[Picked[J, T]]:
        """The next batch: at most `max_tokens` tokens in all, or a single item that is longer on its own."""
        batch: list[Picked[J, T]] = []
        total, taken = 0, True
        turn = list(self._waiting)
        while taken:
            taken = False
            for job in turn:
                items = self._waiting.get(job)
                if not items or (batch and total + items[0].length > max_tokens):
                    continue
                batch.append(items.popleft())
                total, taken = total + batch[-1].length, True
        self._rotate(batch)
        return batch

    def _rotate(self, batch: Sequence[Picked[J, T]]) -> None:
        """Jobs that had a turn go behind those that had none."""
        for job in {picked.job: None for picked in batch}:
            items = self._waiting.pop(job)
            if items:
                self._waiting[job] = items
