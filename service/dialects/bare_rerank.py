"""What comes to `/rerank`: the service's own body, TEI's or Jina's, told apart by the name of the passages' field.

Clients of vLLM and infinity post Jina's body to it. Knows no engine.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, Discriminator, Tag

from service.dialects.rerank import jina_response
from service.dialects.rerank_schemas import JinaRequest
from service.dialects.tei import TeiRequest, tei_response
from service.jobs import Compressed
from service.responses import rerank_response
from service.schemas import RerankRequest
from service.session import Session

Written = Callable[[Session, Compressed], BaseModel]
DIALECTS = {"texts": "tei", "documents": "jina"}


def _field(value: Any) -> str:
    if isinstance(value, TeiRequest | JinaRequest):
        return "texts" if isinstance(value, TeiRequest) else "documents"
    names = ("texts", "passages", "documents")
    return next((name for name in names if isinstance(value, dict) and name in value), "passages")


def _tag(value: Any) -> str:
    return f"<{_field(value)}>"


# The tags stand in angle brackets so that `errors.py` can leave them out of a field's name.
RerankBody = Annotated[
    Annotated[RerankRequest, Tag("<passages>")]
    | Annotated[TeiRequest, Tag("<texts>")]
    | Annotated[JinaRequest, Tag("<documents>")],
    Discriminator(_tag),
]


async def choose_dialect(request: Request) -> None:
    """A dependency of `/rerank`: who asks as TEI's or Jina's clients do also gets errors as they know them."""
    if await request.body():
        body = await request.json()  # parsed already, and kept by the request
        request.state.dialect = DIALECTS.get(_field(body))


def as_native(body: RerankRequest | TeiRequest | JinaRequest) -> tuple[RerankRequest, Written]:
    """The same question in the service's own words, and what writes its response in the caller's."""
    match body:
        case TeiRequest():
            return body.as_native(), partial(tei_response, body)
        case JinaRequest():
            return body.as_native(), partial(jina_response, body)
        case _:
            return body, partial(rerank_response, top_n=body.top_n)
