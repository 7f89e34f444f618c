"""LangChain: a document compressor that keeps what is relevant, and a chat model that answers from documents.

chain = {"question": RunnablePassthrough(), "documents": retriever} | RunnableLambda(ask) | ChatScaleDown()
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from service.client import Answer, AnswerOptions, Connection, Done, Passage, Ranking, Token

DOCUMENTS = "documents"
FIELDS = frozenset(field.name for field in fields(Passage))
SCORE = "relevance_score"  # the name that LangChain's other rerankers use
Documents = Sequence[Document | Mapping[str, Any] | str]


class Remote(BaseModel):
    """Where the service is: see `service.client.Connection`."""

    url: str | None = None
    api_key: SecretStr | None = None
    timeout: float = Connection.timeout

    @property
    def connection(self) -> Connection:
        """Opens clients, one for each call: an object of LangChain's may be shared by threads and event loops."""
        key = self.api_key.get_secret_value() if self.api_key else None
        return Connection(self.url, key, timeout=self.timeout)


class ScaleDownRerank(Remote, BaseDocumentCompressor):
    """Puts documents in order of their relevance, which is added to their metadata as `relevance_score`, 0..1.

    top_n           keep only the best so many
    min_relevance   leave out what is less relevant
    hops            2: for questions that need two passages
    """

    model_config = ConfigDict(extra="forbid")

    top_n: int | None = Field(default=None, ge=1)
    min_relevance: float = Field(default=0.0, ge=0, le=1)
    hops: Literal[1, 2] = 1

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The relevant documents, best first. Raises ServiceError."""
        documents = _with_text(documents)
        if not documents:
            return []
        passages = [passage_of(document) for document in documents]
        with self.connection.client() as client:
            return self._kept(documents, client.rerank(query, passages, hops=self.hops))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The same, awaited."""
        documents = _with_text(documents)
        if not documents:
            return []
        passages = [passage_of(document) for document in documents]
        async with self.connection.async_client() as client:
            return self._kept(documents, await client.rerank(query, passages, hops=self.hops))

    def _kept(self, documents: Sequence[Document], ranking: Ranking) -> list[Document]:
        best = [each for each in ranking.results if each.relevance >= self.min_relevance][: self.top_n]
        return [_scored(documents[each.index], each.relevance) for each in best]


class ChatScaleDown(Remote, BaseChatModel):
    """Answers the last human message from documents: given to the call, bound, or in that message (see `ask`).

    options            what `service.client`'s `answer` takes: mode, rate, max_new_tokens, ...; a call's own win
    earlier_messages   checkpoints are trained on single questions: a system message or an earlier turn is refused,
                       unless this says to ignore them

    `usage_metadata` has the tokens, `response_metadata` what was saved, each document's relevance, whether they hold an
    answer at all (`answerable`), and the checkpoint.
    """

    model_config = ConfigDict(extra="forbid")

    options: dict[str, Any] = Field(default_factory=dict)
    earlier_messages: Literal["refuse", "ignore"] = "refuse"

    @property
    def _llm_type(self) -> str:
        return "scaledown"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"url": self.connection.address, **self.options}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        query, passages, options = self._question(messages, stop, kwargs)
        with self.connection.client() as client:
            return _result(client.answer(query, passages, **options))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        query, passages, options = self._question(messages, stop, kwargs)
        async with self.connection.async_client() as client:
            return _result(await client.answer(query, passages, **options))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        query, passages, options = self._question(messages, stop, kwargs)
        with self.connection.client() as client, client.stream(query, passages, **options) as events:
            for event in events:
                if isinstance(event, Token | Done):
                    yield _chunk(event)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        query, passages, options = self._question(messages, stop, kwargs)
        async with self.connection.async_client() as client, client.stream(query, passages, **options) as events:
            async for event in events:
                if isinstance(event, Token | Done):
                    yield _chunk(event)

    def _question(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, given: dict[str, Any]
    ) -> tuple[str, list[Passage], AnswerOptions]:
        *earlier, last = messages
        if not isinstance(last, HumanMessage):
            raise ValueError(f"messages: the last one must be the question of a human, not of type {last.type}")
        if earlier and self.earlier_messages == "refuse":
            raise ValueError(
                "messages: only the last one is read, as the question: leave out what comes before it, or set "
                "earlier_messages='ignore'"
            )
        options = {**self.options, **({"stop": stop} if stop else {}), **given}
        documents = options.pop(DOCUMENTS, None) or last.additional_kwargs.get(DOCUMENTS) or ()
        passages = [passage for passage in map(passage_of, documents) if _readable(passage)]
        if not passages:
            raise ValueError(
                "documents: give at least one with text: documents=[...] in the call, or a message made by `ask`"
            )
        return last.text, passages, cast(AnswerOptions, options)


def ask(inputs: Mapping[str, Any]) -> list[BaseMessage]:
    """A chain's `question` and `documents` as what ChatScaleDown reads: wrap it in a RunnableLambda."""
    documents = [_plain(document) for document in inputs[DOCUMENTS]]
    return [HumanMessage(inputs["question"], additional_kwargs={DOCUMENTS: documents})]


def _with_text(documents: Sequence[Document]) -> list[Document]:
    """Those that can be read: an image's has no text."""
    return [document for document in documents if document.page_content.strip()]


def passage_of(document: Document | Mapping[str, Any] | str) -> Passage:
    """A document of LangChain's, an object with `text`, or a text. A title is read from the metadata.

    Of an object, what a passage does not have is passed over.
    """
    if isinstance(document, str):
        return Passage(document)
    return Passage(**{name: value for name, value in _plain(document).items() if name in FIELDS})


def _readable(passage: Passage) -> bool:
    """Whether there is something to read: an image's document has no text."""
    return bool((passage.text or "").strip() or passage.embeddings or passage.embedding_id)


def _plain(document: Document | Mapping[str, Any] | str) -> Any:
    if not isinstance(document, Document):
        return document
    return {"text": document.page_content, "title": str(document.metadata.get("title") or ""), "id": document.id}


def _scored(document: Document, relevance: float) -> Document:
    return document.model_copy(update={"metadata": {**document.metadata, SCORE: relevance}})


def _result(answer: Answer) -> ChatResult:
    message = AIMessage(answer.answer, usage_metadata=_usage(answer), response_metadata=_metadata(answer))
    return ChatResult(generations=[ChatGeneration(message=message)])


def _chunk(event: Token | Done) -> ChatGenerationChunk:
    if isinstance(event, Token):
        return ChatGenerationChunk(message=AIMessageChunk(content=event.text))
    answer = event.answer
    return ChatGenerationChunk(
        message=AIMessageChunk(
            content="", usage_metadata=_usage(answer), response_metadata=_metadata(answer), chunk_position="last"
        )
    )


def _usage(answer: Answer) -> UsageMetadata:
    usage = answer.usage
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _metadata(answer: Answer) -> dict[str, Any]:
    return {
        "model_name": answer.checkpoint,
        "finish_reason": answer.finish_reason,
        "text_tokens": answer.usage.text_tokens,
        "tokens_saved": answer.usage.tokens_saved,
        "answerable": answer.answerable and asdict(answer.answerable),
        "passages": [{"id": p.id, "relevance": p.relevance, "mode": p.mode} for p in answer.passages],
    }
