"""Continuous batching: sequences join and leave a running batch between tokens. Knows no passages and no requests.

The idea is Orca's iteration-level scheduling (OSDI 2022, sec. 3.1) over static slots: live sequences always stand in
the first rows, so a step is one forward pass over views of the slots, and no row costs another anything but time.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from core.decode_passes import DecodePasses, TorchPasses
from core.errors import OverloadedError, TooLargeError
from core.generator import Generator
from core.kv_slots import PromptPrefix
from core.prompts import Prompt
from core.rows import plan_batches
from core.sampling import GenerationOptions, RowSampler
from core.text_stream import TextStream

MAX_PREFILL_TOKENS = 4096  # padded positions of one prefill pass; a longer prompt gets a pass of its own

FinishReason = Literal["stop", "length"]


@dataclass(eq=False, slots=True)
class Sequence:
    """One answer that is being written. Made by `DecodeBatch.add`.

    max_new_tokens  what its options and the batch's room allow
    token_ids       tokens written so far, with the end-of-turn token
    row             where it stands in the batch; -1 once it has left
    """

    options: GenerationOptions
    prompt_tokens: int
    max_new_tokens: int
    stream: TextStream
    row: int = -1
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Event:
    """One new token of one sequence: `text` is what it adds to the answer, perhaps nothing."""

    sequence: Sequence
    token_id: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; `token_ids` has the end-of-turn token where the model wrote it."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


class DecodeBatch:
    """A running batch of at most `max_sequences` sequences of at most `max_tokens` tokens, prompt and answer.

    A prompt that begins with `prefix` (`read_prefix`) shares its keys and values: beside a few memory embeddings the
    instruction is a good part of the prompt. `passes` stand in for the generator's own, and set limits too.

    Not thread-safe: one thread drives it. If `add` or `step` raises, the sequences that were live still are, as they
    were before the call, and it can be called again.
    """

    def __init__(
        self,
        generator: Generator,
        max_sequences: int,
        max_tokens: int,
        prefix: PromptPrefix | None = None,
        passes: DecodePasses | None = None,
    ) -> None:
        self.generator = generator
        max_tokens = min(max_tokens, generator.max_tokens)
        self._passes = passes or TorchPasses(generator, max_sequences, max_tokens, prefix)
        self.max_sequences = min(max_sequences, self._passes.max_sequences)
        self.max_tokens = min(max_tokens, self._passes.max_tokens)
        vocabulary = generator.model.config.vocab_size
        self._sampler = RowSampler(self.max_sequences, self.max_tokens, vocabulary, generator.device, generator.dtype)
        self._sequences: list[Sequence] = []  # by row: first those that decode, then those only prefilled yet
        self._decoding = 0  # the first rows, whose newest token awaits its forward pass; the others have logits

    @property
    def live(self) -> int:
        """Sequences in the batch."""
        return len(self._sequences)

    @property
    def free_slots(self) -> int:
        """Sequences that can still join."""
        return self.max_sequences - self.live

    @property
    def kv_bytes(self) -> int:
        """Memory of keys and values now; at most max_sequences * max_tokens * bytes of one token's."""
        return self._passes.bytes

    @torch.inference_mode()
    def add(self, prompts: Many[Prompt], options: Many[GenerationOptions]) -> list[Sequence]:
        """Prefill `prompts` and let them join; the next `step` gives the first token of each.

        Raises OverloadedError where slots are missing, TooLargeError where a prompt leaves no room for an answer.
        """
        if not prompts:
            return []
        if len(prompts) > self.free_slots:
            raise OverloadedError(f"{len(prompts)} sequences need a slot; {self.free_slots} are free", retry_after_s=0)
        sequences = [self._sequence(*pair) for pair in zip(prompts, options, strict=True)]
        before = self.live
        longest = max(each.tokens + each.max_new_tokens for each in sequences)
        self._passes.reserve(before + len(sequences), longest, idle=before == 0)
        try:
            for indices in plan_batches([prompt.tokens for prompt in prompts], MAX_PREFILL_TOKENS):
                self._prefill([prompts[i] for i in indices], [sequences[i] for i in indices])
        except BaseException:
            del self._sequences[before:]
            raise
        return sequences

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for every live sequence, in one forward pass; those that finish leave."""
        if self._decoding:
            self._decode(self._decoding)
            self._decoding = 0
        if not self.live:
            return []
        tokens = self._sampler.sample(self.live).tolist()
        self._decoding = self.live
        events = [self._advance(sequence, token) for sequence, token in zip(self._sequences, tokens, strict=True)]
        for event in reversed(events):  # from the last row on, so that fewer rows move
            if event.finish_reason:
                self._release(event.sequence)
        return events

    @torch.inference_mode()
    def cancel(self, sequence: Sequence) -> None:
        """Take `sequence` out and free its slot; nothing happens where it has left already."""
        if sequence.row >= 0:
            self._release(sequence)

    def _sequence(self, prompt: Prompt, options: GenerationOptions) -> Sequence:
        limit = self.max_tokens - 1
        if prompt.tokens > limit:
            raise TooLargeError("passages", f"the prompt has {prompt.tokens} tokens; at most {limit} fit", limit)
        stream = TextStream(self.generator.tokenizer, options.stop)
        return Sequence(options, prompt.tokens, min(options.max_new_tokens, self.max_tokens - prompt.tokens), stream)

    def _prefill(self, prompts: list[Prompt], sequences: list[Sequence]) -> None:
        """Read prompts into the rows behind the live ones."""
        first = self.live
        logits = self._passes.prefill(first, prompts)  # (B, V)
        self._forget_damaged(first, logits)
        lengths = [prompt.tokens for prompt in prompts]
        self._sampler.join(first, logits, lengths, [sequence.options for sequence in sequences])
        for row, sequence in enumerate(sequences, start=first):
            sequence.row = row
        self._sequences += sequences

    def _decode(self, rows: int) -> None:
        """One forward pass over the newest token of the first `rows` rows; their next logits."""
        width = max(sequence.tokens for sequence in self._sequences[:rows])
        logits = self._passes.decode(self._sampler.tokens[:rows], self._sampler.positions[:rows], width)  # (n, V)
        self._forget_damaged(0, logits)
        self._sampler.advance(logits)

    def _forget_damaged(self, first: int, logits: Tensor) -> None:
        """Of rows, from `first` on, whose next logits are no numbers any more, neither are the keys and values.

        A row's next sequence is shown none of them, but a weight of 0 on a value that is no number is none either.
        """
        for row in (~logits.amax(-1).isfinite()).nonzero().squeeze(-1).tolist():
            self._passes.forget(first + row)

    def _advance(self, sequence: Sequence, token_id: int) -> Event:
        stream = sequence.stream
        sequence.token_ids.append(token_id)
        ended = token_id in self.generator.eos_ids
        text = "" if ended else stream.push(token_id)
        if ended or stream.stopped or len(sequence.token_ids) >= sequence.max_new_tokens:
            text += stream.finish()
            sequence.finish_reason = "stop" if ended or stream.stopped else "length"
        return Event(sequence, token_id, text, sequence.finish_reason)

    def _release(self, sequence: Sequence) -> None:
        """Free a row; the last rows move up, so that decoding rows, then prefilled ones, stay without a hole."""
        hole = sequence.row
        if hole < self._decoding:
            self._decoding -= 1
            self._move(self._decoding, hole)
            hole = self._decoding
        self._move(self.live - 1, hole)
        self._sequences.pop()
        sequence.row = -1

    def _move(self, source: int, target: int) -> None:
        if source == target:
            return
        sequence = self._sequences[source]
        self._passes.move(source, target, sequence.tokens)
        self._sampler.move(source, target)
        self._sequences[target] = sequence
        sequence.row = target


def generate(
    generator: Generator,
    prompts: Many[Prompt],
    options: Many[GenerationOptions],
    *,
    max_sequences: int = 16,
    passes: DecodePasses | None = None,
) -> list[Completion]:
    """Answer every prompt, at most `max_sequences` at a time, with one `options` each; by `passes`, if given.

    Raises what `DecodeBatch.add` does.
    """
    if len(prompts) != len(options):
        raise ValueError(f"{len(prompts)} prompts came with {len(options)} options")
    at_once = max(1, min(max_sequences, len(prompts)))
    pairs = zip(prompts, options, strict=True)
    longest = max((prompt.tokens + each.max_new_tokens for prompt, each in pairs), default=1)
    batch = DecodeBatch(generator, at_once, longest, passes=passes)
    texts: dict[Sequence, list[str]] = {}  # in the order of the prompts
    while len(texts) < len(prompts) or batch.live:
        joining = slice(len(texts), len(texts) + batch.free_slots)
        texts |= {sequence: [] for sequence in batch.add(prompts[joining], options[joining])}
        for event in batch.step():
            texts[event.sequence].append(event.text)
    return [
        Completion("".join(text), sequence.token_ids, sequence.finish_reason)
        for sequence, text in texts.items()
        if sequence.finish_reason is not None  # true of each: the batch is empty
    ]
