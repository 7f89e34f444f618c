"""What the service takes and answers, as immutable values. Knows no HTTP and needs no torch.

Fields that a newer service adds are passed over, so that an older client goes on working.
"""

import base64
import struct
from dataclasses import dataclass
from typing import Literal

# In the order of `core.policy.RequestMode`: typing takes both for one type, and the first made is what messages show.
Mode = Literal["compressed", "text", "hybrid", "auto"]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A compressed passage as `compress` returns it and `answer` takes it back; only `checkpoint` can read it.

    query_sha256    of the query it was compressed for; `answer` refuses it under another; None: not checked
    shape   memory embeddings and width of the generator
    data    base64 of raw little-endian numbers, row by row
    score   raw relevance score of the passage
    tokens  the passage's length as text
    """

    dtype: Literal["float32", "float16"]
    encoding: Literal["base64"]
    shape: tuple[int, int]
    data: str
    score: float
    tokens: int
    checkpoint: str
    query_sha256: str | None = None

    def rows(self) -> list[list[float]]:
        """The numbers themselves: one list a memory embedding."""
        count, width = self.shape
        code = "f" if self.dtype == "float32" else "e"
        numbers = struct.unpack(f"<{count * width}{code}", base64.b64decode(self.data, validate=True))
        return [list(numbers[start : start + width]) for start in range(0, count * width, width)]


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage to ask about: its text, or for `answer` what `compress` made of it."""

    text: str | None = None
    title: str = ""
    id: str | None = None
    embeddings: Embeddings | None = None
    embedding_id: str | None = None


@dataclass(frozen=True, slots=True)
class EvidenceSpan:
    """Characters `start` to `end` of the passage's title or text, and their share of one embedding's attention."""

    field: Literal["title", "text"]
    start: int
    end: int
    weight: float


Evidence = tuple[tuple[EvidenceSpan, ...], ...]


@dataclass(frozen=True, slots=True)
class AnsweredPassage:
    """A passage of an answer: its relevance in 0..1, None where it was not scored, and how the generator saw it.

    reason  why it was shown so, as the service's API names it; tokens: what it took of the prompt
    """

    index: int
    id: str | None
    relevance: float | None
    mode: Literal["text", "compressed", "hybrid", "dropped"]
    evidence: Evidence | None = None
    reason: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Answerable:
    """Whether the passages hold an answer: their best relevance against the checkpoint's threshold."""

    probability: float
    answerable: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Generator tokens: of the prompt with all passages as text, of the prompt as it was, saved, and generated.

    cached_chunks, cached_documents     chunks that were not computed, or not wholly: they were known already
    """

    text_tokens: int
    prompt_tokens: int
    tokens_saved: int
    completion_tokens: int
    cached_chunks: int = 0
    cached_documents: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """How the request as a whole was served: what its passages' modes amount to, why, and at which rate.

    rate            of what the compressor read; None where it read nothing
    estimates_ms    from compression to the first token, for all as `text`, all `compressed`, and `hybrid`
    """

    mode: Literal["compressed", "text", "hybrid"] | None
    reason: str
    rate: int | None
    max_prompt_tokens: int | None = None
    estimates_ms: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; its passages in the order they were given."""

    answer: str
    finish_reason: Literal["stop", "length"]
    passages: tuple[AnsweredPassage, ...]
    answerable: Answerable | None
    usage: Usage
    timings_ms: dict[str, float]
    checkpoint: str
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class PassagesRead:
    """First event of a stream: the passages are compressed and scored, the answer begins."""

    passages: tuple[AnsweredPassage, ...]
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """Last event of a stream: the whole answer with its usage."""

    answer: Answer


StreamEvent = PassagesRead | Token | Done


@dataclass(frozen=True, slots=True)
class Chunk:
    """Characters `start` to `end` of a passage (title, line break, text), sizes and raw relevance score."""

    start: int
    end: int
    tokens: int
    memory_tokens: int
    score: float


@dataclass(frozen=True, slots=True)
class CompressedPassage:
    """One passage, compressed. `rate` is what was achieved: tokens in by memory embeddings out."""

    index: int
    id: str | None
    relevance: float
    tokens: int
    memory_tokens: int
    rate: float
    chunks: tuple[Chunk, ...]
    embeddings: Embeddings
    embedding_id: str | None
    evidence: Evidence | None = None

    def as_passage(self) -> Passage:
        """What `answer` takes in place of the text: the id the service keeps it by, or the embeddings themselves."""
        if self.embedding_id is not None:
            return Passage(id=self.id, embedding_id=self.embedding_id)
        return Passage(id=self.id, embeddings=self.embeddings)


@dataclass(frozen=True, slots=True)
class CompressUsage:
    """Tokens of the passages as text, memory embeddings made of them, and one by the other."""

    text_tokens: int
    memory_tokens: int
    rate: float
    cached_chunks: int = 0
    cached_documents: int = 0


@dataclass(frozen=True, slots=True)
class Compression:
    """Compressed passages in the order they were given."""

    passages: tuple[CompressedPassage, ...]
    usage: CompressUsage
    timings_ms: dict[str, float]
    checkpoint: str


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """A passage by its index in the request."""

    index: int
    id: str | None
    relevance: float


@dataclass(frozen=True, slots=True)
class RerankUsage:
    """Tokens of the passages as text, and how many of their chunks caches gave."""

    text_tokens: int
    cached_chunks: int = 0
    cached_documents: int = 0


@dataclass(frozen=True, slots=True)
class Ranking:
    """Passages, most relevant first. `usage` is None from services before it was told."""

    results: tuple[RankedPassage, ...]
    timings_ms: dict[str, float]
    checkpoint: str
    usage: RerankUsage | None = None


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the service takes requests; `status` says why it does not, `checkpoint` what it serves."""

    ready: bool
    status: str
    checkpoint: str | None = None
    trained: bool | None = None


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """`active` serves; `kept` served before and are in memory, the next rollback last; `available` are on disk.

    `available` is None where the service's disk does not answer. `loaded` is in memory too, to be activated; None where
    nothing was loaded, and from services before it was told. `changing` is what a change that is under way is about.
    `version` is what a change was about; None where nothing was changed.
    """

    active: str
    kept: tuple[str, ...]
    available: tuple[str, ...] | None
    loaded: str | None = None
    changing: str | None = None
    version: str | None = None
