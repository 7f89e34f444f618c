"""Requests as strict models, with examples. Limits that an operator sets are in `limits.py`."""

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from core.policy import Policy, RequestMode
from service.embedding_store import query_sha256
from service.embeddings_codec import Dtype, Encoding
from service.errors import OTHER_THAN_TEXT
from service.policy_schemas import Hops, HybridTop, MaxPromptTokens, MinRelevance
from service.unknown_fields import UNKNOWN, meant_by, shown


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
FilledText = Annotated[Text, AfterValidator(_check_not_empty), Field(json_schema_extra={"minLength": 1})]
Identifier = Annotated[Text, Field(max_length=256)]
Finite = Field(allow_inf_nan=False)
NULL = {"type": "null"}  # in JSON Schema
ANNOTATIONS = frozenset({"title", "description", "default", "examples"})  # of JSON Schema: they constrain nothing
QUERY = "What does the Curie temperature of a ferromagnet mark?"
TEXT = "Above its Curie temperature a ferromagnet loses its permanent magnetism. For iron this is 1043 K."


Query = Annotated[FilledText, Field(description="the question", examples=[QUERY])]


class Strict(BaseModel):
    """Unknown fields and wrong types are refused: a misspelt option must not pass in silence.

    Null in a field that may be left out is the same as leaving it out, whatever its default.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_and_given(cls, value: Any) -> Any:
        """Before anything else: an unknown name is often why a field is missing. One: of a million it takes minutes."""
        if not isinstance(value, dict):
            return value
        unknown = next((name for name in value if name not in cls.model_fields), None)
        if unknown is None:
            fields = cls.model_fields
            return {name: each for name, each in value.items() if each is not None or fields[name].is_required()}
        meant = meant_by(unknown, cls.model_fields)
        hint = "" if meant is None else f"; did you mean {meant}?"
        raise PydanticCustomError("unknown_field", "{message}", {"message": UNKNOWN + hint, "name": shown(unknown)})

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler(core)
        model = handler.resolve_ref_schema(described)
        for name, field in model["properties"].items() if handler.mode == "validation" else ():
            kind = {key: each for key, each in field.items() if key not in ANNOTATIONS}
            nullable = kind in ({}, NULL) or NULL in kind.get("anyOf", ())
            if not nullable and not cls.model_fields[name].is_required():
                model["properties"][name] = {"anyOf": [kind, NULL]} | {k: v for k, v in field.items() if k not in kind}
        return described


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
    tokens: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        description="the passage's length as text, in tokens; at most the largest rate times its memory embeddings"
    )
    checkpoint: Annotated[str, Field(max_length=256)] = Field(
        description="the version that made them; no other reads them"
    )
    query_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        default=None,
        description="SHA-256 of the query (UTF-8) they were made for; `/answer` refuses them under another. Unset: not"
        " checked, and an answer to another query may be wrong",
        examples=[query_sha256(QUERY)],
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

    query: Query
    passages: PlainPassages = Field(examples=[[TEXT]])
    rate: Rate | None = None
    hops: Hops = 1
    dtype: Dtype = Field(default="float32", description="number format of the embeddings; float16 is half the size")
    encoding: Encoding = Field(
        default="base64", description="how embeddings are written; json: as nested lists, of at most 250,000 numbers"
    )
    store: bool = Field(
        default=False, description="also keep the embeddings here and return an embedding_id for each passage"
    )
    explain: Explain = False
    timeout: Timeout | None = None


class RerankRequest(Strict):
    """A query and the passages to put in order."""

    query: Query
    passages: PlainPassages = Field(examples=[[TEXT, "Butter melts at 32 to 35 degrees Celsius."]])
    top_n: Annotated[int, Field(ge=1)] | None = Field(default=None, description="return only the best so many")
    hops: Hops = 1
    timeout: Timeout | None = None


class AnswerRequest(Strict):
    """A query and the passages to answer it from."""

    query: Query
    passages: AnswerPassages = Field(examples=[[TEXT, {"id": "b", "title": "Butter", "text": "It melts at 32 °C."}]])
    mode: RequestMode | None = Field(
        default=None,
        description="how passages reach the generator. compressed: as embeddings; hybrid: the same, and the most"
        " relevant also as text; text: as text; auto: each in the form that costs less, within max_prompt_tokens."
        " Unset: compressed, or auto with max_prompt_tokens",
    )
    hybrid_top: HybridTop | None = None
    max_prompt_tokens: MaxPromptTokens | None = None
    min_relevance: MinRelevance = 0.0
    rate: Rate | None = None
    hops: Hops = 1
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(default=64, description="longest answer, in generator tokens")
    temperature: Annotated[float, Field(ge=0, le=100), Finite] = Field(
        default=0.0, description="0: always the likeliest token"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="sample from the likeliest tokens that make up this share; 1: from all"
    )
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
        return Policy(mode, self.hybrid_top, self.max_prompt_tokens, self.min_relevance, self.hops)
