"""The rerank dialects: Cohere's as its real client sees it, Jina's, vLLM's and TEI's by their JSON."""

import asyncio
from typing import Any

import cohere
import httpx
import pytest

from tests.service.calls import QUERY, error
from tests.service.conftest import Serve

KEY = "alpha-0123456789abcdef"
TEXTS = ["The moon moves around the earth.", "Marie Curie discovered polonium.", "Bread is made of flour."]


def native(client: httpx.Client) -> list[tuple[int, float]]:
    response = client.post("/rerank", json={"query": QUERY, "passages": TEXTS})
    return [(each["index"], each["relevance"]) for each in response.json()["results"]]


def sdk(client: httpx.Client, key: str = KEY) -> cohere.ClientV2:
    """The real client, pointed at the test's server, over a connection that the fixture closes."""
    return cohere.ClientV2(api_key=key, base_url=address(client), httpx_client=client)


def address(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


def test_cohere(client: httpx.Client) -> None:
    got = sdk(client).rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS)
    assert [(each.index, each.relevance_score) for each in got.results] == native(client)
    assert all(0 <= each.relevance_score <= 1 for each in got.results)
    assert got.id
    assert got.meta is not None
    assert got.meta.api_version is not None
    assert got.meta.api_version.version == "2"
    assert got.meta.tokens is not None
    assert (got.meta.tokens.input_tokens or 0) > len(TEXTS)
    assert got.meta.warnings is None
    best = sdk(client).rerank(model="any", query=QUERY, documents=TEXTS, top_n=1, max_tokens_per_doc=100)
    assert [each.index for each in best.results] == [got.results[0].index]
    assert best.meta is not None
    assert best.meta.warnings == ["max_tokens_per_doc has no effect here"]


def test_cohere_never_repeats_documents(client: httpx.Client) -> None:
    body = {"model": "any", "query": QUERY, "documents": TEXTS}
    assert all(
        set(each) == {"index", "relevance_score"} for each in client.post("/v2/rerank", json=body).json()["results"]
    )
    refused = client.post("/v2/rerank", json={**body, "documents": [{"text": "an object"}]})
    assert refused.status_code == 400
    assert set(refused.json()) == {"message"}


def test_cohere_async(client: httpx.Client) -> None:
    async def ask() -> list[tuple[int, float]]:
        async with httpx.AsyncClient(trust_env=False) as http:
            co = cohere.AsyncClientV2(api_key=KEY, base_url=address(client), httpx_client=http)
            got = await co.rerank(model="any", query=QUERY, documents=TEXTS)
            return [(each.index, each.relevance_score) for each in got.results]

    assert asyncio.run(ask()) == native(client)


def test_coheres_first_version_reads_jinas_dialect(client: httpx.Client) -> None:
    co = cohere.Client(KEY, base_url=address(client), httpx_client=client)
    got = co.rerank(model="any", query=QUERY, documents=[{"text": text} for text in TEXTS], return_documents=True)
    assert [(each.index, each.relevance_score) for each in got.results] == native(client)
    assert [each.document and each.document.text for each in got.results] == [TEXTS[i] for i, _ in native(client)]


def test_cohere_error_classes(serve: Serve) -> None:
    with serve(api_keys=KEY, max_passages=2, max_buffered_bytes=400) as client:
        ask: Any = {"model": "any", "query": QUERY, "documents": TEXTS[:2]}
        assert sdk(client).rerank(**ask).results
        with pytest.raises(cohere.UnauthorizedError) as refused:
            sdk(client, "wrong-0123456789abcdef").rerank(**ask)
        assert refused.value.body == {"message": "this key is not valid here"}
        with pytest.raises(cohere.BadRequestError) as many:
            sdk(client).rerank(**{**ask, "documents": TEXTS})
        assert many.value.body == {"message": "documents: 3 is over the limit of 2 passages"}
        with pytest.raises(cohere.BadRequestError) as empty:
            sdk(client).rerank(**{**ask, "query": " "})
        assert empty.value.body == {"message": "query: is empty"}
        with pytest.raises(cohere.TooManyRequestsError) as full:
            sdk(client).rerank(**{**ask, "documents": ["x" * 500]}, request_options={"max_retries": 0})
        assert (full.value.headers or {})["retry-after"] == "1"


