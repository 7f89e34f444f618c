"""One request, step by step: prepare -> compress -> rerank -> build the prompt.

Plain functions of their inputs. Nothing here knows HTTP, queues or checkpoints; batching across requests is the
caller's, who may hand any mix of requests' rows to `compress_rows`.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from core.compressed import CompressedChunk, CompressedPassage
from core.errors import InvalidInputError, TooLargeError
from core.hops import merge_hops, second_hop
from core.model import Model
from core.passages import Chunk, Passage, chunk_passage
from core.policy import AS_EMBEDDINGS, AS_TEXT, Shown
from core.prompts import Block, Prompt
from core.row_passes import RowPass, run_rows
from core.rows import ChunkRow, plan_batches
from core.tokenization import encode


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A tokenised request. `query_ids` are compressor tokens within the query budget; chunks are in passage order."""

    query: str
    passages: tuple[Passage, ...]
    query_ids: list[int]
    chunks: tuple[Chunk, ...]


def prepare(model: Model, query: str, passages: Sequence[Passage]) -> PreparedRequest:
    """Tokenise and chunk one request.

    Raises InvalidInputError for an empty query, no passages, an empty passage, or a lone surrogate in any text, and
    TooLargeError for a query over the compressor's budget for it: half a question gives wrong scores.
    """
    if not query.strip():
        raise InvalidInputError("query", "is empty")
    if not passages:
        raise InvalidInputError("passages", "is empty: give at least one")
    _require_encodable("query", query)
    for index, passage in enumerate(passages):
        _require_encodable(f"passages.{index}.title", passage.title)
        _require_encodable(f"passages.{index}.text", passage.text)
    query_ids = encode_query(model, query)
    chunks = [
        chunk
        for index, passage in enumerate(passages)
        for chunk in chunk_passage(
            passage, index, model.generator.tokenizer, model.compressor.tokenizer, model.config.compressor.chunk_tokens
        )
    ]
    return PreparedRequest(query, tuple(passages), query_ids, tuple(chunks))


def encode_query(model: Model, query: str) -> list[int]:
    """A query's ids for the compressor. Raises TooLargeError for one over its budget."""
    most = model.config.compressor.query_tokens
    ids = encode(model.compressor.tokenizer, query).ids
    if len(ids) > most:
        message = f"has {len(ids)} tokens; the compressor reads at most {most}: ask in fewer words"
        raise TooLargeError("query", message, most)
    return ids


