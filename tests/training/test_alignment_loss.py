"""The alignment loss counts only the pointers a row has."""

import torch

from training.losses import alignment_loss


def test_a_row_with_fewer_pointers_costs_what_it_costs_alone() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    logits[1, :, 5:] = float("-inf")  # padding
    hits = torch.zeros(2, 7, dtype=torch.bool)
    hits[0, 2:4] = hits[1, 1] = True
    exists = torch.tensor([[True, True, True], [True, True, False]])
    whole = torch.ones(1, 3, dtype=torch.bool)
    alone = alignment_loss(logits[:1], hits[:1], whole) + alignment_loss(logits[1:, :2], hits[1:], whole[:, :2])
    torch.testing.assert_close(alignment_loss(logits, hits, exists), alone)


def test_pointers_that_do_not_exist_learn_nothing() -> None:
    logits = torch.randn(1, 2, 5, requires_grad=True)
    hits = torch.tensor([[False, True, False, False, False]])
    alignment_loss(logits, hits, torch.tensor([[True, False]])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].any()
    assert not logits.grad[0, 1].any()


def test_a_pointer_that_cannot_reach_the_answer_neither_helps_nor_breaks_gradients() -> None:
    logits = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(1))
    blocked = logits.clone()
    blocked[0, 1, 1:4] = float("-inf")  # the first pointer's window, in which the answer is
    blocked.requires_grad_()
    hits = torch.tensor([[False, False, True, False, False, False]])
    loss = alignment_loss(blocked, hits, torch.ones(1, 2, dtype=torch.bool))
    miss = -blocked[0, 0].log_softmax(-1)[2]
    torch.testing.assert_close(loss, miss)  # half of it the first's own, half that of both together
    loss.backward()
    assert blocked.grad is not None
    assert blocked.grad.isfinite().all()
    assert not blocked.grad[0, 1].any()


def test_a_second_pointer_is_rewarded_for_an_answer_that_the_first_misses() -> None:
    logits = torch.zeros(1, 2, 6)
    logits[0, 0, 0] = 5.0  # wrong, and sure of it
    logits[0, 1, 0] = float("-inf")
    logits.requires_grad_()
    hits = torch.tensor([[False, False, False, False, True, False]])
    alignment_loss(logits, hits, torch.ones(1, 2, dtype=torch.bool)).backward()
    assert logits.grad is not None
    assert logits.grad[0, 1, 4] < -0.1
