"""One request, step by step: prepare -> compress -> rerank -> build the prompt -> answer.

Plain functions of their inputs. Nothing here knows HTTP, queues or checkpoints; batching across requests is the
caller's, who may hand any mix of requests' rows to `compress_rows`.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from core.config import Mode
from core.decoding import generate
from core.errors import InvalidInputError
from core.model import Model
from core.passages import Chunk, Passage, chunk_passage
from core.prompts import Block, Prompt
from core.row_passes import RowPass, run_rows
from core.rows import ChunkRow, plan_batches
from core.sampling import GenerationOptions
from core.tokenization import encode


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A tokenised request. `query_ids` are compressor tokens within the query budget; chunks are in passage order."""

    query: str
    passages: tuple[Passage, ...]
    query_ids: list[int]
    chunks: tuple[Chunk, ...]


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
    """One passage: its chunks in order, and its relevance, the calibrated best of its chunks' scores, in 0..1."""

    index: int
    chunks: tuple[CompressedChunk, ...]
    relevance: float

    @property
    def memory(self) -> Tensor:
        """All memory embeddings of the passage, (sum of l, d_generator)."""
        return torch.cat([chunk.memory for chunk in self.chunks])

    @property
    def tokens(self) -> int:
        """Generator tokens of the passage as text."""
        return sum(chunk.tokens for chunk in self.chunks)


@dataclass(frozen=True)
class Answer:
    """An answer with what it was made from. Passages and modes are in the caller's order; timings in milliseconds."""

    text: str
    finish_reason: str
    passages: list[CompressedPassage]
    modes: list[Mode]
    text_tokens: int
    prompt_tokens: int
    completion_tokens: int
    timings_ms: dict[str, float]


def prepare(model: Model, query: str, passages: Sequence[Passage]) -> PreparedRequest:
    """Tokenise and chunk one request.

    Raises InvalidInputError for an empty query, no passages, an empty passage, or a lone surrogate in any text.
    A query over the compressor's query budget is read from its end there; the generator always reads all of it.
    """
    if not query.strip():
        raise InvalidInputError("query", "is empty")
    if not passages:
        raise InvalidInputError("passages", "is empty: give at least one")
    _require_encodable("query", query)
    for index, passage in enumerate(passages):
        _require_encodable(f"passages.{index}.title", passage.title)
        _require_encodable(f"passages.{index}.text", passage.text)
    config = model.config.compressor
    chunks = [
        chunk
        for index, passage in enumerate(passages)
        for chunk in chunk_passage(
            passage, index, model.generator.tokenizer, model.compressor.tokenizer, config.chunk_tokens
        )
    ]
    query_ids = encode(model.compressor.tokenizer, query).ids[-config.query_tokens :]
    return PreparedRequest(query, tuple(passages), query_ids, tuple(chunks))


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


def gather(model: Model, request: PreparedRequest, chunks: Sequence[CompressedChunk]) -> list[CompressedPassage]:
    """Put a request's compressed chunks, in the order of its rows, back together into passages."""
    grouped: list[list[CompressedChunk]] = [[] for _ in request.passages]
    for chunk, compressed in zip(request.chunks, chunks, strict=True):
        grouped[chunk.passage].append(compressed)
    calibration = model.config.relevance
    passages = []
    for index, group in enumerate(grouped):
        score = calibration.scale * max(chunk.score for chunk in group) + calibration.bias
        # Written by the sign of the score, so that neither side overflows.
        relevance = 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))
        passages.append(CompressedPassage(index, tuple(group), relevance))
    return passages


def compress(
    model: Model, requests: Sequence[PreparedRequest], rate: int | None = None, max_batch_tokens: int = 4096
) -> list[list[CompressedPassage]]:
    """Compress whole requests: all their chunks together, in batches of like length under a token budget."""
    rows = [row for request in requests for row in rows_of(model, request, rate)]
    done: dict[int, CompressedChunk] = {}
    for indices in plan_batches([model.compressor.row_format.length(row) for row in rows], max_batch_tokens):
        done.update(zip(indices, compress_rows(model, [rows[i] for i in indices]), strict=True))
    results, first = [], 0
    for request in requests:
        last = first + len(request.chunks)
        results.append(gather(model, request, [done[i] for i in range(first, last)]))
        first = last
    return results


def rerank(compressed: Sequence[CompressedPassage]) -> list[int]:
    """Passage indices, most relevant first; equals keep the caller's order. By raw score: relevance can saturate."""
    best = [max(chunk.score for chunk in passage.chunks) for passage in compressed]
    return [compressed[i].index for i in sorted(range(len(compressed)), key=lambda i: -best[i])]


def choose_modes(
    model: Model, compressed: Sequence[CompressedPassage], mode: Mode, hybrid_top: int | None = None
) -> list[Mode]:
    """How each passage reaches the generator, in the caller's order: `text` or `compressed`."""
    if mode != "hybrid":
        return [mode] * len(compressed)
    top = model.config.prompt.hybrid_top if hybrid_top is None else hybrid_top
    shown = set(rerank(compressed)[:top])
    return ["text" if passage.index in shown else "compressed" for passage in compressed]


def build_prompt(
    model: Model, request: PreparedRequest, compressed: Sequence[CompressedPassage], modes: Sequence[Mode]
) -> Prompt:
    """The generator's prompt, passages in the order the config asks for."""
    text_ids = passage_text_ids(request)
    by_relevance = model.config.prompt.passage_order == "relevance"
    order = rerank(compressed) if by_relevance else range(len(compressed))
    blocks = [
        Block(text_ids=text_ids[i], memory=None)
        if modes[i] == "text"
        else Block(text_ids=None, memory=compressed[i].memory)
        for i in order
    ]
    return model.template.build(request.query, blocks)


def passage_text_ids(request: PreparedRequest) -> list[list[int]]:
    """Generator tokens of each passage as text."""
    ids: list[list[int]] = [[] for _ in request.passages]
    for chunk in request.chunks:
        ids[chunk.passage] += chunk.generator_ids
    return ids


def text_prompt_tokens(model: Model, request: PreparedRequest) -> int:
    """Prompt tokens if every passage were text: what the request would cost uncompressed."""
    return len(model.template.layout(request.query, passage_text_ids(request)).ids)


def answer(
    model: Model,
    query: str,
    passages: Sequence[Passage],
    mode: Mode = "compressed",
    rate: int | None = None,
    options: GenerationOptions | None = None,
) -> Answer:
    """Answer one query from its passages: every step above, timed. Raises InputError."""
    marks = [time.perf_counter()]
    request = prepare(model, query, passages)
    marks.append(time.perf_counter())
    compressed = compress(model, [request], rate)[0]
    marks.append(time.perf_counter())
    modes = choose_modes(model, compressed, mode)
    prompt = build_prompt(model, request, compressed, modes)
    completion = generate(model.generator, [prompt], [options or GenerationOptions()])[0]
    marks.append(time.perf_counter())
    stages = zip(("prepare", "compress", "generate"), pairwise(marks), strict=True)
    timings_ms = {name: 1000 * (end - begin) for name, (begin, end) in stages}
    return Answer(
        text=completion.text,
        finish_reason=completion.finish_reason,
        passages=compressed,
        modes=modes,
        text_tokens=text_prompt_tokens(model, request),
        prompt_tokens=len(prompt.ids),
        completion_tokens=len(completion.token_ids),
        timings_ms=timings_ms | {"total": 1000 * (marks[-1] - marks[0])},
    )