def _require_encodable(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(field, "holds half of a surrogate pair, which is no character") from None


def rows_of(model: Model, request: PreparedRequest, rate: int | None = None) -> list[ChunkRow]:
    """The request's rows of compressor input, one a chunk, at one of the checkpoint's rates (default: its first).

    Raises InvalidInputError for a rate the checkpoint was not trained for.
    """
    config = model.config.compressor
    rate = config.rates[0] if rate is None else rate
    if rate not in config.rates:
        raise InvalidInputError("rate", f"must be one of {', '.join(map(str, config.rates))}")
    return [
        ChunkRow(request.query_ids, chunk, config.memory_tokens(len(chunk.generator_ids), rate))
        for chunk in request.chunks
    ]


@torch.inference_mode()
def compress_rows(model: Model, rows: Sequence[ChunkRow]) -> list[CompressedChunk]:
    """Compress any mix of requests' rows as one batch; results in the order of `rows`."""
    compressed: dict[int, CompressedChunk] = {}
    embed = model.generator.embed
    if model.accelerated is None:
        passes = run_rows(model.compressor, rows, embed, model.documents)
    else:
        passes = iter([RowPass(list(range(len(rows))), model.accelerated(rows, embed))])
    for done in passes:
        scores = done.output.scores.tolist()
        for place, i in enumerate(done.indices):
            compressed[i] = _compressed_chunk(rows[i], done, place, scores[place])
    return [compressed[i] for i in range(len(rows))]


def _compressed_chunk(row: ChunkRow, done: RowPass, place: int, score: float) -> CompressedChunk:
    tokens, weights = len(row.chunk.generator_ids), done.output.weights
    # Copies: a view that is kept would keep the whole batch in memory.
    memory = done.output.memory[place, : row.memory_tokens].clone()  # (l, d_generator)
    evidence = None if weights is None else weights[place, : row.memory_tokens, :tokens].clone()
    cached: Literal["document"] | None = "document" if done.warm else None
    return CompressedChunk(row.chunk.start, row.chunk.end, tokens, memory, score, evidence, cached)


def gather(model: Model, request: PreparedRequest, chunks: Sequence[CompressedChunk | None]) -> list[CompressedPassage]:
    """Put a request's compressed chunks, in the order of its rows, back together into passages.

    None stands for a chunk that was not compressed; all chunks of a passage are, or none.
    """
    grouped: list[list[CompressedChunk]] = [[] for _ in request.passages]
    for chunk, compressed in zip(request.chunks, chunks, strict=True):
        if compressed is not None:
            grouped[chunk.passage].append(compressed)
    return [
        CompressedPassage(index, tuple(group), _relevance(model, group) if group else None)
        for index, group in enumerate(grouped)
    ]


def _relevance(model: Model, chunks: Sequence[CompressedChunk]) -> float:
    calibration = model.config.relevance
    score = calibration.scale * max(chunk.score for chunk in chunks) + calibration.bias
    # Written by the sign of the score, so that neither side overflows.
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def compress(
    model: Model,
    requests: Sequence[PreparedRequest],
    rate: int | None = None,
    max_batch_tokens: int = 4096,
    read: Sequence[Collection[int]] | None = None,
    hops: int = 1,
) -> list[list[CompressedPassage]]:
    """Compress whole requests: all their chunks together, in batches of like length under a token budget.

    read    for each request, the passages to compress; None: all of all
    hops    2: all but the best are read again, for the query and that one (`core.hops`)
    """
    wanted = [
        [row for row in rows_of(model, request, rate) if read is None or row.chunk.passage in read[number]]
        for number, request in enumerate(requests)
    ]
    compressed = _compress_groups(model, wanted, max_batch_tokens)
    if hops > 1:
        again = [second_hop(model, rows, chunks) for rows, chunks in zip(wanted, compressed, strict=True)]
        seconds = _compress_groups(model, [list(rows.values()) for rows in again], max_batch_tokens)
        compressed = [
            _merge(first, dict(zip(rows, second, strict=True)))
            for first, rows, second in zip(compressed, again, seconds, strict=True)
        ]
    results = []
    for request, rows, chunks in zip(requests, wanted, compressed, strict=True):
        done = iter(chunks)
        passages = {row.chunk.passage for row in rows}
        spread = [next(done) if chunk.passage in passages else None for chunk in request.chunks]
        results.append(gather(model, request, spread))
    return results


def _merge(first: list[CompressedChunk], read_again: Mapping[int, CompressedChunk]) -> list[CompressedChunk]:
    return merge_hops(first, [read_again.get(i, chunk) for i, chunk in enumerate(first)]) if read_again else first


def _compress_groups(
    model: Model, groups: Sequence[Sequence[ChunkRow]], max_batch_tokens: int
) -> list[list[CompressedChunk]]:
    """The rows of all groups in common batches; what became of each group's."""
    rows = [row for group in groups for row in group]
    done: dict[int, CompressedChunk] = {}
    for batch in plan_batches([model.compressor.row_format.length(row) for row in rows], max_batch_tokens):
        done.update(zip(batch, compress_rows(model, [rows[i] for i in batch]), strict=True))
    ordered = (done[i] for i in range(len(rows)))
    return [list(itertools.islice(ordered, len(group))) for group in groups]


def rerank(compressed: Sequence[CompressedPassage]) -> list[int]:
    """Passage indices, most relevant first; equals keep the caller's order. By raw score: relevance can saturate."""
    return [passage.index for passage in sorted(compressed, key=lambda passage: -passage.score)]


def build_prompt(
    model: Model, request: PreparedRequest, compressed: Sequence[CompressedPassage], modes: Sequence[Shown]
) -> Prompt:
    """The generator's prompt: the passages that are not dropped, in the order the config asks for."""
    text_ids = passage_text_ids(request)
    by_relevance = model.config.prompt.passage_order == "relevance"
    order = rerank(compressed) if by_relevance else range(len(compressed))
    blocks = [
        Block(
            memory=compressed[i].memory if modes[i] in AS_EMBEDDINGS else None,
            text_ids=text_ids[i] if modes[i] in AS_TEXT else (),
        )
        for i in order
        if modes[i] != "dropped"
    ]
    return model.template.build(request.query, blocks)


def text_prompt(model: Model, request: PreparedRequest) -> Prompt:
    """The prompt with every passage as text, in the caller's order: no compressor has to have run."""
    return model.template.build(request.query, [Block(text_ids=ids) for ids in passage_text_ids(request)])


def passage_text_ids(request: PreparedRequest) -> list[list[int]]:
    """Generator tokens of each passage as text."""
    ids: list[list[int]] = [[] for _ in request.passages]
    for chunk in request.chunks:
        ids[chunk.passage] += chunk.generator_ids
    return ids


def text_prompt_tokens(model: Model, request: PreparedRequest) -> int:
    """Prompt tokens if every passage were text: what the request would cost uncompressed."""
    frame = model.template.frame(request.query, len(request.passages))[-1]
    return frame + sum(len(chunk.generator_ids) for chunk in request.chunks)
