"""Metrics, intervals and calibration against values worked out by hand, and their laws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.calibration import (
    balanced_accuracy,
    best_scores,
    best_threshold,
    calibration_error,
    fit_platt,
    measure_no_answer,
)
from training.intervals import Bootstrap
from training.metrics import (
    best_over_references,
    exact_match,
    gold_first,
    named_tokens,
    ndcg,
    normalise_answer,
    reciprocal_rank,
    roc_auc,
    rouge_l,
    substring_accuracy,
    survival,
    token_f1,
)

SENTENCES = st.lists(st.sampled_from(["the", "Cat", "sat", "1,116", "mat.", "Ångström", "日本"]), max_size=8).map(
    " ".join
)
SCORES = st.lists(st.floats(-100, 100), min_size=1, max_size=12)
RANKINGS = st.lists(st.tuples(st.floats(-5, 5), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12)


def test_normalise_answer_drops_case_punctuation_and_articles() -> None:
    assert normalise_answer("  The  Denver Broncos, (a team).") == "denver broncos team"


@pytest.mark.parametrize(
    ("prediction", "reference", "em", "f1", "substring", "rouge"),
    [
        ("The Broncos.", "broncos", 1, 1, 1, 2 / 3),
        ("Denver Broncos", "the Broncos", 0, 2 / 3, 1, 1 / 2),
        ("in 1066", "1067", 0, 0, 0, 0),
        ("c b a", "a b c", 0, 1, 0, 1 / 3),  # "a" is an article
        ("", "", 1, 1, 1, 1),
        ("", "yes", 0, 0, 0, 0),
        ("yes", "the", 0, 0, 0, 0),  # a reference that is all article is not in everything
        ("a a b", "a b", 1, 1, 1, 4 / 5),
    ],
)
def test_answer_metrics(prediction: str, reference: str, em: float, f1: float, substring: float, rouge: float) -> None:
    assert exact_match(prediction, reference) == em
    assert token_f1(prediction, reference) == pytest.approx(f1)
    assert substring_accuracy(prediction, reference) == substring
    assert rouge_l(prediction, reference) == pytest.approx(rouge)


def test_best_over_references_takes_the_best() -> None:
    assert best_over_references(token_f1, "red car", ["blue", "car", "red car"]) == 1
    assert best_over_references(token_f1, "red car", ["car"]) == pytest.approx(2 / 3)


@given(SENTENCES, SENTENCES)
def test_answer_metrics_are_bounded_and_f_measures_are_symmetric(left: str, right: str) -> None:
    for metric in (exact_match, token_f1, substring_accuracy, rouge_l):
        assert 0 <= metric(left, right) <= 1
        assert metric(left, left) == 1
    assert token_f1(left, right) == pytest.approx(token_f1(right, left))
    assert rouge_l(left, right) == pytest.approx(rouge_l(right, left))
    assert exact_match(left, right) <= token_f1(left, right)
    assert exact_match(left, right) <= substring_accuracy(left, right)


def test_named_tokens_are_numbers_dates_and_names() -> None:
    assert named_tokens("The 1,116 men of Zürich") == {"1116", "zurich"}
    assert named_tokens("on 3 March 1998, two days") == {"3", "march", "1998", "two"}
    assert named_tokens("in the middle of it") == frozenset()


@pytest.mark.parametrize(
    ("prediction", "references", "passages", "expected"),
    [
        ("it has 1116 feet", ["1,116 feet"], ["It rose 1,116 feet."], 1.0),
        ("it has 116 feet", ["1,116 feet"], ["It rose 1,116 feet."], 0.0),
        ("Marie", ["Marie Curie"], ["By Marie Curie."], 0.0),
        ("curie, marie", ["Marie Curie"], ["By Marie Curie."], 1.0),
        ("Paris", ["Paris"], ["Nothing of the kind."], None),
        ("molecular", ["molecular orbitals"], ["the molecular orbitals"], None),
        ("Rome", ["Paris", "Rome"], ["Rome and Paris"], 1.0),
    ],
)
def test_survival(prediction: str, references: list[str], passages: list[str], expected: float | None) -> None:
    assert survival(prediction, references, passages) == expected


def test_ranking_metrics_by_hand() -> None:
    scores, gains = [0.1, 0.9, 0.5], [1.0, 0.0, 1.0]  # ranked: 0, 1, 1
    assert ndcg(scores, gains) == pytest.approx((1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3)))
    assert ndcg(scores, gains, k=1) == 0
    assert reciprocal_rank(scores, gains) == 1 / 2
    assert gold_first(scores, gains) == 0
    assert gold_first([3.0, 2.0], [1.0, 0.0]) == 1
    assert reciprocal_rank([1.0], [0.0]) == ndcg([1.0], [0.0]) == gold_first([], []) == 0


def test_ties_gain_nothing() -> None:
    assert gold_first([0.0, 0.0], [1.0, 0.0]) == 0
    assert reciprocal_rank([0.0] * 4, [1.0, 0.0, 0.0, 0.0]) == 1 / 4


def test_ranking_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="scores: not a number"):
        ndcg([math.nan], [1.0])
    with pytest.raises(ValueError, match="gains: 1 for 2 scores"):
        ndcg([1.0, 2.0], [1.0])


@given(RANKINGS)
def test_ranking_metrics_are_bounded_and_perfect_for_a_perfect_order(pairs: list[tuple[float, float]]) -> None:
    scores, gains = [score for score, _ in pairs], [gain for _, gain in pairs]
    found = float(any(gains))
    for metric in (ndcg, reciprocal_rank, gold_first):
        assert 0 <= metric(scores, gains) <= found
        assert metric(gains, gains) == found


def test_roc_auc_by_hand() -> None:
    assert roc_auc([2.0, 3.0], [1.0]) == 1
    assert roc_auc([1.0], [1.0]) == 0.5
    assert roc_auc([0.3, 0.8], [0.5, 0.1]) == 3 / 4
    with pytest.raises(ValueError, match="at least one"):
        roc_auc([], [1.0])


@given(SCORES, SCORES)
def test_roc_auc_counts_pairs_and_swaps_to_its_complement(left: list[float], right: list[float]) -> None:
    wins = sum((a > b) + 0.5 * (a == b) for a in left for b in right)
    assert roc_auc(left, right) == pytest.approx(wins / (len(left) * len(right)))
    assert roc_auc(left, right) + roc_auc(right, left) == pytest.approx(1)


def test_mean_interval_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    interval = Bootstrap(resamples=2000).mean(list(values))
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)
    assert interval.n == 400


def test_paired_ratio_is_tighter_than_its_parts() -> None:
    text = list(np.random.default_rng(2).uniform(0, 1, size=200))
    compressed = [0.9 * value for value in text]
    ratio = Bootstrap().ratio(compressed, text)
    assert ratio is not None
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((0.9, 0.9, 0.9))
    assert Bootstrap().ratio([1.0, 0.0], [0.0, 0.0]) is None


def test_bootstrap_draws_in_blocks_and_repeats_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.0, 1.0, 4.0, 9.0]
    whole = Bootstrap(resamples=50, seed=3).mean(values)
    monkeypatch.setattr("training.intervals.BLOCK", 8)
    assert Bootstrap(resamples=50, seed=3).mean(values) == whole
    assert Bootstrap(resamples=50, seed=4).mean(values) != whole
    with pytest.raises(ValueError, match="no questions"):
        Bootstrap().mean([])


@settings(max_examples=50)
@given(SCORES, st.integers(0, 5))
def test_intervals_contain_their_estimate(values: list[float], seed: int) -> None:
    bootstrap = Bootstrap(resamples=40, seed=seed)
    for interval in (
        bootstrap.mean(values),
        bootstrap.ratio(values, [abs(value) + 1 for value in values]),
        bootstrap.paired(roc_auc, values, values[::-1]),
    ):
        assert interval is not None
        assert interval.low <= interval.value <= interval.high
        assert interval.n == len(values)


def test_platt_scaling_recovers_the_logistic_that_made_the_labels() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(2.0, 3.0, size=20_000)
    labels = generator.uniform(size=scores.size) < 1 / (1 + np.exp(-(1.5 * scores - 2.0)))
    platt = fit_platt(list(scores), [bool(label) for label in labels])
    assert platt.scale == pytest.approx(1.5, rel=0.05)
    assert platt.bias == pytest.approx(-2.0, rel=0.05)
    assert calibration_error(platt(scores), [bool(label) for label in labels]) < 0.01


def test_platt_scaling_of_separable_or_equal_scores_is_finite() -> None:
    separable = fit_platt([0.0, 1.0, 1000.0, 1001.0], [False, False, True, True])
    assert np.all(np.isfinite([separable.scale, separable.bias]))
    assert separable([0.0, 1001.0]) == pytest.approx([1 / 4, 3 / 4], abs=0.02)  # Platt's targets
    equal = fit_platt([7.0, 7.0, 7.0], [True, False, False])
    assert equal([7.0])[0] == pytest.approx((2 / 3 + 1 / 4 + 1 / 4) / 3)
    with pytest.raises(ValueError, match="relevant and irrelevant"):
        fit_platt([1.0], [True])


def test_best_threshold_by_hand() -> None:
    assert best_threshold([0.8, 0.9], [0.1, 0.2]) == pytest.approx(0.5)
    assert best_threshold([0.8, 0.9, 0.15], [0.1, 0.2]) == pytest.approx(0.5)
    assert balanced_accuracy([0.8, 0.9, 0.15], [0.1, 0.2], 0.5) == pytest.approx((2 / 3 + 1) / 2)


@given(SCORES, SCORES)
def test_best_threshold_is_best_of_all_cuts(answerable: list[float], unanswerable: list[float]) -> None:
    best = balanced_accuracy(answerable, unanswerable, best_threshold(answerable, unanswerable))
    assert best >= 0.5
    for cut in {*answerable, *unanswerable}:
        assert best >= balanced_accuracy(answerable, unanswerable, cut) - 1e-12


def test_calibration_error_by_hand() -> None:
    assert calibration_error([0.95, 0.95, 0.05], [True, False, False]) == pytest.approx((0.9 + 0.05) / 3)
    assert calibration_error([1.0, 0.0], [True, False]) == 0


@pytest.mark.parametrize(("gold", "others"), [(1, 1), (1, 4), (2, 3), (3, 1)])
def test_a_random_ranker_tells_nothing_about_answerability(gold: int, others: int) -> None:
    random = np.random.default_rng(0)
    labels = [True] * gold + [False] * others
    questions = [(random.normal(size=gold + others).tolist(), labels) for _ in range(2000)]
    measured = measure_no_answer(questions, Bootstrap(resamples=100))
    assert measured.best_of == others
    assert measured.auc.value == pytest.approx(0.5, abs=0.025)
    assert measured.calibration is not None
    assert measured.calibration.balanced_accuracy == pytest.approx(0.5, abs=0.04)


def test_the_best_is_of_equally_many_passages_with_gold_and_without() -> None:
    random = np.random.default_rng(0)
    assert best_scores(([1.0, 5.0], [True, False]), random) == (1.0, 5.0)  # of two passages the gold one stands alone
    drawn = {best_scores(([1.0, 2.0, 3.0], [True, False, False]), random) for _ in range(50)}
    assert drawn == {(2.0, 3.0), (3.0, 3.0)}
    drawn = {best_scores(([1.0, 2.0, 3.0], [True, True, False]), random) for _ in range(50)}
    assert drawn == {(1.0, 3.0), (2.0, 3.0)}
    questions = [([float(i), 1.0, 2.0], [True, False, False]) for i in range(9)]
    assert measure_no_answer(questions, Bootstrap(seed=1)) == measure_no_answer(questions, Bootstrap(seed=1))
    assert measure_no_answer(questions[:1], Bootstrap()).calibration is None
