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
