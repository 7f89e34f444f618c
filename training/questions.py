"""Rows as an evaluation sees them: gold passages marked, cut to a number of passages. Knows no models."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.passages import Passage
from training.data_format import Row
from training.data_quality import DataError


@dataclass(frozen=True, slots=True)
class Question:
    """A query with gold answers and passages; `gold[i]` says whether passage i answers it."""

    id: str
    query: str
    references: tuple[str, ...]
    passages: tuple[Passage, ...]
    gold: tuple[bool, ...]

    def with_passages(self, count: int) -> "Question":
        """The same question with at most `count` passages, in their order: gold ones stay, the last others go.

        More gold passages than `count` are all kept: a question that needs two is not asked with one.
        """
        room = max(0, count - sum(self.gold))
        kept = []
        for index, gold in enumerate(self.gold):
            if gold or room > 0:
                kept.append(index)
                room -= not gold
        return Question(
            self.id,
            self.query,
            self.references,
            tuple(self.passages[i] for i in kept),
            tuple(self.gold[i] for i in kept),
        )


def to_questions(rows: Sequence[Row]) -> list[Question]:
    """Rows in their order. Raises DataError where a row has no gold answer: there is nothing to compare with."""
    if missing := [row.id for row in rows if not row.answers]:
        raise DataError(f"{len(missing)} rows have no gold answer to compare with, the first is {missing[0]!r}")
    return [
        Question(
            row.id,
            row.query,
            row.answers,
            tuple(Passage(passage.text, passage.title, passage.id) for passage in row.passages),
            tuple(passage.relevant for passage in row.passages),
        )
        for row in rows
    ]
