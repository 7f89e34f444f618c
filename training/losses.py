"""The parts of the training objective, as pure functions of tensors. Each returns a sum; callers divide by counts."""

import torch
from torch import Tensor
from torch.nn import functional

from training.config import LABEL_KINDS, RelevanceKind
from training.data_format import RELEVANT


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropy of answer tokens (OSCAR sec. 3.2): logits (n, V), targets (n,) int64 -> scalar."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def kl_loss(logits: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over tokens of KL(teacher || student) on the teacher's stored top k, which is renormalised.

    logits (n, V); teacher_ids (n, k) int64; teacher_logprobs (n, k) -> scalar. Scaled by temperature squared
    (Hinton et al. 2015), so that its gradients keep their size.
    """
    student = (logits.float() / temperature).log_softmax(-1).gather(1, teacher_ids)  # (n, k)
    teacher = (teacher_logprobs.float() / temperature).log_softmax(-1)  # (n, k)
    return functional.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def relevance_loss(scores: Tensor, targets: Tensor, example: Tensor, kind: RelevanceKind) -> Tensor:
    """Sum over passages of the loss on relevance scores.

    scores (P,) float32 raw passage scores; targets (P,) a teacher's scores (`mse`, OSCAR sec. 4.4) or 0/1 labels;
    example (P,) int64, which example each passage belongs to. The listwise kinds add, for each example, how far its
    passages' softmax is from the right one (ListNet, Cao et al. 2007): `mse_listwise` the divergence from the softmax
    of the teacher's scores, `bce_listwise` minus the log of the mass on its relevant passages, where it has both kinds.
    """
    labelled = kind in LABEL_KINDS
    pointwise = functional.binary_cross_entropy_with_logits if labelled else functional.mse_loss
    loss = pointwise(scores, targets, reduction="sum")
    if not kind.endswith("_listwise"):
        return loss
    within = _missed_mass if labelled else _divergence
    questions = (example == index for index in example.unique())
    return loss + sum(within(scores[inside], targets[inside]) for inside in questions)


def _divergence(scores: Tensor, teacher: Tensor) -> Tensor:
    return functional.kl_div(scores.log_softmax(0), teacher.log_softmax(0), reduction="sum", log_target=True)


def _missed_mass(scores: Tensor, labels: Tensor) -> Tensor:
    relevant = labels >= RELEVANT
    if not relevant.any() or relevant.all():
        return scores.new_zeros(())
    return scores.logsumexp(0) - scores[relevant].logsumexp(0)


def alignment_loss(logits: Tensor, hits: Tensor, exists: Tensor) -> Tensor:
    """Sum over rows of how badly the pointers miss the answer.

    logits (B, W, G) float32, minus infinity where a pointer cannot go: padding, and the windows before it; hits (B, G)
    bool, tokens at which a pointer is right; rows without a hit count nothing; exists (B, W) bool: rows with less
    memory than the widest of their batch have fewer pointers. Half is the first pointer's own miss, so that the lowest
    rate finds the answer by itself; half is the chance that all W miss (noisy or), so that further pointers cover what
    the first leaves.
    """
    with_hit = hits.any(1)
    if not bool(with_hit.any()):
        return logits.new_zeros(())
    logits, hits, exists = logits[with_hit], hits[with_hit], exists[with_hit]
    right = hits.unsqueeze(1) & logits.isfinite()  # (B, W, G)
    some = right.any(-1)  # (B, W): a pointer that cannot go where the answer is does not find it
    # Finite where nothing is right: the log of a sum of nothing has no gradient.
    reached = logits.masked_fill(~right & some.unsqueeze(-1), float("-inf")).logsumexp(-1)  # (B, W)
    found = (reached - logits.logsumexp(-1)).masked_fill(~some, float("-inf"))  # (B, W) log P
    first = -found[:, 0]
    if logits.shape[1] == 1:
        return first.sum()
    misses = torch.log1p(-found.exp().clamp(max=1 - 1e-6))  # (B, W) log of the chance that this one does not find it
    all_miss = (misses * exists).sum(1)  # (B,) log of the chance that none finds it
    any_found = torch.log(-torch.expm1(all_miss.clamp(max=-1e-6)))
    return 0.5 * (first - any_found).sum()
