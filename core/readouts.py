"""Readouts: how a compressor's hidden states become memory embeddings of the generator's width.

One small module each, chosen by `CompressorConfig.readout`. None knows which compressor made the hidden states.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.config import CompressorConfig
from core.rows import RowBatch

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ReadoutOutput:
    """memory (B, L, d_generator); weights (B, L, G) float32, what each embedding read of the chunk's generator
    tokens, or None; logits (B, W, G) float32 of the W pointers, minus infinity where they cannot go, or None."""

    memory: Tensor
    weights: Tensor | None = None
    logits: Tensor | None = None


def pick(logits: Tensor) -> Tensor:
    """The likeliest of the last dimension, as zeros and a one; gradients as of the softmax."""
    soft = logits.softmax(-1)
    likeliest = soft.argmax(-1, keepdim=True)
    sharp = (torch.arange(logits.shape[-1], device=logits.device) == likeliest).to(soft.dtype)
    return sharp + (soft - soft.detach()) if soft.requires_grad else sharp


def take(hidden: Tensor, positions: Tensor) -> Tensor:
    """Rows of `hidden` (B, T, d) at `positions` (B, N): (B, N, d)."""
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def candidates(batch: RowBatch) -> Tensor:
    """(B, G) bool: the first of the generator tokens that each of the compressor's tokens covers.

    A compressor with a tokenizer of its own tells no two generator tokens of one of its tokens apart: their logits
    are equal but for rounding, and a window could begin inside a number.
    """
    positions = batch.chunk_positions
    new = positions[:, 1:] != positions[:, :-1]
    first = torch.ones_like(batch.generator_mask[:, :1])  # (B, 1); `new` has no column where all chunks are one token
    return batch.generator_mask & torch.cat([first, new], dim=1)


class MemoryReadout(nn.Module):
    """The hidden state at each memory slot, projected (OSCAR sec. 3.1). `project` is the identity for n_layers."""

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project

    def forward(self, hidden: Tensor, batch: RowBatch, embed: Embed) -> ReadoutOutput:
        """hidden (B, T, d_compressor) -> memory (B, L, d_generator)."""
        return ReadoutOutput(self.project(take(hidden, batch.memory_positions)))


class PooledReadout(nn.Module):
    """The mean hidden state over each of l equal segments of the chunk, projected (mean pooling: arXiv 2510.20797)."""

    def __init__(self, project: nn.Module) -> None:
        super().__init__()
        self.project = project

    def forward(self, hidden: Tensor, batch: RowBatch, embed: Embed) -> ReadoutOutput:
        """hidden (B, T, d_compressor) -> memory (B, L, d_generator), weights (B, L, G)."""
        count = batch.memory_mask.sum(1).view(-1, 1)  # (B, 1)
        length = batch.generator_mask.sum(1).view(-1, 1)
        token = torch.arange(batch.generator_mask.shape[1], device=hidden.device)  # (G,)
        slot = torch.arange(batch.memory_mask.shape[1], device=hidden.device)  # (L,)
        # A token falls to slot floor(token * count / length), written without a division: not all devices have an
        # exact one of integers.
        scaled = (token * count).unsqueeze(1)  # (B, 1, G)
        begin = slot.view(1, -1, 1) * length.unsqueeze(1)  # (B, L, 1)
        inside = (scaled >= begin) & (scaled < begin + length.unsqueeze(1))
        member = inside & batch.generator_mask.unsqueeze(1)  # (B, L, G)
        weights = member.float() / member.sum(-1, keepdim=True).clamp(min=1)
        pooled = weights.to(hidden.dtype) @ take(hidden, batch.chunk_positions)  # (B, L, d_compressor)
        return ReadoutOutput(self.project(pooled), weights=weights)


class PointerReadout(nn.Module):
    """Copies of the chunk's own tokens, plus a residual (after pointer networks, Vinyals et al. 2015).

    The slots form windows of `window` consecutive ones. The first slot of a window asks where to look: the likeliest of
    the compressor's tokens of the chunk, at its first generator token, is its start. Slot j of the window is the
    generator's input embedding of the token j - lead places after the start, plus a zero-initialised projection of the
    slot's hidden state. A window that reaches past an end of the chunk reads nothing there: slid back into it, it would
    not say any more where the answer begins. So memory embeddings lie in the generator's embedding space before any
    training, and a generator that reads text reads them.

    Gradients are those of the expectation over all starts (straight-through, Bengio et al. 2013): in the forward pass
    the mean of several places is none of them.
    """

    def __init__(self, compressor_width: int, generator_width: int, window: int, lead: int) -> None:
        super().__init__()
        self.window = window
        self.lead = min(lead, window - 1)
        self.query = nn.Linear(compressor_width, compressor_width)
        self.key = nn.Linear(compressor_width, compressor_width)
        self.residual = nn.Linear(compressor_width, generator_width)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)

    def forward(self, hidden: Tensor, batch: RowBatch, embed: Embed) -> ReadoutOutput:
        """hidden (B, T, d_compressor) -> memory (B, L, d_generator), weights (B, L, G) of 0 and 1, logits (B, W, G)."""
        slots = take(hidden, batch.memory_positions)  # (B, L, d_compressor)
        queries = self.query(slots[:, :: self.window])  # (B, W, d_compressor)
        keys = self.key(take(hidden, batch.chunk_positions))  # (B, G, d_compressor)
        with torch.autocast(hidden.device.type, enabled=False):
            # In float32 whatever the rest runs in: a sharp pointer's logits are large and close to each other.
            logits = queries.float() @ keys.float().transpose(1, 2) / keys.shape[-1] ** 0.5  # (B, W, G)
        # Windows of one token must be able to reach every token.
        places = candidates(batch) if self.window > 1 else batch.generator_mask
        logits = self.apart(logits.masked_fill(~places.unsqueeze(1), float("-inf")))
        weights = self.spread(pick(logits))[:, : slots.shape[1]]  # (B, L, G)
        weights = weights * batch.generator_mask.unsqueeze(1)  # a window can reach past the chunk's end
        tokens = embed(batch.generator_ids)  # (B, G, d_generator)
        memory = weights.to(tokens.dtype) @ tokens + self.residual(slots).to(tokens.dtype)
        return ReadoutOutput(memory, weights=weights, logits=logits)

    def apart(self, logits: Tensor) -> Tensor:
        """Logits (B, W, G) under which no window of a row overlaps the likeliest place of one before it.

        Pointers trained to find the same answer agree; the second is there for where the first is wrong. One that has
        nowhere left to go stays.
        """
        token = torch.arange(logits.shape[-1], device=logits.device)  # (G,)
        chosen = [logits[:, 0]]
        taken = torch.zeros_like(chosen[0], dtype=torch.bool)  # (B, G)
        for following in logits.unbind(1)[1:]:
            best = chosen[-1].argmax(-1, keepdim=True)  # (B, 1)
            taken = taken | ((token - best).abs() < self.window)
            left = following.masked_fill(taken, float("-inf"))
            somewhere = left.isfinite().any(-1, keepdim=True)  # (B, 1)
            chosen.append(torch.where(somewhere, left, following))
        return torch.stack(chosen, dim=1)

    def spread(self, starts: Tensor) -> Tensor:
        """Start distributions (B, W, G) -> weights of each window's slots (B, W * window, G): shifted copies."""
        size = starts.shape[-1]
        padded = functional.pad(starts, (self.window - 1 - self.lead, self.lead))  # (B, W, G + window - 1)
        # The slice from o on is shifted by window-1-lead-o, so the last one is the first slot's.
        slices = [padded[..., first : first + size] for first in reversed(range(self.window))]
        shifted = torch.stack(slices, dim=2)  # (B, W, window, G)
        return shifted.flatten(1, 2)  # (B, W * window, G)


def build_readout(
    config: CompressorConfig, compressor_width: int, generator_width: int
) -> MemoryReadout | PooledReadout | PointerReadout:
    """The readout `config` asks for: widths are those of the compressor's hidden states and of the generator."""
    if config.readout == "pointer":
        return PointerReadout(compressor_width, generator_width, config.pointer_window, config.pointer_lead)
    project: nn.Module = nn.Identity()
    if config.kind == "encoder":
        # FC-ReLU-FC to the generator's width (OSCAR app. J).
        project = nn.Sequential(
            nn.Linear(compressor_width, config.projection_dim),
            nn.ReLU(),
            nn.Linear(config.projection_dim, generator_width),
        )
    return MemoryReadout(project) if config.readout == "memory" else PooledReadout(project)
