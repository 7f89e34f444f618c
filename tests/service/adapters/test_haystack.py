"""Haystack's interfaces over a live service: components alone and in a pipeline."""

import asyncio
from typing import Any, Literal

import httpx
import pytest
from haystack import Document, Pipeline
from haystack.components.builders import AnswerBuilder
from haystack.dataclasses import StreamingChunk
from haystack.utils import Secret

from service.adapters.haystack import Replied, ScaleDownGenerator, ScaleDownRanker
from service.client import AuthenticationError
from tests.service.calls import QUERY, answer
from tests.service.conftest import Serve

KEY = "alpha-0123456789abcdef"
DOCUMENTS = [
    Document(id="curie", content="Marie Curie was born in Warsaw. She discovered polonium and radium. " * 6),
    Document(id="bread", content="It is made of flour, water, salt and yeast.", meta={"title": "Bread"}),
    Document(id="moon", content="The moon moves around the earth in about 27 days."),
]
PASSAGES = [{"id": doc.id, "text": doc.content, "title": doc.meta.get("title", "")} for doc in DOCUMENTS]


def ranking(client: httpx.Client, hops: int = 1) -> list[tuple[str, float]]:
    response = client.post("/rerank", json={"query": QUERY, "passages": PASSAGES, "hops": hops})
    return [(each["id"], each["relevance"]) for each in response.json()["results"]]


def pairs(documents: list[Document]) -> list[tuple[str, float | None]]:
    return [(document.id, document.score) for document in documents]


def generator(client: httpx.Client, **values: Any) -> ScaleDownGenerator:
    return ScaleDownGenerator(**{"url": str(client.base_url), "options": {"max_new_tokens": 8}, **values})


@pytest.mark.parametrize("hops", [1, 2])
def test_documents_come_back_in_order_of_relevance(client: httpx.Client, hops: Literal[1, 2]) -> None:
    expected = ranking(client, hops)
    ranker = ScaleDownRanker(url=str(client.base_url), hops=hops)
    assert pairs(ranker.run(QUERY, DOCUMENTS)["documents"]) == expected
    assert pairs(asyncio.run(ranker.run_async(QUERY, DOCUMENTS))["documents"]) == expected
    assert pairs(ranker.run(QUERY, DOCUMENTS, top_k=2)["documents"]) == expected[:2]
    assert ranker.run(QUERY, [])["documents"] == []
    picture = Document(id="picture", content=None)
    assert pairs(ranker.run(QUERY, [picture, *DOCUMENTS])["documents"]) == expected
    assert ranker.run(QUERY, [picture])["documents"] == []
    between = (expected[0][1] + expected[1][1]) / 2
    choosy = ScaleDownRanker(url=str(client.base_url), min_relevance=between, hops=hops)
    assert pairs(choosy.run(QUERY, DOCUMENTS)["documents"]) == expected[:1]


@pytest.mark.parametrize("top_k", [0, -1])
def test_a_limit_that_is_none_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match="top_k: must be 1 or more"):
        ScaleDownRanker(top_k=top_k)
    with pytest.raises(ValueError, match="top_k: must be 1 or more"):
        ScaleDownRanker().run(QUERY, DOCUMENTS, top_k=top_k)
    with pytest.raises(ValueError, match="min_relevance: must be 0 to 1"):
        ScaleDownRanker(min_relevance=-0.5)


def test_a_reply_has_the_answer_and_what_it_cost(client: httpx.Client) -> None:
    expected = answer(client, passages=PASSAGES)
    ours = generator(client)
    for result in (ours.run(QUERY, DOCUMENTS), asyncio.run(ours.run_async(QUERY, DOCUMENTS))):
        (reply,) = result["replies"]
        assert reply.text == expected["answer"]
        assert reply.meta["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
        assert reply.meta["usage"]["tokens_saved"] == expected["usage"]["tokens_saved"]
        assert reply.meta["answerable"] == expected["answerable"]
        assert reply.meta["model"] == expected["checkpoint"]
        assert [each["id"] for each in reply.meta["passages"]] == ["curie", "bread", "moon"]
    assert ours.run(QUERY, [])["replies"] == []
    beside = ours.run(QUERY, [Document(id="picture", content=" "), *DOCUMENTS])["replies"][0]
    assert [each["id"] for each in beside.meta["passages"]] == ["curie", "bread", "moon"]
    short = ours.run(QUERY, DOCUMENTS, options={"max_new_tokens": 1})["replies"][0]
    assert short.meta["usage"]["completion_tokens"] == 1


def test_a_stream_adds_up_to_the_reply(client: httpx.Client) -> None:
    ours = generator(client)
    whole = ours.run(QUERY, DOCUMENTS)["replies"][0]
    chunks: list[StreamingChunk] = []

    async def collect(chunk: StreamingChunk) -> None:
        chunks.append(chunk)

    def run(awaited: bool) -> Replied:
        if awaited:
            return asyncio.run(ours.run_async(QUERY, DOCUMENTS, streaming_callback=collect))
        return ours.run(QUERY, DOCUMENTS, streaming_callback=chunks.append)

    for awaited in (False, True):
        chunks.clear()
        (reply,) = run(awaited)["replies"]
        assert len(chunks) > 2
        assert "".join(chunk.content for chunk in chunks) == reply.text == whole.text
        assert chunks[-1].finish_reason == whole.meta["finish_reason"]
        assert chunks[-1].meta["usage"] == reply.meta["usage"] == whole.meta["usage"]


def pipeline(client: httpx.Client) -> Pipeline:
    made = Pipeline()
    made.add_component("ranker", ScaleDownRanker(url=str(client.base_url), top_k=2))
    made.add_component("generator", generator(client))
    made.add_component("builder", AnswerBuilder())
    made.connect("ranker.documents", "generator.documents")
    made.connect("ranker.documents", "builder.documents")
    made.connect("generator.replies", "builder.replies")
    return made


def test_a_pipeline_can_be_run_and_saved(client: httpx.Client) -> None:
    inputs: dict[str, Any] = {name: {"query": QUERY} for name in ("ranker", "generator", "builder")}
    made = pipeline(client)
    inputs["ranker"]["documents"] = DOCUMENTS
    result = made.run(inputs)["builder"]["answers"][0]
    assert pairs(result.documents) == ranking(client)[:2]
    assert result.data
    saved = made.dumps()
    assert "SCALEDOWN_API_KEY" in saved
    loaded = Pipeline.loads(saved, allowed_modules=["service.adapters.haystack"])
    assert loaded.run(inputs)["builder"]["answers"][0].data == result.data


def test_the_key_is_sent_and_not_saved(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(api_keys=KEY) as client:
        with pytest.raises(AuthenticationError):
            generator(client).run(QUERY, DOCUMENTS)
        assert generator(client, api_key=Secret.from_token(KEY)).run(QUERY, DOCUMENTS)["replies"]
        monkeypatch.setenv("SCALEDOWN_API_KEY", KEY)
        assert generator(client).run(QUERY, DOCUMENTS)["replies"]
