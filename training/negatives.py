"""Hard negatives: the passages that a retriever ranks high for a question and that do not answer it.

Does not know how a retriever scores: BM25 is here, embedding models are in `dense.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import bm25s
import numpy as np
import numpy.typing as npt

from training.answer_match import answer_words, contains, words
from training.data_format import RowPassage
from training.examples import Example

Scores = npt.NDArray[np.float32]


class Retriever(Protocol):
    """Scores every passage of the collection it was built over."""

    def scores(self, queries: Sequence[str]) -> Iterator[Scores]:
        """For each query its scores, float32 (passages,), higher is better; what does not match at all is <= 0."""
        ...


class BM25Retriever:
    """BM25 (Lucene's variant, k1 1.5, b 0.75) over the words of the passages, English stop words left out."""

    def __init__(self, texts: Sequence[str]) -> None:
        if not texts:
            raise ValueError("BM25 needs at least one text")
        self._index = bm25s.BM25()
        self._index.index(_tokenise(texts), show_progress=False)

    def scores(self, queries: Sequence[str]) -> Iterator[Scores]:
        for tokens in _tokenise(queries):
            known = self._index.get_tokens_ids(tokens)
            yield self._index.get_scores_from_ids(known) if known else np.zeros(self._index.scores["num_docs"], np.float32)


def _tokenise(texts: Sequence[str]) -> list[list[str]]:
    return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)  # type: ignore[return-value]


class Collection:
    """Distinct passages that negatives are taken from, with their normalised words at hand."""

    def __init__(self, passages: Sequence[RowPassage]) -> None:
        distinct = {passage.content: passage for passage in passages}
        self.passages = tuple(distinct.values())
        self.texts = tuple(distinct)
        self._number = {text: index for index, text in enumerate(self.texts)}
        self._words: dict[int, str] = {}

    def number_of(self, passage: RowPassage) -> int | None:
        """Where `passage` stands in the collection."""
        return self._number.get(passage.content)

    def contains(self, index: int, answers: Sequence[str]) -> bool:
        """Whether passage `index` contains one of `answers`, which went through `answer_words`."""
        if index not in self._words:
            self._words[index] = words(self.texts[index])
        return contains(self._words[index], answers)


def best_negatives(
    example: Example, scores: Scores, collection: Collection, count: int, *, drop_answers: bool = True
) -> list[int]:
    """Up to `count` passages of the collection for one example, best score first, equal scores in collection order.

    Positives are left out, and with `drop_answers` every passage that contains an answer. The example's own
    negatives come before all others, ordered by score.
    """
    answers = answer_words(example.answers)
    gold = {collection.number_of(passage) for passage in example.positives}
    given = [number for passage in example.negatives if (number := collection.number_of(passage)) is not None]
    given = sorted(dict.fromkeys(given), key=lambda index: -scores[index])
    # Four times over, so that what is dropped below rarely leaves too few.
    depth = min(len(scores), 4 * (count + len(example.answers)) + 16)
    top = np.argpartition(-scores, depth - 1)[:depth]
    top = top[np.lexsort((top, -scores[top]))]
    chosen: list[int] = []
    for index in dict.fromkeys([*given, *(int(number) for number in top if scores[number] > 0)]):
        if len(chosen) == count:
            break
        if index not in gold and not (drop_answers and collection.contains(index, answers)):
            chosen.append(index)
    return chosen


def random_negatives(
    example: Example, collection: Collection, count: int, taken: Sequence[int], rng: np.random.Generator
) -> list[int]:
    """Up to `count` passages drawn evenly from the collection: no positive, nothing taken, none with an answer."""
    answers = answer_words(example.answers)
    barred = {*taken, *(collection.number_of(passage) for passage in example.positives)}
    chosen: list[int] = []
    for _ in range(20 * count):
        if len(chosen) == count:
            break
        index = int(rng.integers(len(collection.passages)))
        if index not in barred and not collection.contains(index, answers):
            chosen.append(index)
            barred.add(index)
    return chosen
