"""`/rerank` as Text Embeddings Inference (TEI) has it: `texts` in, a bare array out. Knows no HTTP."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, RootModel

from service.dialects.ranking import ranked
from service.jobs import Compressed
from service.schemas import TEXT, FilledText, Query, RerankRequest, Strict
from service.session import Session


class TeiRequest(Strict):
    """TEI's rerank request. Texts are read whole whatever their length, so there is nothing to truncate."""

    query: Query
    texts: Annotated[list[FilledText], Field(min_length=1, fail_fast=True)] = Field(examples=[[TEXT]])
    truncate: bool | None = Field(default=None, description="without effect: texts are read whole")
    truncation_direction: Literal["right", "left", "Right", "Left"] = Field(default="right", description="no effect")
    raw_scores: bool = Field(default=False, description="the score as the compressor gives it, not calibrated to 0..1")
    return_text: bool = Field(default=False, description="repeat each text in the response")

    def as_native(self) -> RerankRequest:
        """The same question in the service's own words."""
        return RerankRequest(query=self.query, passages=list(self.texts))


class TeiRank(BaseModel):
    """A text by its index in the request; `text` only where it was asked for."""

    index: int
    score: float
    text: str | None = Field(default=None, exclude_if=lambda text: text is None)


class TeiResponse(RootModel[list[TeiRank]]):
    """Texts, most relevant first."""


def tei_response(body: TeiRequest, _: Session, compressed: Compressed) -> TeiResponse:
    """The whole response."""
    return TeiResponse(
        [
            TeiRank(index=each.index, score=each.score, text=body.texts[each.index] if body.return_text else None)
            for each in ranked(compressed, raw=body.raw_scores)
        ]
    )
