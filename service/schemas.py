"""Requests and responses as strict models, with examples. Limits that an operator sets are in `limits.py`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from core.policy import Policy, Reason, RequestMode, Shown
from service.caches.schemas import CacheUsage
from service.embeddings_codec import Dtype, Encoding
from service.errors import OTHER_THAN_TEXT
from service.policy_schemas import HybridTop, MaxPromptTokens, MinRelevance, PlanOut


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate") from None
    return text


def _check_not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


Text = Annotated[str, AfterValidator(_check_text)]
FilledText = Annotated[Text, AfterValidator(_check_not_empty)]
Identifier = Annotated[Text, Field(max_length=256)]
Finite = Field(allow_inf_nan=False)
PassageField = Literal["title", "text"]
QUERY = "What does the Curie temperature of a ferromagnet mark?"
TEXT = "Above its Curie temperature a ferromagnet loses its permanent magnetism. For iron this is 1043 K."


class Strict(BaseModel):
    """Unknown fields and wrong types are refused: a misspelt option must not pass in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PassageIn(Strict):
    """A passage of text."""

    id: Identifier | None = Field(default=None, description="the caller's own name for it, given back as it is")
    title: Text = Field(default="", examples=["Curie temperature"])
    text: FilledText = Field(examples=[TEXT])


class Embeddings(Strict):
    """A compressed passage as `/compress` returns it and `/answer` takes it back."""

    dtype: Dtype = Field(description="float32 is exact; float16 is half the size and loses precision")
    encoding: Encoding = Field(description="base64 of raw little-endian numbers, row by row; or nested lists")
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] = Field(
        description="memory embeddings, width of the generator", examples=[[8, 576]]
    )
    data: str | Annotated[list[Annotated[list[float], Field(fail_fast=True)]], Field(fail_fast=True)]
    score: Annotated[float, Finite] = Field(description="raw relevance score of the passage")
    tokens: Annotated[int, Field(ge=1, le=10_000_000)] = Field(description="the passage's length as text, in tokens")
    checkpoint: Annotated[str, Field(max_length=256)] = Field(
        description="the version that made them; no other reads them"
    )

    @model_validator(mode="after")
    def _check_data(self) -> "Embeddings":
        if isinstance(self.data, str) != (self.encoding == "base64"):
            raise ValueError(f"data does not look like encoding {self.encoding}")
        return self


class AnswerPassage(Strict):
    """A passage of text, or one already compressed: inline as `embeddings` or by its `embedding_id`."""

    id: Identifier | None = None
    title: Text = ""
    text: FilledText | None = Field(default=None, examples=[TEXT])
    embeddings: Embeddings | None = None
    embedding_id: Annotated[str, Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _check_source(self) -> "AnswerPassage":
        if self.embeddings is not None and self.embedding_id is not None:
            raise ValueError("give embeddings or embedding_id, not both")
        if self.text is None and self.embeddings is None and self.embedding_id is None:
            raise ValueError("text is required where neither embeddings nor embedding_id is given")
        return self


def _kind(value: Any) -> str:
    return "<text>" if isinstance(value, str) else OTHER_THAN_TEXT


# A text, or something else: decided by the value's type, so that an error is about the one that was meant.
IS_TEXT, IS_OTHER, BY_KIND = Tag("<text>"), Tag(OTHER_THAN_TEXT), Discriminator(_kind)
PlainPassages = Annotated[
    list[Annotated[Annotated[FilledText, IS_TEXT] | Annotated[PassageIn, IS_OTHER], BY_KIND]],
    Field(fail_fast=True),
    Field(min_length=1, description="texts, or objects with `text` and optionally `id` and `title`"),
]
AnswerPassages = Annotated[
    list[Annotated[Annotated[FilledText, IS_TEXT] | Annotated[AnswerPassage, IS_OTHER], BY_KIND]],
    Field(fail_fast=True),
    Field(min_length=1, description="texts, or objects with `text`, `embeddings` or `embedding_id`"),
]
Timeout = Annotated[float, Field(gt=0, allow_inf_nan=False, description="deadline of this request in seconds")]
Rate = Annotated[int, Field(ge=1, description="compression rate: one of the checkpoint's; unset: its first")]
Explain = Annotated[
    bool, Field(description="also say which words each memory embedding came from, and what each mode would have cost")
]


class CompressRequest(Strict):
    """A query and the passages to compress for it."""

    query: FilledText = Field(examples=[QUERY])
    passages: PlainPassages = Field(examples=[[TEXT]])
    rate: Rate | None = None
    dtype: Dtype = "float32"
    encoding: Encoding = "base64"
    store: bool = Field(
        default=False, description="also keep the embeddings here and return an embedding_id for each passage"
    )
    explain: Explain = False
    timeout: Timeout | None = None


class RerankRequest(Strict):
    """A query and the passages to put in order."""

    query: FilledText = Field(examples=[QUERY])
    passages: PlainPassages = Field(examples=[[TEXT, "Butter melts at 32 to 35 degrees Celsius."]])
    top_n: Annotated[int, Field(ge=1)] | None = Field(default=None, description="return only the best so many")
    timeout: Timeout | None = None


class AnswerRequest(Strict):
    """A query and the passages to answer it from."""

    query: FilledText = Field(examples=[QUERY])
    passages: AnswerPassages = Field(examples=[[TEXT, {"id": "b", "title": "Butter", "text": "It melts at 32 °C."}]])
    mode: RequestMode | None = Field(
        default=None,
        description="how passages reach the generator. hybrid: the best as text; auto: each as relevance, costs and"
        " max_prompt_tokens have it. Unset: auto under max_prompt_tokens, else compressed",
    )
    hybrid_top: HybridTop | None = None
    max_prompt_tokens: MaxPromptTokens | None = None
    min_relevance: MinRelevance = 0.0
    rate: Rate | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0, le=100), Finite] = Field(
        default=0.0, description="0: always the likeliest token"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = Field(default=0, description="0: no limit")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(default=None, description="makes sampling repeatable")
    stop: Annotated[list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(fail_fast=True)] = Field(
        default=[], description="the answer ends before the first of these"
    )
    stream: bool = Field(default=False, description="server-sent events: passages, token..., done")
    explain: Explain = False
    timeout: Timeout | None = None

    @property
    def policy(self) -> Policy:
        """How the caller wants passages to be shown."""
        mode = self.mode or ("compressed" if self.max_prompt_tokens is None else "auto")
        return Policy(mode, self.hybrid_top, self.max_prompt_tokens, self.min_relevance)


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


Timings = Annotated[dict[str, float], Field(examples=[{"compress": 41.0, "total": 44.9}])]


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


class RerankResponse(BaseModel):
    """Passages, most relevant first."""

    results: list[RankedPassage]
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

    answer: str
    finish_reason: Literal["stop", "length"]
    passages: list[AnsweredPassage]
    answerable: Answerable | None = Field(description="null where the checkpoint has no calibrated threshold")
    plan: PlanOut
    usage: Usage
    timings_ms: Timings
    checkpoint: str
