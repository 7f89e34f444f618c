"""Forward passes of a running batch, and the keys and values they leave. Knows no sequences and no sampling.

`decoding.py` says which rows; here is what runs them: the generator as it is, over `kv_slots.py`. Graphs of fixed
shapes (`core.accelerators.generator_passes`) stand in the same place.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from core.generator import Generator
from core.kv_slots import CAPACITY_STEP, AttentionMasks, KVSlots, PromptPrefix
from core.prompts import Prompt, stack_prompts

IDLE_FACTOR = 4  # an empty batch gives back slots that are this much more than what comes next needs


class DecodePasses(Protocol):
    """Passes over rows that keep their keys and values; live rows are the first ones.

    max_sequences  rows there can be
    max_tokens     positions of a row, prompt and answer
    """

    max_sequences: int
    max_tokens: int

    @property
    def bytes(self) -> int:
        """Memory of keys and values now."""

    def reserve(self, rows: int, tokens: int, *, idle: bool) -> None:
        """Make room for `rows` rows of `tokens` positions. `idle`: nothing that is there is needed any more."""

    def prefill(self, first: int, prompts: Sequence[Prompt]) -> Tensor:
        """Read `prompts` into the rows from `first` on; the next logits of each `(B, V)`. Other rows stay as they are.

        Where it raises, the rows before `first` are as they were.
        """

    def decode(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """Read the newest token of each of the first n rows; their next logits `(n, V)`. Other rows stay as they are.

        tokens, positions  (n,) int64, a token and where it stands in its row
        width              of the longest of these rows, the new token included

        Where it raises, the rows are as they were, and it can be called again.
        """

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over those of `target`."""

    def forget(self, row: int) -> None:
        """Zeros in place of the keys and values of `row`."""


class TorchPasses:
    """`generator` itself, on its own device; shapes are as long as the prompts.

    A prompt that begins with `prefix` (`read_prefix`) shares its keys and values.
    """

    def __init__(
        self, generator: Generator, max_sequences: int, max_tokens: int, prefix: PromptPrefix | None = None
    ) -> None:
        self.max_sequences, self.max_tokens = max_sequences, max_tokens
        config = generator.model.config
        self._generator = generator
        self._prefix = prefix
        self._cache = KVSlots(config.num_hidden_layers, max_sequences, max_tokens)
        self._masks = AttentionMasks(config, generator.dtype)

    @property
    def bytes(self) -> int:
        """At most max_sequences * max_tokens * bytes of one token's."""
        return self._cache.bytes

    def reserve(self, rows: int, tokens: int, *, idle: bool) -> None:
        """As the protocol has it; one long prompt does not hold its memory for ever."""
        if idle and self._cache.slots * self._cache.capacity > IDLE_FACTOR * rows * (tokens + CAPACITY_STEP):
            self._cache.clear()
        self._cache.reserve(rows, tokens)

    def prefill(self, first: int, prompts: Sequence[Prompt]) -> Tensor:
        """One forward pass over prompts, or what follows their shared prefix."""
        generator, device = self._generator, self._generator.device
        prefix = self._prefix
        if prefix and not all(prompt.begins_with(prefix.ids) for prompt in prompts):
            prefix = None
        shared = len(prefix.ids) if prefix else 0
        batch = stack_prompts(prompts)
        length = batch.ids.shape[1]
        ids, memory_mask = batch.ids[:, shared:].to(device), batch.memory_mask[:, shared:].to(device)  # (B, T) each
        self._cache.begin_prefill(first, prefix)
        try:
            hidden = generator.hidden_states(
                generator.splice(ids, memory_mask, batch.memory.to(device)),  # (B, T, d)
                mask=self._masks.prefill(shared, length, device),
                positions=torch.arange(shared, length, device=device)[None],
                cache=self._cache,
            )
        except BaseException:
            if not first:
                self._cache.clear()  # what did not fit is not kept for a smaller batch that may
            raise
        ends = torch.tensor([prompt.tokens for prompt in prompts], device=device) - 1 - shared
        return generator.next_logits(hidden[torch.arange(len(prompts), device=device), ends])

    def decode(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """One forward pass over the slots where they lie."""
        self._cache.begin_decode(positions, width)
        hidden = self._generator.hidden_states(
            self._generator.embed(tokens[:, None]),  # (n, 1, d)
            mask=self._masks.decode(positions, width),
            positions=positions[:, None],
            cache=self._cache,
        )
        return self._generator.next_logits(hidden[:, 0])

    def move(self, source: int, target: int, length: int) -> None:
        """As the protocol has it."""
        self._cache.move(source, target, length)

    def forget(self, row: int) -> None:
        """As the protocol has it."""
        self._cache.forget(row)


@torch.inference_mode()
def read_prefix(generator: Generator, ids: Sequence[int]) -> PromptPrefix:
    """Read tokens that prompts begin with (`PromptTemplate.prefix`) once, for every `DecodeBatch` of these weights."""
    tokens = torch.tensor(ids, dtype=torch.int64, device=generator.device)
    size, config = len(tokens), generator.model.config
    cache = KVSlots(config.num_hidden_layers, 1, size)
    cache.reserve(1, size)
    cache.begin_prefill(0)
    mask = AttentionMasks(config, generator.dtype).prefill(0, size, generator.device)
    positions = torch.arange(size, device=generator.device)[None]
    generator.hidden_states(generator.embed(tokens[None]), mask=mask, positions=positions, cache=cache)
    return cache.prefix(tokens.cpu())
