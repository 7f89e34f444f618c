"""Bootstrap confidence intervals over questions. Knows nothing about what the numbers mean.

Percentile bootstrap (Efron and Tibshirani 1993, sec. 13.3): questions are drawn with replacement, the statistic is
computed on every draw, and the interval holds the middle `confidence` of its values. Two systems on the same
questions are drawn together (paired), so that what makes a question hard cancels out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
BLOCK = 1_000_000  # indices drawn at once: bounds the memory to some tens of megabytes


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate from `n` questions and its bounds; low <= value <= high."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are computed: equal settings give equal intervals."""

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def mean(self, values: Sequence[float]) -> Interval:
        """Mean of `values`. Raises ValueError where there are none."""
        return self._interval(lambda drawn: drawn[..., 0].mean(axis=-1), values)

    def ratio(self, numerators: Sequence[float], denominators: Sequence[float]) -> Interval | None:
        """sum(numerators) / sum(denominators), paired; None where the denominators sum to 0."""
        if sum(denominators) == 0:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._interval(
                lambda drawn: drawn[..., 0].sum(axis=-1) / drawn[..., 1].sum(axis=-1), numerators, denominators
            )

    def difference(self, after: Sequence[float], before: Sequence[float]) -> Interval:
        """mean(after) - mean(before), paired."""
        return self.mean([late - early for late, early in zip(after, before, strict=True)])

    def paired(
        self, statistic: Callable[[Values, Values], float], left: Sequence[float], right: Sequence[float]
    ) -> Interval:
        """Any statistic of two columns drawn together, e.g. the ROC AUC of positives and negatives."""

        def each(drawn: Values) -> Values:
            if drawn.ndim == 2:
                return np.asarray(statistic(drawn[:, 0], drawn[:, 1]))
            return np.asarray([statistic(sample[:, 0], sample[:, 1]) for sample in drawn])

        return self._interval(each, left, right)

    def _interval(self, statistic: Callable[[Values], Values], *columns: Sequence[float]) -> Interval:
        """`statistic` reduces the last two axes of (..., questions, columns)."""
        table = np.column_stack([np.asarray(column, dtype=np.float64) for column in columns])  # (questions, columns)
        if len(table) == 0:
            raise ValueError("no questions to average over")
        value = float(statistic(table))
        drawn = np.concatenate([statistic(table[indices]) for indices in self._draws(len(table))])
        drawn = drawn[np.isfinite(drawn)]
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail]) if drawn.size else (value, value)
        # a very skewed sample can put the estimate a hair outside of the percentiles
        return Interval(value, min(value, float(low)), max(value, float(high)), len(table))

    def _draws(self, questions: int) -> Iterator[NDArray[np.int64]]:
        """Blocks of (resamples, questions) indices."""
        generator = np.random.default_rng(self.seed)
        block = max(1, BLOCK // questions)
        for start in range(0, self.resamples, block):
            yield generator.integers(questions, size=(min(block, self.resamples - start), questions))
