"""LlamaIndex: a postprocessor that keeps what is relevant, and a query engine that answers from retrieved nodes.

engine = ScaleDownQueryEngine(retriever=index.as_retriever(), node_postprocessors=[ScaleDownRerank(top_n=5)])
"""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict
from typing import Any, Literal, cast

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import RESPONSE_TYPE, AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.bridge.pydantic import BaseModel, ConfigDict, Field, SecretStr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import CustomQueryEngine
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from service.client import (
    Answer,
    AnsweredPassage,
    AnswerOptions,
    Connection,
    Done,
    Passage,
    PassagesRead,
    Ranking,
    StreamEvent,
    Token,
)

EMPTY = "Empty Response"  # what LlamaIndex's own engines say where nothing was retrieved


class Remote(BaseModel):
    """Where the service is: see `service.client.Connection`."""

    model_config = ConfigDict(extra="forbid")  # an option in the wrong place, or misspelt, must not pass in silence

    url: str | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True)
    timeout: float = Connection.timeout

    @property
    def connection(self) -> Connection:
        """Opens clients, one for each call: an object of LlamaIndex's may be shared by threads and event loops."""
        key = self.api_key.get_secret_value() if self.api_key else None
        return Connection(self.url, key, timeout=self.timeout)


class ScaleDownRerank(Remote, BaseNodePostprocessor):
    """Puts nodes in order of their relevance, which becomes their score, 0..1.

    top_n           keep only the best so many
    min_relevance   leave out what is less relevant
    hops            2: for questions that need two passages
    """

    top_n: int | None = Field(default=None, ge=1)
    min_relevance: float = Field(default=0.0, ge=0, le=1)
    hops: Literal[1, 2] = 1

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serialises it by."""
        return "ScaleDownRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        nodes = _with_text(nodes)
        if not nodes:
            return []
        query, passages = _query_of(query_bundle), [passage_of(node) for node in nodes]
        with self.connection.client() as client:
            return self._kept(nodes, client.rerank(query, passages, hops=self.hops))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        nodes = _with_text(nodes)
        if not nodes:
            return []
        query, passages = _query_of(query_bundle), [passage_of(node) for node in nodes]
        async with self.connection.async_client() as client:
            return self._kept(nodes, await client.rerank(query, passages, hops=self.hops))

    def _kept(self, nodes: Sequence[NodeWithScore], ranking: Ranking) -> list[NodeWithScore]:
        best = [each for each in ranking.results if each.relevance >= self.min_relevance][: self.top_n]
        return [NodeWithScore(node=nodes[each.index].node, score=each.relevance) for each in best]


class ScaleDownQueryEngine(Remote, CustomQueryEngine):
    """Retrieves nodes and has the service answer from them, compressed. Needs no LLM in LlamaIndex's settings.

    options     what `service.client`'s `answer` takes: mode, rate, max_new_tokens, ...
    streaming   return a response whose text arrives piece by piece

    The response's `source_nodes` are scored by relevance; its `metadata` has usage with the tokens saved, the
    checkpoint, whether the nodes hold an answer at all (`answerable`) and the finish reason (in a stream: once it has
    ended).
    """

    retriever: BaseRetriever
    node_postprocessors: list[BaseNodePostprocessor] = Field(default_factory=list)
    options: dict[str, Any] = Field(default_factory=dict)
    streaming: bool = False

    def custom_query(self, query_str: str) -> RESPONSE_TYPE:
        """Retrieve and answer. Raises ServiceError."""
        nodes = self.retriever.retrieve(query_str)
        for postprocessor in self.node_postprocessors:
            nodes = postprocessor.postprocess_nodes(nodes, query_str=query_str)
        nodes = _with_text(nodes)
        if not nodes:
            return Response(EMPTY)
        passages, options = [passage_of(node) for node in nodes], cast(AnswerOptions, self.options)
        with ExitStack() as stack:
            client = stack.enter_context(self.connection.client())
            if not self.streaming:
                answer = client.answer(query_str, passages, **options)
                return Response(answer.answer, _scored(nodes, answer.passages), _metadata(answer))
            events = stack.enter_context(client.stream(query_str, passages, **options))
            read = next(events)
            metadata: dict[str, Any] = {}
            pieces = _pieces(events, metadata, stack.pop_all())
            return StreamingResponse(pieces, _read(nodes, read), metadata)

    async def acustom_query(self, query_str: str) -> RESPONSE_TYPE:
        """The same, awaited."""
        nodes = await self.retriever.aretrieve(query_str)
        for postprocessor in self.node_postprocessors:
            nodes = await postprocessor.apostprocess_nodes(nodes, query_str=query_str)
        nodes = _with_text(nodes)
        if not nodes:
            return Response(EMPTY)
        passages, options = [passage_of(node) for node in nodes], cast(AnswerOptions, self.options)
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(self.connection.async_client())
            if not self.streaming:
                answer = await client.answer(query_str, passages, **options)
                return Response(answer.answer, _scored(nodes, answer.passages), _metadata(answer))
            events = await stack.enter_async_context(client.stream(query_str, passages, **options))
            read = await anext(events)
            metadata: dict[str, Any] = {}
            pieces = _apieces(events, metadata, stack.pop_all())
            return AsyncStreamingResponse(pieces, _read(nodes, read), metadata)


def _with_text(nodes: Sequence[NodeWithScore]) -> list[NodeWithScore]:
    """Those that can be read: an image's has no text."""
    return [node for node in nodes if _text_of(node).strip()]


