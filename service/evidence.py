"""Where memory embeddings came from: attention over a chunk's tokens as character spans of the caller's own fields.

Knows no HTTP. It waits for tensors and walks over tokens: call it off the event loop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.compressed import CompressedChunk, CompressedPassage
from core.passages import Chunk, Passage
from core.pipeline import PreparedRequest
from service.response_schemas import EmbeddingSpans, Evidence, EvidenceSpan, PassageField

# A token with less than this share of the embedding's strongest token is background and belongs to no span.
BACKGROUND = 0.1
MIN_WEIGHT = 0.05
MAX_SPANS = 4
PRECISION = 10_000


class Piece(NamedTuple):
    """A token's characters in its field of the passage."""

    field: PassageField
    start: int
    end: int


def passages_evidence(request: PreparedRequest, compressed: Sequence[CompressedPassage]) -> dict[int, Evidence]:
    """By passage index, for each of its memory embeddings in order, the spans it was read from, heaviest first.

    An embedding has at most `MAX_SPANS` spans of at least `MIN_WEIGHT`, and their weights sum to at most 1. None for a
    passage whose embeddings have no attention: those of the memory readout, and those that the caller gave back. One
    that was not compressed is left out.
    """
    chunks: list[list[Chunk]] = [[] for _ in request.passages]
    for chunk in request.chunks:
        chunks[chunk.passage].append(chunk)
    read = [passage for passage in compressed if passage.chunks]
    return {p.index: _passage_evidence(request.passages[p.index], chunks[p.index], p.chunks) for p in read}


def _passage_evidence(passage: Passage, chunks: Sequence[Chunk], compressed: Sequence[CompressedChunk]) -> Evidence:
    evidence: EmbeddingSpans = []
    for chunk, result in zip(chunks, compressed, strict=True):
        if result.weights is None:
            return None
        pieces = [_piece(passage, start, end) for start, end in chunk.generator_spans]
        rows = result.weights.float().cpu().numpy()  # (l, tokens)
        evidence += [_embedding_evidence(passage, pieces, row) for row in rows]
    return evidence


def _piece(passage: Passage, start: int, end: int) -> Piece | None:
    """A token's span in `Passage.content` as one in its field; None for the line break between title and text."""
    offset = len(passage.content) - len(passage.text)  # of the text
    in_title, in_text = len(passage.title) - start, end - offset
    if in_title <= 0 and in_text <= 0:
        return None
    # A token that holds the line break and something of either side goes where more of it is.
    if in_title > in_text:
        return Piece("title", start, min(end, len(passage.title)))
    return Piece("text", max(start - offset, 0), in_text)


def _embedding_evidence(
    passage: Passage, pieces: Sequence[Piece | None], weights: NDArray[np.float32]
) -> list[EvidenceSpan]:
    """`weights` (tokens,) as spans: a run of neighbouring tokens of one field is one span."""
    runs: list[list[Piece]] = []
    totals: list[float] = []
    last = -1
    for token in np.flatnonzero(weights > BACKGROUND * weights.max()).tolist():
        if (piece := pieces[token]) is None:
            continue
        # Byte-level tokens can share a character: they stay together even where one between them is background.
        before = runs[-1][-1] if runs else None
        if before and before.field == piece.field and (token == last + 1 or piece.start < before.end):
            runs[-1].append(piece)
            totals[-1] += float(weights[token])
        else:
            runs.append([piece])
            totals.append(float(weights[token]))
        last = token
    spans = [_span(passage, run, total) for run, total in zip(runs, totals, strict=True)]
    kept = [span for span in spans if span.weight >= MIN_WEIGHT and span.start < span.end]
    return sorted(kept, key=lambda span: -span.weight)[:MAX_SPANS]


def _span(passage: Passage, run: Sequence[Piece], weight: float) -> EvidenceSpan:
    """From the first to the last character of a run, without the space around it: empty where there is only space."""
    field = run[0].field
    start, end = min(piece.start for piece in run), max(piece.end for piece in run)
    words = (passage.title if field == "title" else passage.text)[start:end]
    return EvidenceSpan(
        field=field,
        start=start + len(words) - len(words.lstrip()),
        end=start + len(words.rstrip()),
        # Rounded down, so that no sum of weights passes 1.
        weight=min(int(weight * PRECISION) / PRECISION, 1.0),
    )
