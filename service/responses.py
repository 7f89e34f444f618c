"""From what the engine produced to the response models. Knows no HTTP."""

import dataclasses
from collections.abc import Mapping

from core.compressed import CompressedPassage
from core.model import Model
from core.pipeline import rerank
from core.policy import AS_EMBEDDINGS, overall
from service.caches.embeddings import count_cached
from service.embedding_store import StoredPassage, query_sha256
from service.embeddings_codec import encode_embeddings
from service.evidence import passages_evidence
from service.jobs import Compressed, Finished
from service.policy_schemas import EstimatesMs, PlanOut
from service.response_schemas import (
    Answerable,
    AnsweredPassage,
    AnswerResponse,
    ChunkOut,
    CompressedPassageOut,
    CompressResponse,
    CompressUsage,
    Evidence,
    RankedPassage,
    RerankResponse,
    RerankUsage,
    Usage,
)
from service.schemas import CompressRequest, Embeddings
from service.session import Session

NO_EVIDENCE: Mapping[int, Evidence] = {}


def evidence_of(session: Session, compressed: Compressed) -> Mapping[int, Evidence]:
    """What the embeddings of each passage came from, by passage index. Call it off the event loop."""
    assert session.prepared is not None  # a session that has events was prepared
    return passages_evidence(session.prepared.request, compressed.passages)


def compress_response(session: Session, body: CompressRequest, compressed: Compressed) -> CompressResponse:
    """The whole response of `/compress`. Encoding megabytes takes a while: call it off the event loop."""
    model = session.version.model
    evidence = evidence_of(session, compressed) if body.explain else NO_EVIDENCE
    shown = [
        _compressed_passage(session, model, body, passage, evidence.get(passage.index))
        for passage in compressed.passages
    ]
    tokens = tokens_read(compressed.passages)
    memory_tokens = sum(passage.memory_tokens for passage in shown)
    return CompressResponse(
        passages=shown,
        usage=CompressUsage(
            text_tokens=tokens,
            memory_tokens=memory_tokens,
            rate=round(tokens / memory_tokens, 3),
            **count_cached(compressed.passages),
        ),
        timings_ms=session.timings_ms(),
        checkpoint=model.name,
    )


def tokens_read(passages: list[CompressedPassage]) -> int:
    """Tokens of all passages as text; the query is not counted."""
    return sum(passage.tokens for passage in passages)


def rerank_response(session: Session, compressed: Compressed, top_n: int | None) -> RerankResponse:
    """The whole response of `/rerank`."""
    ids, passages = _ids(session), compressed.passages
    best = [passages[index] for index in rerank(passages)[:top_n]]
    results = [RankedPassage(index=p.index, id=ids[p.index], relevance=p.relevance or 0.0) for p in best]
    return RerankResponse(
        results=results,
        usage=RerankUsage(text_tokens=tokens_read(passages), **count_cached(passages)),
        timings_ms=session.timings_ms(),
        checkpoint=session.version.model.name,
    )


def answered_passages(
    session: Session, compressed: Compressed, evidence: Mapping[int, Evidence] = NO_EVIDENCE
) -> list[AnsweredPassage]:
    """The passages of an answer, in the caller's order. One shown as text was not read from embeddings."""
    ids = _ids(session)
    return [
        AnsweredPassage(
            index=passage.index,
            id=ids[passage.index],
            relevance=passage.relevance,
            mode=choice.mode,
            reason=choice.reason,
            tokens=choice.tokens,
            evidence=evidence.get(passage.index) if choice.mode in AS_EMBEDDINGS else None,
        )
        for passage, choice in zip(compressed.passages, compressed.choices, strict=True)
    ]


def answerable(model: Model, passages: list[CompressedPassage]) -> Answerable | None:
    """Whether any passage is relevant enough; None where no threshold is calibrated, or a passage was not scored."""
    threshold = model.config.relevance.threshold
    scored = [passage.relevance for passage in passages if passage.relevance is not None]
    if threshold is None or len(scored) < len(passages):
        return None
    probability = max(scored)
    return Answerable(probability=probability, answerable=probability >= threshold)


def plan_out(session: Session, compressed: Compressed) -> PlanOut:
    """How a request as a whole was served."""
    assert session.prepared is not None  # a session that has events was prepared
    plan, estimates = session.prepared.plan, None
    if session.explain and plan.estimates is not None:
        seconds = dataclasses.asdict(plan.estimates)
        estimates = EstimatesMs(**{name.removesuffix("_s"): round(1000 * value, 3) for name, value in seconds.items()})
    return PlanOut(
        mode=overall(compressed.choices),
        reason=plan.reason,
        rate=plan.rate if plan.read else None,
        max_prompt_tokens=session.prepared.policy.max_prompt_tokens,
        estimates_ms=estimates,
    )


def answer_response(
    session: Session, compressed: Compressed, finished: Finished, evidence: Mapping[int, Evidence] = NO_EVIDENCE
) -> AnswerResponse:
    """The whole response of `/answer`, and the `done` event of a stream."""
    model = session.version.model
    usage = Usage(
        text_tokens=session.text_tokens,
        prompt_tokens=compressed.prompt_tokens,
        tokens_saved=session.text_tokens - compressed.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        **count_cached(compressed.passages),
    )
    return AnswerResponse(
        answer=finished.text,
        finish_reason="stop" if finished.finish_reason == "stop" else "length",
        passages=answered_passages(session, compressed, evidence),
        answerable=answerable(model, compressed.passages),
        plan=plan_out(session, compressed),
        usage=usage,
        timings_ms=session.timings_ms(),
        checkpoint=model.name,
    )


def _ids(session: Session) -> list[str | None]:
    assert session.prepared is not None  # a session that has events was prepared
    return [passage.id for passage in session.prepared.request.passages]


def _compressed_passage(
    session: Session, model: Model, body: CompressRequest, passage: CompressedPassage, evidence: Evidence
) -> CompressedPassageOut:
    assert session.prepared is not None  # a session that has events was prepared
    source = session.prepared.request.passages[passage.index]
    memory, score, query = passage.memory, passage.score, query_sha256(body.query)
    stored = None
    if body.store:
        stored = session.engine.store.put(
            StoredPassage(memory, score, passage.tokens, source.title, source.text, model.name, query)
        )
    return CompressedPassageOut(
        index=passage.index,
        id=source.id,
        relevance=passage.relevance or 0.0,
        tokens=passage.tokens,
        memory_tokens=passage.memory_tokens,
        rate=round(passage.tokens / passage.memory_tokens, 3),
        chunks=[
            ChunkOut(start=c.start, end=c.end, tokens=c.tokens, memory_tokens=len(c.memory), score=c.score)
            for c in passage.chunks
        ],
        embeddings=Embeddings(
            dtype=body.dtype,
            encoding=body.encoding,
            shape=list(memory.shape),
            data=encode_embeddings(memory, body.dtype, body.encoding),
            score=score,
            tokens=passage.tokens,
            checkpoint=model.name,
            query_sha256=query,
        ),
        embedding_id=stored,
        evidence=evidence,
    )