def _text_of(node: NodeWithScore) -> str:
    return node.node.get_content(metadata_mode=MetadataMode.NONE)


def passage_of(node: NodeWithScore) -> Passage:
    """A node as a passage: its text as it is, and the title that its metadata may have."""
    return Passage(_text_of(node), title=str(node.node.metadata.get("title") or ""), id=node.node.node_id)


def _query_of(bundle: QueryBundle | None) -> str:
    if bundle is None:
        raise ValueError("query_str: relevance is relevance to a question, and there is none")
    return bundle.query_str


def _pieces(events: Iterator[StreamEvent], metadata: dict[str, Any], stack: ExitStack) -> Generator[str, None, None]:
    """The answer's text; fills in `metadata` at the end. Owns the connection."""
    with stack:
        for event in events:
            if isinstance(event, Token):
                yield event.text
            elif isinstance(event, Done):
                metadata.update(_metadata(event.answer))


async def _apieces(
    events: AsyncIterator[StreamEvent], metadata: dict[str, Any], stack: AsyncExitStack
) -> AsyncGenerator[str, None]:
    async with stack:
        async for event in events:
            if isinstance(event, Token):
                yield event.text
            elif isinstance(event, Done):
                metadata.update(_metadata(event.answer))


def _read(nodes: Sequence[NodeWithScore], event: StreamEvent) -> list[NodeWithScore]:
    return _scored(nodes, event.passages) if isinstance(event, PassagesRead) else list(nodes)


def _scored(nodes: Sequence[NodeWithScore], passages: Sequence[AnsweredPassage]) -> list[NodeWithScore]:
    """What the answer was read from."""
    read = (each for each in passages if each.mode != "dropped")
    return [NodeWithScore(node=nodes[each.index].node, score=each.relevance) for each in read]


def _metadata(answer: Answer) -> dict[str, Any]:
    return {
        "checkpoint": answer.checkpoint,
        "finish_reason": answer.finish_reason,
        "text_tokens": answer.usage.text_tokens,
        "prompt_tokens": answer.usage.prompt_tokens,
        "tokens_saved": answer.usage.tokens_saved,
        "answerable": answer.answerable and asdict(answer.answerable),
        "completion_tokens": answer.usage.completion_tokens,
    }
