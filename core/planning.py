"""The policy applied to a request: what the compressor reads of it, and how each passage is shown.

The rules are in `policy.py`; here are the sizes that they are about.
"""

from collections.abc import Sequence
from dataclasses import replace

from core.compressed import CompressedChunk, CompressedPassage
from core.errors import InvalidInputError, TooLargeError
from core.model import Model
from core.pipeline import PreparedRequest, passage_text_ids, rerank, rows_of
from core.policy import Candidate, Choice, Plan, Policy, Size, choose, plan

UNCALIBRATED = 0.5  # relevance from which a passage counts as holding an answer, where the checkpoint does not say


def plan_request(
    model: Model,
    request: PreparedRequest,
    policy: Policy,
    rate: int | None = None,
    max_new_tokens: int = 0,
    given: Sequence[CompressedChunk | None] = (),
) -> Plan:
    """What the compressor is to read of a request, and at which rate; see `core.policy.plan`.

    given   for each chunk, what came compressed; empty: nothing did

    max_new_tokens  of the answer; 0: none is written, and the query may be of any length

    Raises TooLargeError for a query that leaves no room in the model's positions, InvalidInputError for a rate the
    checkpoint was not trained for, and where the prompt is over its bound without any passage: the caller's, or what
    `max_new_tokens` leaves of those positions.
    """
    frame = model.template.frame(request.query, len(request.passages))
    bound, room, positions = policy.max_prompt_tokens, _room(model, policy, max_new_tokens), model.generator.max_tokens
    if max_new_tokens and frame[0] >= positions:
        message = f"the prompt takes {frame[0]} tokens without any passage; at most {positions - 1} fit"
        raise TooLargeError("query", message, positions - 1)
    if bound is not None and frame[0] > bound:
        message = f"is {bound}, but the prompt takes {frame[0]} tokens without any passage"
        raise InvalidInputError("max_prompt_tokens", message)
    if room is not None and room < frame[0] < positions:
        message = f"is {max_new_tokens}, but without any passage the prompt takes {frame[0]} of {positions} positions"
        raise InvalidInputError("max_new_tokens", message)
    rates = model.config.compressor.rates
    asked = rates[0] if rate is None else rate
    coarser = sorted(each for each in rates if each > asked) if policy.mode == "auto" else []
    sizes = {each: _sizes(model, request, each, given, policy.hops) for each in (asked, *coarser)}
    return plan(policy, sizes, frame, room, model.costs)


def _room(model: Model, policy: Policy, max_new_tokens: int) -> int | None:
    """Most tokens of a prompt that leaves room for its answer; None where too long a prompt is to be refused."""
    own = model.generator.max_tokens - max_new_tokens
    if policy.max_prompt_tokens is None:
        return own if policy.mode == "auto" else None
    return min(policy.max_prompt_tokens, own)


def _sizes(
    model: Model, request: PreparedRequest, rate: int, given: Sequence[CompressedChunk | None], hops: int
) -> list[Size]:
    """Sizes of all passages. Which of them joins the query at a second hop is not known yet: a chunk, say."""
    config = model.config.compressor
    joined = min(config.chunk_tokens, config.query_tokens - len(request.query_ids))
    text, memory, read = ([0] * len(request.passages) for _ in range(3))
    for i, row in enumerate(rows_of(model, request, rate)):
        known = given[i] if given else None
        text[row.chunk.passage] += len(row.chunk.generator_ids)
        memory[row.chunk.passage] += row.memory_tokens if known is None else len(known.memory)
        length = model.compressor.row_format.length(row)
        read[row.chunk.passage] += length + (hops - 1) * (length + joined) if known is None else 0
    return [Size(*each) for each in zip((tokens or None for tokens in text), memory, read, strict=True)]


def choose_modes(
    model: Model,
    request: PreparedRequest,
    compressed: Sequence[CompressedPassage],
    policy: Policy,
    max_new_tokens: int = 0,
) -> list[Choice]:
    """How each passage reaches the generator, in the caller's order; see `core.policy.choose`."""
    if policy.hybrid_top is None:
        policy = replace(policy, hybrid_top=model.config.prompt.hybrid_top)
    text = [len(ids) or None for ids in passage_text_ids(request)]
    candidates = [
        Candidate(i, compressed[i].relevance, text[i], compressed[i].memory_tokens if compressed[i].chunks else None)
        for i in rerank(compressed)
    ]
    frame = model.template.frame(request.query, len(candidates))
    threshold = model.config.relevance.threshold
    threshold = UNCALIBRATED if threshold is None else threshold
    chosen = choose(policy, candidates, frame, _room(model, policy, max_new_tokens), threshold)
    return [chosen[i] for i in range(len(candidates))]
