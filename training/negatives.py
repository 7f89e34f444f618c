"""Hard negatives: the passages that a retriever ranks high for a question and that do not answer it.

Does not know how a retriever scores: BM25 is here, embedding models are in `dense.py`.
"""

import logging
from collections.abc import Iterator, Sequence, Set
from itertools import chain, islice
from typing import Protocol

import bm25s
import numpy as np
import numpy.typing as npt

from training.answer_match import LONG_WORD, contains, span_words, words
from training.data_format import RowPassage
from training.examples import Example

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and tells of every index

Scores = npt.NDArray[np.float32]


class Retriever(Protocol):
    """Scores every passage of the collection it was built over."""

    def scores(self, queries: Sequence[str]) -> Iterator[Scores]:
        """For each query its scores, float32 (passages,), higher is better; -inf where nothing at all matches."""
        ...


class BM25Retriever:
    """BM25 (Lucene's variant, k1 1.5, b 0.75) over the words of the passages, English stop words left out."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._count = len(texts)
        self._index = bm25s.BM25()
        tokens = _tokenise(texts)
        self._has_words = any(tokens)
        if self._has_words:
            self._index.index(tokens, show_progress=False)

    def scores(self, queries: Sequence[str]) -> Iterator[Scores]:
        nothing = np.full(self._count, -np.inf, dtype=np.float32)
        for tokens in _tokenise(queries):
            known = self._index.get_tokens_ids(tokens) if self._has_words else []
            if not known:
                yield nothing
                continue
            scores = self._index.get_scores_from_ids(known)
            yield np.where(scores > 0, scores, nothing)


def _tokenise(texts: Sequence[str]) -> list[list[str]]:
    tokens: list[list[str]] = bm25s.tokenize(
        list(texts), token_pattern=LONG_WORD, stopwords="en", return_ids=False, show_progress=False
    )
    return tokens


class Collection:
    """Distinct passages that negatives are taken from."""

    def __init__(self, passages: Sequence[RowPassage]) -> None:
        distinct = {passage.content: passage for passage in passages}
        self.passages = tuple(distinct.values())
        self.texts = tuple(distinct)
        self._number = {text: index for index, text in enumerate(self.texts)}

    def number_of(self, passage: RowPassage) -> int | None:
        """Where `passage` stands in the collection."""
        return self._number.get(passage.content)

    def words_of(self, index: int) -> str:
        """The words of passage `index`, without its title."""
        return words(self.passages[index].text)

    def contains(self, index: int, answers: Sequence[str]) -> bool:
        """Whether passage `index` contains one of `answers`, which went through `answer_words`."""
        return contains(words(self.texts[index]), answers)


class PartRetriever:
    """Scores the passages `numbers` of another retriever's collection, in this order."""

    def __init__(self, retriever: Retriever, numbers: Sequence[int]) -> None:
        self._retriever = retriever
        self._numbers = np.array(numbers, dtype=np.int64)

    def scores(self, queries: Sequence[str]) -> Iterator[Scores]:
        return (scores[self._numbers] for scores in self._retriever.scores(queries))


def without_passages(
    collection: Collection, retriever: Retriever, barred: Set[str]
) -> tuple[Collection, PartRetriever]:
    """Both without the passages whose words are among `barred`. Nothing is indexed or embedded anew."""
    numbers = [number for number, passage in enumerate(collection.passages) if words(passage.text) not in barred]
    return Collection([collection.passages[number] for number in numbers]), PartRetriever(retriever, numbers)


def ranked(scores: Scores) -> Iterator[int]:
    """Passages from the best score down, without sorting more of them than are asked for; -inf never comes."""
    seen: set[int] = set()
    depth = 64
    while len(seen) < len(scores):
        depth = min(depth, len(scores))
        top = np.argpartition(-scores, depth - 1)[:depth]
        for index in top[np.lexsort((top, -scores[top]))].tolist():
            if scores[index] == -np.inf:
                return
            if index not in seen:
                seen.add(index)
                yield index
        depth *= 8


def best_negatives(
    example: Example,
    scores: Scores,
    collection: Collection,
    count: int,
    *,
    mine: bool = True,
    drop_answers: bool = True,
) -> list[int]:
    """Up to `count` passages of the collection for one example, best score first.

    The example's own negatives come before all others, ordered by score; without `mine` there are no others.
    Positives are left out, whatever their title, and so is a text that is there already; with `drop_answers` every
    passage that contains an answer other than yes and no.
    """
    answers = span_words(example.answers)
    given = [number for passage in example.negatives if (number := collection.number_of(passage)) is not None]
    given = sorted(given, key=lambda index: (-scores[index], index))
    seen = _kept_words(example)
    chosen: list[int] = []
    for index in chain(given, ranked(scores) if mine else ()):
        if len(chosen) == count:
            break
        text = collection.words_of(index)
        if text not in seen and not (drop_answers and collection.contains(index, answers)):
            chosen.append(index)
            seen.add(text)
    return chosen


def first_answering(example: Example, scores: Scores, collection: Collection, depth: int) -> int | None:
    """The best of the `depth` first passages that contains an answer: the positive of a question that came without.

    DPR's distant supervision (Karpukhin et al. 2020, sec. 4.1, `depth` 100). Yes and no make no passage a positive.
    """
    answers = span_words(example.answers)
    return next((index for index in islice(ranked(scores), depth) if collection.contains(index, answers)), None)


def random_negatives(
    example: Example, collection: Collection, count: int, taken: Sequence[int], rng: np.random.Generator
) -> list[int]:
    """Up to `count` passages drawn evenly from the collection: no positive, no text taken, none with an answer."""
    answers = span_words(example.answers)
    seen = _kept_words(example).union(map(collection.words_of, taken))
    chosen: list[int] = []
    for _ in range(20 * count):
        if len(chosen) == count:
            break
        index = int(rng.integers(len(collection.passages)))
        text = collection.words_of(index)
        if text not in seen and not collection.contains(index, answers):
            chosen.append(index)
            seen.add(text)
    return chosen


def _kept_words(example: Example) -> set[str]:
    """The words of what a row has whatever its negatives are; without titles, which copies of a text may lack."""
    return {words(passage.text) for passage in (*example.positives, *example.unjudged)}
