"""Requests and responses of `/v1/rerank` (Jina, vLLM) and `/v2/rerank` (Cohere). Knows no HTTP."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.schemas import BY_KIND, IS_OTHER, IS_TEXT, TEXT, FilledText, Query, RerankRequest, Strict

OTHER = "Butter melts at 32 to 35 degrees Celsius."
IGNORED: Any = Field(default=None, description="accepted, and without effect here")
Count = Annotated[int, Field(ge=1)]


class JinaDocument(BaseModel):
    """A document as an object; what it holds beside `text` is the caller's own."""

    model_config = ConfigDict(strict=True, frozen=True)

    text: FilledText


JinaDocuments = Annotated[
    list[Annotated[Annotated[FilledText, IS_TEXT] | Annotated[JinaDocument, IS_OTHER], BY_KIND]],
    Field(min_length=1, fail_fast=True),
]


class JinaRequest(Strict):
    """Jina's rerank request, vLLM's, and version 1 of Cohere's: they differ only in options."""

    model: str | None = Field(default=None, max_length=256, description="any: one model serves")
    query: Query
    documents: JinaDocuments = Field(examples=[[TEXT, {"text": OTHER}]])
    top_n: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="return only the best so many; 0, as in vLLM: all"
    )
    return_documents: bool = Field(default=True, description="repeat each document in the response")
    use_activation: bool | None = Field(default=None, description="false: the raw score, not calibrated to 0..1")
    activation: bool | None = Field(default=None, description="older name of use_activation")
    raw_scores: bool = Field(default=False, description="the same the other way round, as infinity has it")

    truncation: bool | None = IGNORED
    truncate_prompt_tokens: int | None = IGNORED
    max_tokens_per_query: int | None = IGNORED
    max_tokens_per_doc: int | None = IGNORED
    max_doc_length: int | None = IGNORED
    max_chunks_per_doc: int | None = IGNORED
    priority: int | None = IGNORED
    user: str | None = IGNORED
    rank_fields: Annotated[list[Literal["text"]], Field(max_length=1)] | None = Field(
        default=None, description="of Cohere's version 1: only the text is read"
    )

    @property
    def limit(self) -> int | None:
        """Most results to return; None: all."""
        return self.top_n or None

    @property
    def raw(self) -> bool:
        """Whether raw scores are asked for."""
        activation = self.activation if self.use_activation is None else self.use_activation
        return self.raw_scores or activation is False

    def text_of(self, index: int) -> str:
        """The text of a document."""
        document = self.documents[index]
        return document if isinstance(document, str) else document.text

    def as_native(self) -> RerankRequest:
        """The same question in the service's own words."""
        return RerankRequest(query=self.query, passages=[self.text_of(i) for i in range(len(self.documents))])


class JinaRank(BaseModel):
    """A document by its index in the request; itself only where it was asked for."""

    index: int
    relevance_score: float
    document: JinaDocument | None = Field(default=None, exclude_if=lambda document: document is None)


class JinaUsage(BaseModel):
    """Tokens of all documents."""

    prompt_tokens: int
    total_tokens: int


class JinaResponse(BaseModel):
    """Documents, most relevant first."""

    id: str
    object: Literal["list"] = "list"
    model: str = Field(description="the checkpoint that served")
    results: list[JinaRank]
    usage: JinaUsage


class CohereRequest(Strict):
    """Cohere's rerank request, version 2: documents are texts."""

    model: str | None = Field(default=None, max_length=256, description="any: one model serves")
    query: Query
    documents: Annotated[list[FilledText], Field(min_length=1, fail_fast=True)] = Field(examples=[[TEXT, OTHER]])
    top_n: Count | None = Field(default=None, description="return only the best so many")
    max_tokens_per_doc: Count | None = IGNORED
    relevant_spans: dict[str, Any] | None = IGNORED
    priority: int | None = IGNORED

    def as_native(self) -> RerankRequest:
        """The same question in the service's own words."""
        return RerankRequest(query=self.query, passages=list(self.documents))


class CohereRank(BaseModel):
    """A document by its index in the request."""

    index: int
    relevance_score: float = Field(ge=0, le=1)


class ApiVersion(BaseModel):
    """The version of Cohere's API that is spoken."""

    version: str


class BilledUnits(BaseModel):
    """One search; nothing is billed."""

    search_units: int


class CohereTokens(BaseModel):
    """Tokens of all documents."""

    input_tokens: int
    output_tokens: int


class CohereMeta(BaseModel):
    """What Cohere's clients read beside the results."""

    api_version: ApiVersion
    billed_units: BilledUnits
    tokens: CohereTokens
    warnings: list[str] | None = Field(default=None, exclude_if=lambda warnings: warnings is None)


class CohereResponse(BaseModel):
    """Documents, most relevant first."""

    id: str
    results: list[CohereRank]
    meta: CohereMeta
