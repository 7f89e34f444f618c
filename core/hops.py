"""A second hop, for questions that need two passages: the others are read again for the query and the best passage.

What the second passage is asked for often stands in the first, so the most relevant passage joins the query, as in
multi-hop dense retrieval (Xiong et al. 2021, "Answering Complex Open-Domain Questions with Multi-Hop Dense Retrieval",
section 2.2). No weights are trained for it. Plain functions of rows and of what became of them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from core.compressed import CompressedChunk
from core.model import Model
from core.rows import ChunkRow
from core.tokenization import encode


def second_hop(model: Model, rows: Sequence[ChunkRow], chunks: Sequence[CompressedChunk]) -> dict[int, ChunkRow]:
    """One request's rows to read again, by their places in `rows`: those of all passages but the most relevant one.

    Their query is the first one and as much of that passage as the budget for queries holds, its best chunk first.

    rows, chunks    all rows that were read, and what became of each

    Empty where no other passage was read, or the query leaves no room.
    """
    if not rows:
        return {}
    lead = rows[_best(chunks)].chunk.passage
    own = [(chunk.score, row.chunk) for row, chunk in zip(rows, chunks, strict=True) if row.chunk.passage == lead]
    own.sort(key=lambda pair: -pair[0])
    joint = encode(model.compressor.tokenizer, "\n").ids  # no token to a WordPiece tokenizer
    query = rows[0].query_ids
    room = model.config.compressor.query_tokens - len(query)
    more = [*joint, *(token for _, chunk in own for token in chunk.compressor_ids)][:room]
    if len(more) <= len(joint):
        return {}
    longer = [*query, *more]
    return {i: replace(row, query_ids=longer) for i, row in enumerate(rows) if row.chunk.passage != lead}


def merge_hops(first: Sequence[CompressedChunk], second: Sequence[CompressedChunk]) -> list[CompressedChunk]:
    """What became of a request's rows after both hops, where `second` holds again what was not read again.

    The passage that joined the query stays the most relevant: it is needed for whatever it led to.
    """
    best, merged = _best(first), list(second)
    others = max((chunk.score for i, chunk in enumerate(second) if i != best), default=-math.inf)
    merged[best] = replace(second[best], score=max(second[best].score, math.nextafter(others, math.inf)))
    return merged


def _best(chunks: Sequence[CompressedChunk]) -> int:
    """The place of the best score; of equals the first."""
    return max(range(len(chunks)), key=lambda i: chunks[i].score)
