"""Rerankers whose scores become the relevance of passages: alone, or several taken together. Knows no files of rows.

Together they give the logit that best tells a question's gold passages from its others: an embedding model is right
where a compressor trained on one kind of question is not, and the compressor may learn both (`relevance_kind: mse`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from core.checkpoint import load_checkpoint
from core.errors import ConfigError, TooLargeError
from core.passages import Passage
from core.pipeline import compress, encode_query, prepare
from training.calibration import fit_platt
from training.cross_encoder import CrossEncoder, Pair
from training.data_format import Row
from training.data_quality import DataError
from training.dense import best_cosines, load_dense
from training.metrics import gold_first

log = logging.getLogger(__name__)

Values = NDArray[np.float64]
FIT_ROWS = 500  # enough for a few weights
BLOCK = 16  # rows scored together: a compressor's embeddings of all of them would take gigabytes
RIDGE = 1e-3  # keeps the weights finite where one reranker is always right


class RelevanceTeacher(Protocol):
    """Gives each `(query, passage)` a score, in order; a higher one is more relevant."""

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """One score a pair, which depends on that pair alone; of queries that it `reads`."""
        ...

    def reads(self, query: str) -> bool:
        """Whether a query is short enough to be read whole."""
        ...


class EmbeddingTeacher:
    """An embedding model as it comes: the cosine of query and passage."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        """`model` is a demo model's name, a folder or a hub id. Raises BaseModelError."""
        self._encode = load_dense(model, device)

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """Cosines; of a long passage the best of its windows."""
        by_query = _by_query(pairs)
        scored = [
            best_cosines(self._encode, query, [pairs[index][1] for index in indices])
            for query, indices in by_query.items()
        ]
        return _in_order(by_query, scored)

    def reads(self, query: str) -> bool:
        """Always: a long query counts by its beginning."""
        return True


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
        scored = [[passage.score for passage in passages] for passages in compress(self._model, requests)]
        return _in_order(by_query, scored)

    def reads(self, query: str) -> bool:
        """Whether the compressor does."""
        try:
            encode_query(self._model, query)
        except TooLargeError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Combination:
    """The logit of relevance: a weighted sum of several teachers' scores, one weight each, and a bias.

    The weights rank passages within each question (`fit_weights`): a cosine says little across questions and much
    within one. Platt scaling then makes the sum a logit.
    """

    weights: Sequence[float]
    bias: float


class Ensemble:
    """Several teachers' scores in one."""

    def __init__(self, teachers: Sequence[RelevanceTeacher], combination: Combination) -> None:
        self._teachers = teachers
        self._combination = combination

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """Logits: their sigmoid is the probability of relevance."""
        logits: Values = _features(self._teachers, pairs) @ np.array(self._combination.weights)
        return [logit + self._combination.bias for logit in logits.tolist()]

    def reads(self, query: str) -> bool:
        """Whether all of them do."""
        return all(teacher.reads(query) for teacher in self._teachers)


def fit_combination(teachers: Sequence[RelevanceTeacher], rows: Sequence[Row]) -> Combination:
    """Fit on `rows`, of which none should be what a teacher was trained on. Raises DataError where none serves."""
    usable = [row for row in rows if _tells(row) and all(teacher.reads(row.query) for teacher in teachers)]
    if not usable:
        raise DataError("rerankers are combined by rows that have a gold and another passage: there is none")
    usable = usable[:: max(1, len(usable) // FIT_ROWS)]
    blocks = [usable[start : start + BLOCK] for start in range(0, len(usable), BLOCK)]
    pairs = [[(row.query, passage.content) for row in block for passage in row.passages] for block in blocks]
    bar = tqdm(pairs, desc="combining rerankers", unit=f"{BLOCK} rows", disable=None)
    features = np.concatenate([_features(teachers, each) for each in bar])
    gold = np.array([passage.relevant for row in usable for passage in row.passages])
    sizes = [len(row.passages) for row in usable]
    weights = fit_weights(features, gold, sizes)
    platt = fit_platt((features @ weights).tolist(), gold.tolist())
    weights = platt.scale * weights
    alone = [_gold_first(column, gold, sizes) for column in features.T]
    together = _gold_first(features @ weights, gold, sizes)
    log.info(
        "relevance = %s %+.2f; gold passage first of %d rows: %.1f %% together, alone %s",
        " ".join(f"{weight:+.3g} x reranker {number + 1}" for number, weight in enumerate(weights)),
        platt.bias,
        len(usable),
        together,
        ", ".join(f"{share:.1f}" for share in alone),
    )
    return Combination(weights.tolist(), platt.bias)


def fit_weights(features: Values, gold: NDArray[np.bool_], sizes: Sequence[int]) -> Values:
    """Weights (k,) of features (n, k) under which a softmax over each question's passages is nearest to its gold ones.

    The conditional logit (McFadden 1974), with a small ridge; `sizes` are the passages of each question, which follow
    one another; each question has a gold one.
    """
    # What all passages of a question share does not rank them.
    within = np.concatenate([each - each.mean(0) for each in _by_question(features, sizes)])
    spread = np.where(within.std(0) > 0, within.std(0), 1.0)
    scaled = torch.from_numpy(within / spread)
    target = torch.from_numpy(np.concatenate([each / each.sum() for each in _by_question(gold, sizes)]))
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logits = scaled @ weights
        mass = torch.stack([each.logsumexp(0) for each in logits.split(list(sizes))]).sum()
        value = (mass - target @ logits) / len(sizes) + RIDGE * weights.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return np.asarray(weights.detach().numpy() / spread)


def make_relevance_teacher(name: str, device: str) -> RelevanceTeacher:
    """The teacher of a name: `dense:<embedding model>`, `checkpoint:<folder>` or a cross-encoder's folder or hub id.

    Raises ConfigError, BaseModelError, CheckpointError.
    """
    kind, colon, model = name.partition(":")
    if colon and not model:
        raise ConfigError(f"--reranker {name}: names no model")
    if kind == "dense" and colon:
        return EmbeddingTeacher(model, device)
    if kind == "checkpoint" and colon:
        return CompressorTeacher(Path(model), device)
    return CrossEncoder(name, device=device)


def _features(teachers: Sequence[RelevanceTeacher], pairs: Sequence[Pair]) -> Values:
    return np.column_stack([teacher.scores(pairs) for teacher in teachers])  # (pairs, teachers)


def _by_query(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Indices of the pairs of each query."""
    found: dict[str, list[int]] = {}
    for index, (query, _) in enumerate(pairs):
        found.setdefault(query, []).append(index)
    return found


def _in_order(by_query: Mapping[str, Sequence[int]], scored: Sequence[Sequence[float]]) -> list[float]:
    """The scores of each query's pairs, in the order of all pairs."""
    places = [index for indices in by_query.values() for index in indices]
    values = [score for scores in scored for score in scores]
    return [score for _, score in sorted(zip(places, values, strict=True))]


def _tells(row: Row) -> bool:
    """Whether all passages are known to be gold or not, and there are both."""
    known = all(passage.judged for passage in row.passages)
    return known and len({passage.relevant for passage in row.passages}) == 2


def _by_question(values: NDArray[Any], sizes: Sequence[int]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(sizes)[:-1])


def _gold_first(scores: Values, gold: NDArray[np.bool_], sizes: Sequence[int]) -> float:
    """Per cent of the questions whose best passage is gold."""
    questions = zip(_by_question(scores, sizes), _by_question(gold, sizes), strict=True)
    return 100 * float(np.mean([gold_first(own.tolist(), gains.tolist()) for own, gains in questions]))
