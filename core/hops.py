"""A second hop, for questions that need two passages: all are read again, for the query and the best of them.

What the second passage is asked for often stands in the first, so the most relevant passage joins the query, as in
multi-hop dense retrieval (Xiong et al. 2021, "Answering Complex Open-Domain Questions with Multi-Hop Dense Retrieval",
section 2.2). No weights are trained for it. Plain functions of rows and of what became of them.
"""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from core.compressed import CompressedChunk
from core.rows import ChunkRow
from core.tokenization import encode


def second_hop(
    rows: Sequence[ChunkRow],
    chunks: Sequence[CompressedChunk],
    tokenizer: PreTrainedTokenizerBase,
    query_tokens: int,
) -> list[ChunkRow]:
    """One request's rows again, for its query and as much of its most relevant passage as `query_tokens` hold.

    rows, chunks    all rows that were read, and what became of each
    tokenizer       the compressor's

    Empty where that would change nothing: a single passage was read, or the query leaves no room.
    """
    if len({row.chunk.passage for row in rows}) < 2:
        return []
    lead = _lead(rows, chunks)
    own = [(chunk.score, row.chunk) for row, chunk in zip(rows, chunks, strict=True) if row.chunk.passage == lead]
    best_first = sorted(own, key=lambda pair: -pair[0])
    joint = encode(tokenizer, "\n").ids  # no token to a WordPiece tokenizer
    query = rows[0].query_ids
    more = [*joint, *(token for _, chunk in best_first for token in chunk.compressor_ids)][: query_tokens - len(query)]
    return [replace(row, query_ids=[*query, *more]) for row in rows] if len(more) > len(joint) else []


def merge_hops(
    rows: Sequence[ChunkRow], first: Sequence[CompressedChunk], second: Sequence[CompressedChunk]
) -> list[CompressedChunk]:
    """What became of `rows` after both hops.

    The passage that joined the query keeps what was made of it for the query alone, and its better score; of all
    others the second reading counts.
    """
    lead = _lead(rows, first)
    return [
        replace(before, score=max(before.score, after.score)) if row.chunk.passage == lead else after
        for row, before, after in zip(rows, first, second, strict=True)
    ]


def _lead(rows: Sequence[ChunkRow], chunks: Sequence[CompressedChunk]) -> int:
    """The passage of the best score; of equals the first."""
    best = max(range(len(rows)), key=lambda i: chunks[i].score)
    return rows[best].chunk.passage
