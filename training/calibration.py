"""From relevance scores to probabilities and a threshold for "not answerable". Knows nothing about models or files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.intervals import Bootstrap, Interval
from training.metrics import roc_auc

Values = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PlattScaling:
    """probability = sigmoid(scale * score + bias)."""

    scale: float
    bias: float

    def __call__(self, scores: Sequence[float] | Values) -> Values:
        """Probabilities in [0, 1], one a score."""
        return _sigmoid(self.scale * np.asarray(scores, dtype=np.float64) + self.bias)


def _sigmoid(logits: Values) -> Values:
    """The logistic function without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits)))


def fit_platt(scores: Sequence[float], labels: Sequence[bool], *, iterations: int = 100) -> PlattScaling:
    """Logistic regression on one score by damped Newton steps (Platt 1999; Lin, Lin and Weng 2007).

    The targets are Platt's, (n+ + 1) / (n+ + 2) and 1 / (n- + 2), so that separable scores give finite weights.
    Raises ValueError unless both labels occur.
    """
    raw, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    count = int(positive.sum())
    if count in (0, len(positive)):
        raise ValueError("calibration needs relevant and irrelevant passages")
    targets = np.where(positive, (count + 1) / (count + 2), 1 / (len(positive) - count + 2))
    centre, spread = raw.mean(), raw.std() or 1.0  # standardised scores keep the Newton step well conditioned
    design = np.column_stack([(raw - centre) / spread, np.ones_like(raw)])  # (passages, 2)
    weights = np.zeros(2)
    for _ in range(iterations):
        probability = _sigmoid(design @ weights)
        gradient = design.T @ (probability - targets)
        curvature = (design * (probability * (1 - probability))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = _damped(design, targets, weights, np.linalg.solve(curvature, gradient))
        weights = weights - step
        if float(np.abs(step).max()) < 1e-10:
            break
    return PlattScaling(float(weights[0] / spread), float(weights[1] - weights[0] * centre / spread))


def _damped(design: Values, targets: Values, weights: Values, step: Values) -> Values:
    """`step` halved until the cross entropy does not rise."""
    before = _cross_entropy(design @ weights, targets)
    for _ in range(30):
        if _cross_entropy(design @ (weights - step), targets) <= before + 1e-12:
            return step
        step = step / 2
    return np.zeros_like(step)


def _cross_entropy(logits: Values, targets: Values) -> float:
    return float((np.logaddexp(0.0, logits) - targets * logits).sum())


def best_threshold(answerable: Sequence[float] | Values, unanswerable: Sequence[float] | Values) -> float:
    """The value that parts the two best by balanced accuracy (Youden's J), midway between neighbours.

    A question counts as answerable at or above it. Raises ValueError where one side is empty.
    """
    yes, no = np.sort(np.asarray(answerable, np.float64)), np.sort(np.asarray(unanswerable, np.float64))
    if yes.size == 0 or no.size == 0:
        raise ValueError("a threshold needs answerable and unanswerable questions")
    values = np.unique(np.concatenate([yes, no]))
    # below everything, midway between neighbours, above everything
    candidates = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2, [np.nextafter(values[-1], np.inf)]])
    kept = 1 - np.searchsorted(yes, candidates, side="left") / yes.size
    refused = np.searchsorted(no, candidates, side="left") / no.size
    return float(candidates[int(np.argmax(kept + refused))])


def balanced_accuracy(
    answerable: Sequence[float] | Values, unanswerable: Sequence[float] | Values, threshold: float
) -> float:
    """Mean of the share of answerable at or above `threshold` and of unanswerable below it."""
    kept = np.mean(np.asarray(answerable) >= threshold)
    refused = np.mean(np.asarray(unanswerable) < threshold)
    return float((kept + refused) / 2)


def calibration_error(probabilities: Sequence[float] | Values, labels: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error over equal-width bins (Guo et al. 2017, eq. 3), in [0, 1]."""
    predicted, actual = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    gaps = [abs(float((predicted - actual)[index == bin].sum())) for bin in range(bins)]
    return sum(gaps) / len(predicted)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fitted on half of the questions, measured on the other half.

    scale, bias         Platt scaling of passage scores
    threshold           best calibrated relevance of a question below which it counts as not answerable
    balanced_accuracy   of that threshold on the other half
    calibration_error   of passage probabilities on the other half
    """

    scale: float
    bias: float
    threshold: float
    balanced_accuracy: float
    calibration_error: float


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """How well the best relevance tells answerable questions from the same ones with only irrelevant passages.

    best_of     mean number of passages whose best is taken, the same with gold passages and without
    auc         over all questions; 0.5 for a ranker that scores at random
    calibration None where there is but one question
    """

    best_of: float
    auc: Interval
    calibration: Calibration | None


Scored = tuple[Sequence[float], Sequence[bool]]  # scores and gold labels of one question's passages


def measure_no_answer(questions: Sequence[Scored], bootstrap: Bootstrap) -> NoAnswer:
    """No-answer detection and calibration; every question has at least one gold and one other passage.

    Each passage is scored alone, so a question without its gold passages needs no second pass: their scores are left
    out. Raises ValueError without questions.
    """
    random = np.random.default_rng(bootstrap.seed)
    order = random.permutation(len(questions))
    best = np.asarray([best_scores(question, random) for question in questions])  # (questions, 2)
    fit, held = np.array_split(order, 2)
    return NoAnswer(
        best_of=float(np.mean([len(gold) - sum(gold) for _, gold in questions])),
        auc=bootstrap.paired(roc_auc, best[:, 0].tolist(), best[:, 1].tolist()),
        calibration=_calibrate(questions, best, fit, held) if held.size else None,
    )


def best_scores(question: Scored, random: np.random.Generator) -> tuple[float, float]:
    """The best score with the gold passages among them, and the best of the irrelevant ones alone.

    Both are of equally many scores: the best of more is higher by chance alone. So as many irrelevant passages, drawn
    by `random`, make way as there are gold ones; of more gold passages than irrelevant ones, as many are drawn.
    """
    order = random.permutation(len(question[0]))
    scores, gold = np.asarray(question[0], np.float64)[order], np.asarray(question[1], bool)[order]
    irrelevant = scores[~gold]
    with_gold = np.concatenate([scores[gold], irrelevant])[: irrelevant.size]
    return float(with_gold.max()), float(irrelevant.max())


def _calibrate(questions: Sequence[Scored], best: Values, fit: Indices, held: Indices) -> Calibration:
    """Scaling and threshold from the questions `fit`, their quality on those of `held`; `best` is (questions, 2)."""
    platt = fit_platt(*_flatten([questions[i] for i in fit]))
    answerable, unanswerable = platt(best).T  # (questions,) each
    threshold = min(1.0, best_threshold(answerable[fit], unanswerable[fit]))
    scores, labels = _flatten([questions[i] for i in held])
    return Calibration(
        platt.scale,
        platt.bias,
        threshold,
        balanced_accuracy(answerable[held], unanswerable[held], threshold),
        calibration_error(platt(scores), labels),
    )


def _flatten(questions: Sequence[Scored]) -> tuple[list[float], list[bool]]:
    """All passages' scores and labels."""
    scores = [float(score) for values, _ in questions for score in values]
    return scores, [gold for _, labels in questions for gold in labels]
