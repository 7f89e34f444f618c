"""`/v1/rerank` as Jina and vLLM have it, and `/v2/rerank` as Cohere does. Knows no models.

One model serves, so whatever `model` asks for, the response's `model` (Cohere has none) says which one it was.
Documents are read whole: what others offer to cut them short has no effect here, which Cohere's `warnings` also say.
"""

import secrets
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.auth import API_KEY
from service.dialects.errors import CohereErrorResponse, JinaErrorResponse
from service.dialects.ranking import ranked
from service.dialects.rerank_schemas import (
    ApiVersion,
    BilledUnits,
    CohereMeta,
    CohereRank,
    CohereRequest,
    CohereResponse,
    CohereTokens,
    JinaDocument,
    JinaRank,
    JinaRequest,
    JinaResponse,
    JinaUsage,
)
from service.jobs import Compressed
from service.responses import tokens_read
from service.serving import REQUEST_HEADERS, ThisEngine, serve_ranking
from service.session import Session

router = APIRouter(tags=["rerank dialects"], dependencies=[API_KEY])
JINA_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": JinaErrorResponse, "description": "the request cannot be served as it stands"},
    "5XX": {"model": JinaErrorResponse, "description": "the service cannot serve now"},
}
COHERE_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": CohereErrorResponse, "description": "the request cannot be served as it stands"},
    "5XX": {"model": CohereErrorResponse, "description": "the service cannot serve now"},
}


@router.post("/v1/rerank", response_model=JinaResponse, responses=JINA_ERRORS, openapi_extra=REQUEST_HEADERS)
async def rerank_v1(body: JinaRequest, request: Request, engine: ThisEngine) -> Response:
    """Score documents for a query, as Jina and vLLM do."""
    return await serve_ranking(request, engine, body.as_native(), partial(jina_response, body))


@router.post("/v2/rerank", response_model=CohereResponse, responses=COHERE_ERRORS, openapi_extra=REQUEST_HEADERS)
async def rerank_v2(body: CohereRequest, request: Request, engine: ThisEngine) -> Response:
    """Score documents for a query, as Cohere does."""
    return await serve_ranking(request, engine, body.as_native(), partial(cohere_response, body))


def jina_response(body: JinaRequest, session: Session, compressed: Compressed) -> JinaResponse:
    """The whole response of `/v1/rerank`."""
    results = [
        JinaRank(
            index=each.index,
            relevance_score=each.score,
            document=JinaDocument(text=body.text_of(each.index)) if body.return_documents else None,
        )
        for each in ranked(compressed, body.limit, raw=body.raw)
    ]
    tokens = tokens_read(compressed.passages)
    return JinaResponse(
        id=f"rerank-{secrets.token_hex(12)}",
        model=session.version.model.name,
        results=results,
        usage=JinaUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


def cohere_response(body: CohereRequest, session: Session, compressed: Compressed) -> CohereResponse:
    """The whole response of `/v2/rerank`."""
    ignored = {name for name in ("max_tokens_per_doc", "relevant_spans") if getattr(body, name) is not None}
    return CohereResponse(
        id=secrets.token_hex(16),
        results=[CohereRank(index=each.index, relevance_score=each.score) for each in ranked(compressed, body.top_n)],
        meta=CohereMeta(
            api_version=ApiVersion(version="2"),
            billed_units=BilledUnits(search_units=1),
            tokens=CohereTokens(input_tokens=tokens_read(compressed.passages), output_tokens=0),
            warnings=[f"{name} has no effect here" for name in sorted(ignored)] or None,
        ),
    )
