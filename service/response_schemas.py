"""Responses as models, described for the API's document."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from core.policy import Reason, Shown
from service.caches.schemas import CacheUsage
from service.policy_schemas import PlanOut
from service.schemas import Embeddings

PassageField = Literal["title", "text"]


class EvidenceSpan(BaseModel):
    """Words an embedding came from: code points `start` to `end` of the passage's title or text."""

    field: PassageField
    start: int = Field(examples=[10])
    end: int = Field(examples=[27])
    weight: float = Field(description="share of the embedding's attention, 0..1", examples=[0.82])


EmbeddingSpans = list[list[EvidenceSpan]]
Evidence = Annotated[
    EmbeddingSpans | None,
    Field(
        description="with explain: for each memory embedding, the spans it came from, heaviest first; null for passages"
        " shown as text or sent as embeddings, and for a readout without attention"
    ),
]


class ChunkOut(BaseModel):
    """One chunk: its character span in the passage (title, line break, text), sizes and raw relevance score."""

    start: int
    end: int
    tokens: int
    memory_tokens: int
    score: float


class CompressedPassageOut(BaseModel):
    """One passage, compressed. `rate` is what was achieved: tokens in by memory embeddings out."""

    index: int
    id: str | None
    relevance: float
    tokens: int
    memory_tokens: int
    rate: float
    chunks: list[ChunkOut]
    embeddings: Embeddings
    embedding_id: str | None
    evidence: Evidence = None


class CompressUsage(CacheUsage):
    """Tokens of the passages as text, memory embeddings made of them, and one by the other."""

    text_tokens: int
    memory_tokens: int
    rate: float


Timings = Annotated[
    dict[str, float],
    Field(
        description="milliseconds of each stage, waiting for it included, and in all",
        examples=[{"compress": 41.0, "total": 44.9}],
    ),
]


class CompressResponse(BaseModel):
    """Passages in the caller's order."""

    passages: list[CompressedPassageOut]
    usage: CompressUsage
    timings_ms: Timings
    checkpoint: str


class RankedPassage(BaseModel):
    """A passage by its index in the request."""

    index: int
    id: str | None
    relevance: float


class RerankUsage(CacheUsage):
    """Tokens of the passages as text."""

    text_tokens: int


class RerankResponse(BaseModel):
    """Passages, most relevant first."""

    results: list[RankedPassage]
    usage: RerankUsage
    timings_ms: Timings
    checkpoint: str


class AnsweredPassage(BaseModel):
    """A passage, its relevance to the query in 0..1, and how the generator saw it."""

    index: int
    id: str | None
    relevance: float | None = Field(description="null where auto shows a passage as text without scoring it")
    mode: Shown = Field(description="text; compressed: as embeddings; hybrid: embeddings, then its text; or dropped")
    reason: Reason = Field(
        description="why: asked, most_relevant, relevant (enough for text, and it fits), pays, no_gain (compressing it"
        " would not pay), no_text (only its embeddings are known), over_budget, below_min_relevance"
    )
    tokens: int = Field(description="of the prompt, its number left out; 0 where dropped")
    evidence: Evidence = None


class Usage(CacheUsage):
    """Generator tokens: of the prompt with all passages as text, of the prompt as it was, saved, and generated."""

    text_tokens: int
    prompt_tokens: int
    tokens_saved: int
    completion_tokens: int


class Answerable(BaseModel):
    """Whether the passages hold an answer at all: their best relevance against the checkpoint's threshold."""

    probability: float
    answerable: bool


class AnswerResponse(BaseModel):
    """The answer; passages in the caller's order."""

    answer: str = Field(description="what the generator wrote, up to the first of `stop`")
    finish_reason: Literal["stop", "length"] = Field(
        description="stop: it ended by itself or at a text of `stop`; length: max_new_tokens were written"
    )
    passages: list[AnsweredPassage]
    answerable: Answerable | None = Field(
        description="null where the checkpoint has no calibrated threshold, or auto has not scored all passages"
    )
    plan: PlanOut
    usage: Usage
    timings_ms: Timings
    checkpoint: str