def test_jina_and_vllm(client: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "any", "query": QUERY, "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]}
    got = client.post("/v1/rerank", json=body).json()
    assert set(got) == {"id", "object", "model", "results", "usage"}
    assert (got["object"], got["model"]) == ("list", "untrained")
    assert got["usage"]["prompt_tokens"] == got["usage"]["total_tokens"] > len(TEXTS)
    assert got["results"] == [
        {"index": index, "relevance_score": score, "document": {"text": TEXTS[index]}}
        for index, score in native(client)
    ]
    short = client.post("/v1/rerank", json={**body, "top_n": 2, "return_documents": False}).json()["results"]
    assert [set(each) for each in short] == [{"index", "relevance_score"}] * 2
    assert len(client.post("/v1/rerank", json={**body, "top_n": 0}).json()["results"]) == 3
    raw = client.post("/v1/rerank", json={**body, "use_activation": False}).json()["results"]
    assert [each["index"] for each in raw] == [index for index, _ in native(client)]
    assert [each["relevance_score"] for each in raw] != [score for _, score in native(client)]


def test_jina_and_vllm_errors_are_in_one_body(client: httpx.Client) -> None:
    refused = client.post("/v1/rerank", json={"model": "any", "query": QUERY, "documents": ["a", ""]})
    assert refused.status_code == 400
    assert refused.json() == {
        "detail": "documents.1: is empty",
        "error": {
            "message": "documents.1: is empty",
            "type": "invalid_request_error",
            "param": "documents.1",
            "code": "invalid_input",
        },
    }
    assert refused.headers["x-request-id"]


def test_jinas_body_is_also_read_where_infinity_and_vllm_take_it(serve: Serve) -> None:
    with serve(max_passages=3) as client:
        body = {"model": "any", "query": QUERY, "documents": TEXTS, "top_n": 2}
        bare, versioned = (client.post(path, json=body).json() for path in ("/rerank", "/v1/rerank"))
        assert {**bare, "id": None} == {**versioned, "id": None}
        raw, same = (
            client.post("/rerank", json={**body, **asked}).json()["results"]
            for asked in ({"raw_scores": True}, {"use_activation": False})
        )
        assert raw == same != bare["results"]
        for wrong in ({"documents": ["a", ""]}, {"documents": ["a"] * 4}, {"top_n": "many"}, {"texts": TEXTS}):
            refused = client.post("/rerank", json={**body, **wrong})
            assert set(refused.json()) == ({"error", "error_type"} if "texts" in wrong else {"detail", "error"})
            assert refused.status_code == (422 if "texts" in wrong else 400)
        assert (
            error(client.post("/rerank", json={"query": QUERY, "passages": TEXTS, "documents": TEXTS}))["field"]
            == "documents"
        )


def test_tei(client: httpx.Client) -> None:
    body = {"query": QUERY, "texts": TEXTS}
    got = client.post("/rerank", json=body).json()
    assert got == [{"index": index, "score": score} for index, score in native(client)]
    full = {**body, "return_text": True, "raw_scores": True, "truncate": True, "truncation_direction": "Left"}
    raw = client.post("/rerank", json=full).json()
    assert [(each["index"], each["text"]) for each in raw] == [(i, TEXTS[i]) for i, _ in native(client)]
    assert sorted((each["score"] for each in raw), reverse=True) == [each["score"] for each in raw]
    assert [each["score"] for each in raw] != [each["score"] for each in got]


def test_tei_errors_only_for_those_who_send_texts(serve: Serve) -> None:
    with serve(max_passages=2) as client:
        invalid = client.post("/rerank", json={"query": QUERY, "texts": ["a", ""]})
        assert (invalid.status_code, invalid.json()) == (
            422,
            {"error": "texts.1: is empty", "error_type": "Validation"},
        )
        many = client.post("/rerank", json={"query": QUERY, "texts": TEXTS})
        assert (many.status_code, many.json()["error"]) == (422, "texts: 3 is over the limit of 2 passages")
        assert error(client.post("/rerank", json={"query": QUERY, "passages": TEXTS}))["field"] == "passages"
        assert error(client.post("/rerank", json={"query": QUERY}))["field"] == "passages"
        assert error(client.post("/rerank", content="", headers={"Content-Type": "application/json"}))
        assert error(client.post("/rerank", content="{", headers={"Content-Type": "application/json"}))
