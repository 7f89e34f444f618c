"""What each stage of an answer costs on one replica, and how long prompts become. Knows no traffic, no measurements."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.config import Mode

LABEL_TOKENS = 5  # "\n[3] " before each passage of a prompt
MODES: tuple[Mode, ...] = ("text", "compressed", "hybrid")


@dataclass(frozen=True, slots=True)
class Sizes:
    """One request, in generator tokens; `new_tokens` is the answer's length."""

    passages: int
    passage_tokens: int
    query_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one replica, and its memory.

    source, machine, device, model   what was measured where
    prepare     a token of the passages, tokenised and chunked
    compress    one batch; a position of its rows
    prefill     a prompt token; its square
    step        one decode step; a sequence in it; a position of a sequence
    chunk_tokens, query_tokens, rate, hybrid_top   of the checkpoint
    max_tokens  that its generator reads and writes, together
    overhead_tokens   of a prompt, without query, passages and their labels
    weights_bytes, runtime_bytes   of the models, and all else that an idle replica holds
    kv_bytes    of one position of one sequence; 0 where it was not measured
    """

    source: str
    machine: str
    device: str
    model: str
    prepare: float
    compress: tuple[float, float]
    prefill: tuple[float, float]
    step: tuple[float, float, float]
    chunk_tokens: int
    query_tokens: int
    rate: int
    hybrid_top: int
    max_tokens: int
    overhead_tokens: float
    weights_bytes: int
    runtime_bytes: int
    kv_bytes: int

    def chunks(self, sizes: Sizes) -> int:
        """Of one passage."""
        return max(1, math.ceil(sizes.passage_tokens / self.chunk_tokens))

    def memory_tokens(self, sizes: Sizes) -> int:
        """Embeddings of one passage, cut into chunks of equal length."""
        chunks = self.chunks(sizes)
        return chunks * max(1, math.ceil(math.ceil(sizes.passage_tokens / chunks) / self.rate))

    def row_tokens(self, sizes: Sizes) -> int:
        """Positions of one row of the compressor: query, chunk, memory tokens and the relevance slot."""
        chunks = self.chunks(sizes)
        passage = math.ceil((sizes.passage_tokens + self.memory_tokens(sizes)) / chunks)
        return min(sizes.query_tokens, self.query_tokens) + passage + 1

    def prompt_tokens(self, sizes: Sizes, mode: Mode) -> int:
        """Positions that the generator reads."""
        shown = {"text": sizes.passages, "compressed": 0}.get(mode, min(sizes.passages, self.hybrid_top))
        embedded = 0 if mode == "text" else sizes.passages
        passages = shown * sizes.passage_tokens + embedded * self.memory_tokens(sizes)
        return round(self.overhead_tokens + sizes.query_tokens + sizes.passages * LABEL_TOKENS + passages)

    def prepare_s(self, sizes: Sizes) -> float:
        """Of one request."""
        return self.prepare * sizes.passages * sizes.passage_tokens

    def compress_s(self, positions: int) -> float:
        """Of one batch with so many positions, padding included."""
        return self.compress[0] + self.compress[1] * positions if positions else 0.0

    def prefill_s(self, prompts: Sequence[int]) -> float:
        """Of prompts of so many tokens, read together."""
        return self.prefill[0] * sum(prompts) + self.prefill[1] * sum(prompt**2 for prompt in prompts)

    def step_s(self, sequences: int, positions: float) -> float:
        """Of one step of so many sequences that have so many positions in all."""
        return self.step[0] + self.step[1] * sequences + self.step[2] * positions if sequences else 0.0

    def memory_bytes(self, sequences: int, positions: int) -> int:
        """Of a replica that has so many sequences of so many positions each."""
        return self.weights_bytes + self.runtime_bytes + self.kv_bytes * sequences * positions
