"""What a set of rows looks like, in numbers and as a table. Knows no files."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from training.answer_match import answer_words, contains, words
from training.data_format import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """rows, then means; `passage_words_95` is the 95th percentile, shares are of rows (0..1).

    full              rows with as many passages as the largest row
    answer_in_positive  rows with a positive that contains an answer
    answer_elsewhere  rows with an answer in a passage that is no positive
    titled_positives, titled_others  passages with a title: where these differ much, titles tell which is which
    """

    rows: int
    passages: float
    positives: float
    query_words: float
    passage_words: float
    passage_words_95: float
    answer_words: float
    full: float
    answer_in_positive: float
    answer_elsewhere: float
    titled_positives: float
    titled_others: float

    def __str__(self) -> str:
        return (
            f"{self.rows} rows; a row has {self.passages:.1f} passages ({self.positives:.2f} positive, "
            f"{self.full:.0%} of rows are full), {self.query_words:.1f} words in the query, "
            f"{self.answer_words:.1f} in the answer; a passage has {self.passage_words:.0f} words "
            f"(95 %: {self.passage_words_95:.0f}); an answer stands in a positive of {self.answer_in_positive:.1%} "
            f"of rows, in another passage of {self.answer_elsewhere:.1%}; "
            f"{self.titled_positives:.0%} of positives and {self.titled_others:.0%} of others have a title"
        )


def describe(rows: Sequence[Row]) -> RowStatistics:
    """Statistics of at least one row; ValueError for none."""
    if not rows:
        raise ValueError("there are no rows to describe")
    counts = [len(row.passages) for row in rows]
    lengths: list[int] = []
    titled: dict[bool, list[bool]] = {True: [], False: []}  # of positives, of others
    answered = {True: 0, False: 0}  # rows with an answer in a positive, in another passage
    for row in rows:
        sought = answer_words(row.answers)
        found = set()
        for passage in row.passages:
            lengths.append(len(passage.content.split()))
            titled[passage.relevant].append(bool(passage.title))
            if contains(words(passage.content), sought):
                found.add(passage.relevant)
        for relevant in found:
            answered[relevant] += 1
    return RowStatistics(
        rows=len(rows),
        passages=float(np.mean(counts)),
        positives=len(titled[True]) / len(rows),
        query_words=float(np.mean([len(row.query.split()) for row in rows])),
        passage_words=float(np.mean(lengths)),
        passage_words_95=float(np.percentile(lengths, 95)),
        answer_words=float(
            np.mean([len(row.target.split()) if row.answers or row.teacher_answer else 0 for row in rows])
        ),
        full=counts.count(max(counts)) / len(rows),
        answer_in_positive=answered[True] / len(rows),
        answer_elsewhere=answered[False] / len(rows),
        titled_positives=float(np.mean(titled[True] or [False])),
        titled_others=float(np.mean(titled[False] or [False])),
    )


def warn_without_positives(sources: Iterable[str], rows: Sequence[Row]) -> None:
    """Name the sources, with which ids begin, none of whose rows says which passage answers."""
    for source in sources:
        own = [row for row in rows if row.id.startswith(f"{source}/")]
        if own and not any(passage.relevant for row in own for passage in row.passages):
            log.warning(
                "source %s: none of its %d rows has a positive passage, which loss.relevance learns from; give "
                "`positives` or columns.positives=COLUMN, `gold` or `relevance` of `passages`, or score them: `label "
                "--reranker`",
                source,
                len(own),
            )
