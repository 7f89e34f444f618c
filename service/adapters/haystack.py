"""Haystack: a ranker that keeps what is relevant, and a generator that answers from documents.

pipeline.connect("ranker.documents", "generator.documents")

Both are saved with a pipeline, their key as the name of its environment variable; Haystack loads them where this module
is allowed: Pipeline.loads(..., allowed_modules=["service.adapters.haystack"]).
"""

from dataclasses import asdict, replace
from typing import Any, Literal, TypedDict, cast

from haystack import Document, component
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.dataclasses.streaming_chunk import StreamingCallbackT, select_streaming_callback
from haystack.utils import Secret

from service.client import Answer, AnswerOptions, Connection, Done, Passage, Ranking, Token
from service.client.connection import API_KEY

KEY = Secret.from_env_var(API_KEY, strict=False)


class Ranked(TypedDict):
    """What the ranker gives: documents, most relevant first, each with its relevance as score, 0..1."""

    documents: list[Document]


class Replied(TypedDict):
    """What the generator gives: one reply, or none where there were no documents.

    Its meta has tokens, relevance, and whether the documents hold an answer at all (`answerable`).
    """

    replies: list[ChatMessage]


@component
class ScaleDownRanker:
    """Puts documents in order of their relevance.

    url             SCALEDOWN_URL, or else port 8000 of this machine
    api_key         read from SCALEDOWN_API_KEY unless told otherwise
    top_k           keep only the best so many
    min_relevance   leave out what is less relevant
    hops            2: for questions that need two passages
    timeout         seconds of silence after which a request is given up
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: Secret | None = KEY,
        top_k: int | None = None,
        min_relevance: float = 0.0,
        timeout: float = Connection.timeout,
        hops: Literal[1, 2] = 1,
    ) -> None:
        if not 0 <= min_relevance <= 1:
            raise ValueError(f"min_relevance: must be 0 to 1, not {min_relevance}")
        _check_top_k(top_k)
        self.url, self.api_key, self.timeout = url, api_key, timeout
        self.top_k, self.min_relevance, self.hops = top_k, min_relevance, hops

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> Ranked:
        """The relevant documents, best first. Raises ServiceError."""
        _check_top_k(top_k)
        documents = _with_text(documents)
        if not documents:
            return Ranked(documents=[])
        with _connection(self).client() as client:
            return self._kept(documents, client.rerank(query, _passages(documents), hops=self.hops), top_k)

    @component.output_types(documents=list[Document])
    async def run_async(self, query: str, documents: list[Document], top_k: int | None = None) -> Ranked:
        """The same, awaited."""
        _check_top_k(top_k)
        documents = _with_text(documents)
        if not documents:
            return Ranked(documents=[])
        async with _connection(self).async_client() as client:
            return self._kept(documents, await client.rerank(query, _passages(documents), hops=self.hops), top_k)

    def _kept(self, documents: list[Document], ranking: Ranking, top_k: int | None) -> Ranked:
        limit = self.top_k if top_k is None else top_k
        best = [each for each in ranking.results if each.relevance >= self.min_relevance][:limit]
        return Ranked(documents=[replace(documents[each.index], score=each.relevance) for each in best])


@component
class ScaleDownGenerator:
    """Answers a query from documents.

    url         SCALEDOWN_URL, or else port 8000 of this machine
    api_key     read from SCALEDOWN_API_KEY unless told otherwise
    options     what `service.client`'s `answer` takes: mode, rate, max_new_tokens, ...; those of a run win
    timeout     seconds of silence after which a request is given up
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: Secret | None = KEY,
        options: dict[str, Any] | None = None,
        timeout: float = Connection.timeout,
    ) -> None:
        self.url, self.api_key, self.timeout = url, api_key, timeout
        self.options = options or {}

    @component.output_types(replies=list[ChatMessage])
    def run(
        self,
        query: str,
        documents: list[Document],
        options: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
    ) -> Replied:
        """One reply. With a callback, its pieces are handed over as they come. Raises ServiceError."""
        documents = _with_text(documents)
        if not documents:
            return Replied(replies=[])
        callback = select_streaming_callback(None, streaming_callback, requires_async=False)
        given = self._options(options)
        with _connection(self).client() as client:
            if callback is None:
                return _replied(client.answer(query, _passages(documents), **given))
            with client.stream(query, _passages(documents), **given) as events:
                for event in events:
                    if isinstance(event, Token | Done):
                        callback(_chunk(event))
        return _ended(event)

    @component.output_types(replies=list[ChatMessage])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        options: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
    ) -> Replied:
        """The same, awaited; so is a callback that can be."""
        documents = _with_text(documents)
        if not documents:
            return Replied(replies=[])
        callback = select_streaming_callback(None, streaming_callback, requires_async=True)
        given = self._options(options)
        async with _connection(self).async_client() as client:
            if callback is None:
                return _replied(await client.answer(query, _passages(documents), **given))
            async with client.stream(query, _passages(documents), **given) as events:
                async for event in events:
                    if isinstance(event, Token | Done) and (waiting := callback(_chunk(event))) is not None:
                        await waiting
        return _ended(event)

    def _options(self, given: dict[str, Any] | None) -> AnswerOptions:
        return cast(AnswerOptions, {**self.options, **(given or {})})


def _check_top_k(top_k: int | None) -> None:
    """Refuse what a slice would take for something else: -1 for all but the last."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: must be 1 or more, not {top_k}")


def _connection(part: ScaleDownRanker | ScaleDownGenerator) -> Connection:
    """Opens clients, one for each call: a component may be shared by threads and event loops."""
    key = part.api_key.resolve_value() if part.api_key else None
    return Connection(part.url, key, timeout=part.timeout)


def _with_text(documents: list[Document]) -> list[Document]:
    """Those that can be read: an image's has no content."""
    return [document for document in documents if (document.content or "").strip()]


def _passages(documents: list[Document]) -> list[Passage]:
    return [Passage(doc.content or "", title=str(doc.meta.get("title") or ""), id=doc.id) for doc in documents]


def _chunk(event: Token | Done) -> StreamingChunk:
    if isinstance(event, Token):
        return StreamingChunk(event.text)
    return StreamingChunk("", meta=_meta(event.answer), finish_reason=event.answer.finish_reason)


def _ended(event: object) -> Replied:
    assert isinstance(event, Done)  # the client raises where a stream ends in any other way
    return _replied(event.answer)


def _replied(answer: Answer) -> Replied:
    return Replied(replies=[ChatMessage.from_assistant(answer.answer, meta=_meta(answer))])


def _meta(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    return {
        "model": answer.checkpoint,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "text_tokens": usage.text_tokens,
            "tokens_saved": usage.tokens_saved,
        },
        "answerable": answer.answerable and asdict(answer.answerable),
        "passages": [{"id": p.id, "relevance": p.relevance, "mode": p.mode} for p in answer.passages],
    }
