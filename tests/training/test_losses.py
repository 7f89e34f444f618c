"""The parts of the objective against values made by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.losses import alignment_loss, answer_loss, kl_loss, relevance_loss

EVERY = torch.tensor([[True, True]])  # one row, both pointers exist


def test_answer_loss_is_the_sum_of_minus_log_probabilities() -> None:
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert answer_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(-math.log(0.75) - math.log(0.5))


def test_kl_of_equal_distributions_is_zero() -> None:
    student = torch.tensor([[0.5, 0.3, 0.2]]).log()
    everything = torch.tensor([[0, 1, 2]])
    assert kl_loss(student, everything, student).item() == pytest.approx(0.0, abs=1e-6)


def test_kl_renormalises_the_stored_part() -> None:
    # The teacher kept tokens 0 and 2 with 0.6 and 0.2: renormalised 0.75 and 0.25.
    student = torch.tensor([[0.5, 0.3, 0.2]]).log()
    loss = kl_loss(student, torch.tensor([[0, 2]]), torch.tensor([[0.6, 0.2]]).log())
    assert loss.item() == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.2))


def test_kl_temperature_softens_both_sides_and_keeps_the_size() -> None:
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    p, q = torch.tensor([0.0, 2.0]).softmax(0), torch.tensor([1.0, 0.0]).softmax(0)
    expected = 4 * float((p * (p / q).log()).sum())
    loss = kl_loss(student, torch.tensor([[0, 1]]), teacher.log_softmax(-1), temperature=2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_relevance_mse_is_the_sum_of_squares() -> None:
    scores, targets = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])
    assert relevance_loss(scores, targets, torch.tensor([0, 0]), "mse").item() == pytest.approx(0.25 + 16)


def test_mse_listwise_adds_the_divergence_from_the_teachers_softmax_of_each_question() -> None:
    scores, targets = torch.tensor([0.0, 0.0, 5.0]), torch.tensor([math.log(3), 0.0, -1.0])
    example = torch.tensor([0, 0, 1])
    mse = relevance_loss(scores, targets, example, "mse").item()
    # (3/4, 1/4) against (1/2, 1/2); one passage alone compares with nothing
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert relevance_loss(scores, targets, example, "mse_listwise").item() - mse == pytest.approx(divergence, rel=1e-4)


def test_listwise_adds_only_examples_with_both_kinds() -> None:
    scores, targets = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1.0, 0.0, 1.0])
    example = torch.tensor([0, 0, 1])
    bce = relevance_loss(scores, targets, example, "bce").item()
    assert bce == pytest.approx(math.log1p(math.exp(-1)) + math.log(2) + math.log1p(math.exp(-3)))
    listwise = relevance_loss(scores, targets, example, "bce_listwise").item()
    assert listwise - bce == pytest.approx(math.log(1 + math.e) - 1)


def test_a_target_in_the_middle_counts_as_relevant() -> None:
    scores, example = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    bce, listwise = (
        relevance_loss(scores, torch.tensor([0.5, 0.0]), example, kind).item() for kind in ("bce", "bce_listwise")
    )
    assert listwise - bce == pytest.approx(math.log(1 + math.e) - 1)


def test_alignment_of_one_pointer_is_minus_log_of_the_mass_on_hits() -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.25, 0.0]]]).log()  # the last token is padding
    hits = torch.tensor([[False, True, True, False]])
    assert alignment_loss(logits, hits, EVERY[:, :1]).item() == pytest.approx(-math.log(0.5))


def test_alignment_of_two_pointers_is_half_the_first_and_half_a_noisy_or() -> None:
    logits = torch.tensor([[[0.5, 0.5], [0.2, 0.8]]]).log()
    hits = torch.tensor([[True, False]])
    any_found = 1 - 0.5 * 0.8
    loss = alignment_loss(logits, hits, EVERY).item()
    assert loss == pytest.approx(0.5 * (-math.log(0.5) - math.log(any_found)))


def test_a_pointer_that_a_row_does_not_have_finds_nothing_for_it() -> None:
    logits = torch.tensor([[[0.5, 0.5], [0.999, 0.001]]]).log().requires_grad_()
    loss = alignment_loss(logits, torch.tensor([[True, False]]), torch.tensor([[True, False]]))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(0.5))
    assert logits.grad is not None
    assert logits.grad[0, 1].abs().sum() == 0


def test_rows_without_a_hit_count_nothing() -> None:
    logits = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]]).log().requires_grad_()
    hits = torch.tensor([[True, False], [False, False]])
    exists = torch.ones(2, 1, dtype=torch.bool)
    alignment_loss(logits, hits, exists).backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1].abs().sum() == 0
    assert alignment_loss(logits, torch.zeros_like(hits), exists).item() == 0


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=3), st.integers(1, 6))
def test_alignment_is_finite_and_so_is_its_gradient(values: list[float], mask: int) -> None:
    logits = torch.tensor([[values, values[::-1]]], requires_grad=True)
    hits = torch.tensor([[bool(mask & 1), bool(mask & 2), bool(mask & 4)]])
    loss = alignment_loss(logits, hits, EVERY)
    loss.backward()
    assert logits.grad is not None
    assert math.isfinite(loss.item())
    assert loss.item() >= -1e-4
    assert logits.grad.isfinite().all()
