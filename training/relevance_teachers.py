"""Rerankers whose scores become the relevance of passages: alone, or several taken together. Knows no files of rows.

Together they give the logit that best tells gold passages from others: an embedding model is right where a compressor
trained on one kind of question is not, and the compressor may learn both (`loss.relevance_kind: mse`).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from core.checkpoint import load_checkpoint
from core.errors import ConfigError
from core.passages import Passage
from core.pipeline import compress, prepare
from training.calibration import fit_logistic
from training.cross_encoder import CrossEncoder, Pair
from training.data_format import Row
from training.data_quality import DataError
from training.dense import DenseEncoder, best_cosines, load_dense

log = logging.getLogger(__name__)

FIT_ROWS = 500  # enough for a few weights


class RelevanceTeacher(Protocol):
    """Gives each `(query, passage)` a score, in order; a higher one is more relevant."""

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """One score a pair, which depends on that pair alone."""
        ...


class EmbeddingTeacher:
    """An embedding model as it comes: the cosine of query and passage."""

    def __init__(self, model: str) -> None:
        """`model` is a demo model's name, a folder or a hub id. Raises BaseModelError."""
        self._encode: DenseEncoder = load_dense(model)

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """Cosines; of a long passage the best of its windows."""
        by_query = _by_query(pairs)
        scores = [0.0] * len(pairs)
        for query, indices in by_query.items():
            cosines = best_cosines(self._encode, query, [pairs[index][1] for index in indices])
            for index, cosine in zip(indices, cosines, strict=True):
                scores[index] = cosine
        return scores


class CompressorTeacher:
    """A checkpoint's own relevance scores: what it has learned stays part of what is taught."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Load a checkpoint. Raises CheckpointError."""
        self._model = load_checkpoint(folder, device=device)

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """Raw scores; of a passage the best of its chunks."""
        by_query = _by_query(pairs)
        requests = [
            prepare(self._model, query, [Passage(pairs[index][1]) for index in indices])
            for query, indices in by_query.items()
        ]
        scores = [0.0] * len(pairs)
        for indices, passages in zip(by_query.values(), compress(self._model, requests), strict=True):
            for index, passage in zip(indices, passages, strict=True):
                scores[index] = passage.score
        return scores


class Ensemble:
    """The logit of relevance: a weighted sum of several teachers' scores, by logistic regression on gold passages."""

    def __init__(self, teachers: Sequence[RelevanceTeacher], rows: Sequence[Row]) -> None:
        """Fit on `rows`, of which none should be what a teacher was trained on. Raises DataError where none serves."""
        self._teachers = teachers
        usable = [row for row in rows if _tells(row)]
        if not usable:
            raise DataError("rerankers are combined by rows that have a gold and another passage: there is none")
        usable = usable[:: max(1, len(usable) // FIT_ROWS)]
        features = self._features([(row.query, passage.content) for row in usable for passage in row.passages])
        gold = np.array([passage.relevant for row in usable for passage in row.passages])
        self.weights, self.bias = fit_logistic(features, gold)
        owners = np.repeat(np.arange(len(usable)), [len(row.passages) for row in usable])
        alone = [_gold_first(column, gold, owners) for column in features.T]
        together = _gold_first(features @ self.weights, gold, owners)
        log.info(
            "relevance = %s %+.2f; gold passage first of %d rows: %.1f %% together, alone %s",
            " ".join(f"{weight:+.3g} x reranker {number + 1}" for number, weight in enumerate(self.weights)),
            self.bias,
            len(usable),
            together,
            ", ".join(f"{share:.1f}" for share in alone),
        )

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """Logits: their sigmoid is the probability of relevance."""
        logits: list[float] = (self._features(pairs) @ self.weights + self.bias).tolist()
        return logits

    def _features(self, pairs: Sequence[Pair]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.column_stack([teacher.scores(pairs) for teacher in self._teachers])  # (pairs, teachers)


def make_relevance_teacher(names: Sequence[str], fit_rows: Sequence[Row], device: str) -> RelevanceTeacher:
    """The teacher of each name: `dense:<embedding model>`, `checkpoint:<folder>` or a cross-encoder's folder or hub id.

    Several are an `Ensemble`, fitted on `fit_rows`. Raises ConfigError, BaseModelError, CheckpointError, DataError.
    """
    teachers = [_make(name, device) for name in names]
    return teachers[0] if len(teachers) == 1 else Ensemble(teachers, fit_rows)


def _make(name: str, device: str) -> RelevanceTeacher:
    kind, colon, model = name.partition(":")
    if colon and not model:
        raise ConfigError(f"--reranker {name}: names no model")
    if kind == "dense" and colon:
        return EmbeddingTeacher(model)
    if kind == "checkpoint" and colon:
        return CompressorTeacher(Path(model), device)
    return CrossEncoder(name, device=device)


def _by_query(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Indices of the pairs of each query."""
    found: dict[str, list[int]] = {}
    for index, (query, _) in enumerate(pairs):
        found.setdefault(query, []).append(index)
    return found


def _tells(row: Row) -> bool:
    """Whether all passages are known to be gold or not, and there are both."""
    known = all(passage.relevance is not None for passage in row.passages)
    return known and len({passage.relevant for passage in row.passages}) == 2


def _gold_first(
    scores: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    gold: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    owners: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
) -> float:
    """Per cent of rows whose best passage is gold; a gold one that ties with another does not count."""
    count = int(owners.max()) + 1
    best, best_gold = np.full(count, -np.inf), np.full(count, -np.inf)
    np.maximum.at(best, owners[~gold], scores[~gold])
    np.maximum.at(best_gold, owners[gold], scores[gold])
    return float((best_gold > best).mean() * 100)
