"""Several questions on one text prompt: each reads the passages, none reads another. Pure functions of tensors.

A prompt's passages cost far more than its question, so questions that share them share that cost (the shared-prefix
packing of tree-shaped training, as for multi-turn or multi-sample data).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core.kv_slots import AttentionMasks


@dataclass(frozen=True, slots=True)
class Packed:
    """One sequence for the generator: a prefix, then for each question its tail and its answer.

    ids          (T,) int64
    memory_mask  (T,) bool, true where a memory embedding comes
    positions    (T,) int64: every question begins where the prefix ends
    segments     (T,) int64: 0 in the prefix, n in the n-th question
    predictors   (n,) int64: for every answer token in order, the place whose hidden state predicts it
    """

    ids: Tensor
    memory_mask: Tensor
    positions: Tensor
    segments: Tensor
    predictors: Tensor


def pack(prefix: Tensor, memory_mask: Tensor, questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Packed:
    """Lay out `questions`, (tail, answer) token ids each, after `prefix` (P,) with its `memory_mask` (P,)."""
    ids, positions = [prefix], [torch.arange(len(prefix))]
    segments, predictors = [torch.zeros(len(prefix), dtype=torch.int64)], []
    end = len(prefix)
    for number, (tail, answer) in enumerate(questions, start=1):
        size = len(tail) + len(answer)
        ids.append(torch.tensor([*tail, *answer], dtype=torch.int64))
        positions.append(torch.arange(len(prefix), len(prefix) + size))
        segments.append(torch.full((size,), number))
        first = end + len(tail) - 1
        predictors.append(torch.arange(first, first + len(answer)))
        end += size
    shown = torch.zeros(end, dtype=torch.bool)
    shown[: len(prefix)] = memory_mask
    return Packed(torch.cat(ids), shown, torch.cat(positions), torch.cat(segments), torch.cat(predictors))


def packed_mask(sequences: Sequence[Packed], positions: Tensor, masks: AttentionMasks) -> Tensor | dict[str, Tensor]:
    """Additive attention masks (B, 1, T, T) of `sequences`, padded on the right as their `positions` (B, T) are.

    A place looks back at the prefix and at its own question, as far as the window of its layer reaches; padding looks
    at itself, so that no row is empty.
    """
    segments = pad_sequence([one.segments for one in sequences], batch_first=True, padding_value=-1)  # (B, T)
    segments = segments.to(positions.device)
    own = segments.unsqueeze(2) == segments.unsqueeze(1)  # (B, T, T)
    prefix = (segments == 0).unsqueeze(1)  # (B, 1, T)
    return masks.between(positions, positions, own | prefix)
