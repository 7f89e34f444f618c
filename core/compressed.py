"""What became of chunks and passages. Knows no weights."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CompressedChunk:
    """What became of one chunk.

    start, end  its character span in `Passage.content`; tokens: its length in generator tokens
    memory      (l, d_generator) memory embeddings
    score       raw relevance score
    weights     (l, tokens) float32: what each embedding read of the chunk's generator tokens; None without evidence
    cached      what was known before: the `document` (all but the query and the slots), or the `embedding` itself
    """

    start: int
    end: int
    tokens: int
    memory: Tensor
    score: float
    weights: Tensor | None
    cached: Literal["document", "embedding"] | None = None


@dataclass(frozen=True, slots=True)
class CompressedPassage:
    """One passage: its chunks in order, and its relevance, the calibrated best of its chunks' scores, in 0..1.

    One that the compressor has not read has no chunks, and its relevance is None.
    """

    index: int
    chunks: tuple[CompressedChunk, ...]
    relevance: float | None

    @property
    def memory(self) -> Tensor:
        """All memory embeddings of the passage, (sum of l, d_generator)."""
        return torch.cat([chunk.memory for chunk in self.chunks])

    @property
    def memory_tokens(self) -> int:
        """Memory embeddings of the passage."""
        return sum(len(chunk.memory) for chunk in self.chunks)

    @property
    def tokens(self) -> int:
        """Generator tokens of the passage as text."""
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def score(self) -> float:
        """Raw relevance score: the best of its chunks', and under all others without any."""
        return max((chunk.score for chunk in self.chunks), default=-math.inf)
