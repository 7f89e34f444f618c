"""Passages as callers send them, and the chunks they are cut into. Knows tokenizers, not models."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from core.errors import InvalidInputError
from core.tokenization import Tokens, encode

# A sentence ends at its punctuation with any closing quotes and the space behind, at CJK stops, and at line ends.
SENTENCE_END = re.compile(r"""[.!?…؟۔।]["'”’»)\]]*\s+|[。！？｡]["'”’」』）]*\s*|\n+""")
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrieved text as the caller sent it, of any length."""

    text: str
    title: str = ""
    id: str | None = None

    @property
    def content(self) -> str:
        """What is compressed or shown: the title on a line of its own, then the text."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a passage that fits the compressor's budget.

    passage             index of its passage in the request
    start, end          character span in `Passage.content`; the spans of a passage's chunks join without a gap
    generator_ids       generator tokens, a slice of the passage's own: never tokenised again
    generator_spans     their character spans in `Passage.content`
    compressor_ids      compressor tokens; the same as `generator_ids` for an n_layers compressor
    compressor_index    for each generator token, the index in `compressor_ids` of the token that covers it
    """

    passage: int
    start: int
    end: int
    generator_ids: list[int]
    generator_spans: list[tuple[int, int]]
    compressor_ids: list[int]
    compressor_index: list[int]


def chunk_passage(
    passage: Passage,
    index: int,
    generator_tokenizer: PreTrainedTokenizerBase,
    compressor_tokenizer: PreTrainedTokenizerBase,
    chunk_tokens: int,
) -> list[Chunk]:
    """Cut one passage into chunks of at most `chunk_tokens` tokens by either tokenizer, at sentence ends if possible.

    Nothing is dropped: the chunks' generator tokens, joined, are the tokens of the whole passage. Chunks of one
    passage are of even size, so that the last is not a scrap. Raises InvalidInputError for a passage without tokens.
    """
    content = passage.content
    tokens = encode(generator_tokenizer, content)
    if not tokens.ids or not content.strip():
        raise InvalidInputError(f"passages.{index}.text", "is empty")
    same = compressor_tokenizer is generator_tokenizer
    compressor = tokens if same else encode(compressor_tokenizer, content)
    spans = np.asarray(tokens.spans, dtype=np.int64)  # (T, 2)
    starts = np.maximum.accumulate(spans[:, 0])
    # The compressor tokens before generator token t, by where they begin; one entry more for the end.
    compressor_starts = np.maximum.accumulate(np.asarray([start for start, _ in compressor.spans], dtype=np.int64))
    before = np.append(np.searchsorted(compressor_starts, starts), len(compressor.ids))
    if same:
        before = np.arange(len(tokens.ids) + 1)
    cuts = [0, *_cuts(content, spans, before, chunk_tokens), len(tokens.ids)]
    fallback = compressor_tokenizer.unk_token_id or 0
    return [
        _chunk(index, content, tokens, compressor, before, chunk_tokens, first, last, fallback)
        for first, last in pairwise(cuts)
    ]


def _cuts(content: str, spans: Indices, before: Indices, budget: int) -> Iterator[int]:
    """Token indices at which chunks begin, but for the first."""
    total = len(spans)
    if total <= budget and before[total] - before[0] <= budget:
        return
    # Byte-level tokens can share one character: a cut between them would tear it.
    whole = np.append(spans[1:, 0] >= spans[:-1, 1], True)  # whole[t]: a cut after token t is clean
    clean = np.flatnonzero(whole) + 1
    sentence_ends = np.asarray([match.end() for match in SENTENCE_END.finditer(content)], dtype=np.int64)
    ends = np.maximum.accumulate(spans[:, 1])
    sentences = np.intersect1d(np.searchsorted(ends, sentence_ends, side="right"), clean)
    spaces = np.asarray([content[s - 1 : s + 1].strip() != content[s - 1 : s + 1] for s in spans[:, 0]])
    words = np.intersect1d(np.flatnonzero(spaces), clean)
    first = 0
    while total - first > budget or before[total] - before[first] > budget:
        by_compressor = int(np.searchsorted(before, before[first] + budget, side="right")) - 1
        limit = min(first + budget, by_compressor, total - 1)
        chunks_left = -(-max(total - first, int(before[total] - before[first])) // budget)
        target = first + (total - first) / chunks_left
        room = (chunks_left - 1) * budget  # what the chunks behind this one can hold, in either kind of token
        at_least = max(total - room, int(np.searchsorted(before, before[total] - room)))
        first = _best_cut((sentences, words, clean), first, limit, target, at_least)
        if first < total:  # not so where the last token alone is over the budget
            yield first


def _best_cut(kinds: tuple[Indices, ...], first: int, limit: int, target: float, at_least: int) -> int:
    """The cut in `(first, limit]` of the best kind there is: near `target`, and leaving no extra chunk if it can."""
    for cuts in kinds:
        inside = cuts[np.searchsorted(cuts, first, side="right") : np.searchsorted(cuts, limit, side="right")]
        enough = inside[inside >= at_least]
        if len(enough):
            return int(enough[np.abs(enough - target).argmin()])
        if len(inside):
            return int(inside[-1])
    later = kinds[-1][np.searchsorted(kinds[-1], first, side="right") :]
    return int(later[0])  # one character of more tokens than the budget: it stays whole


def _chunk(
    index: int,
    content: str,
    tokens: Tokens,
    compressor: Tokens,
    before: Indices,
    budget: int,
    first: int,
    last: int,
    fallback: int,
) -> Chunk:
    spans = tokens.spans[first:last]
    # One generator token (a rule of 100 dashes) can be more compressor tokens than the budget: the rest goes unread.
    read = slice(before[first], min(before[last], before[first] + budget))
    ids = compressor.ids[read]
    ends = np.maximum.accumulate([end for _, end in compressor.spans[read]] or [0])
    covering = np.searchsorted(ends, [start for start, _ in spans], side="right")
    if compressor is tokens:
        covering = np.arange(len(spans))
    return Chunk(
        passage=index,
        start=tokens.spans[first][0] if first else 0,
        end=tokens.spans[last][0] if last < len(tokens.ids) else len(content),
        generator_ids=tokens.ids[first:last],
        generator_spans=spans,
        # Characters the encoder's normaliser drops altogether still leave a token to read.
        compressor_ids=ids or [fallback],
        compressor_index=np.minimum(covering, max(len(ids) - 1, 0)).tolist(),
    )
