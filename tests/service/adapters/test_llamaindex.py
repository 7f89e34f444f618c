"""LlamaIndex's interfaces over a live service: what its engines would see."""

import asyncio
from typing import Any, Literal

import httpx
import pytest
from llama_index.core import SummaryIndex
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import ValidationError

from service.adapters.llamaindex import ScaleDownQueryEngine, ScaleDownRerank
from tests.service.calls import QUERY, answer

NODES = [
    TextNode(id_="curie", text="Marie Curie was born in Warsaw. She discovered polonium and radium. " * 6),
    TextNode(id_="bread", text="It is made of flour, water, salt and yeast.", metadata={"title": "Bread"}),
    TextNode(id_="moon", text="The moon moves around the earth in about 27 days."),
]
PASSAGES = [{"id": node.node_id, "text": node.text, "title": node.metadata.get("title", "")} for node in NODES]
FOUND = [NodeWithScore(node=node, score=0.1) for node in NODES]


def ranking(client: httpx.Client, hops: int = 1) -> list[tuple[str, float]]:
    response = client.post("/rerank", json={"query": QUERY, "passages": PASSAGES, "hops": hops})
    return [(each["id"], each["relevance"]) for each in response.json()["results"]]


def engine(client: httpx.Client, **values: Any) -> ScaleDownQueryEngine:
    retriever = SummaryIndex(nodes=NODES).as_retriever()
    return ScaleDownQueryEngine(
        **{"url": str(client.base_url), "retriever": retriever, "options": {"max_new_tokens": 8}, **values}
    )


def pairs(nodes: list[NodeWithScore]) -> list[tuple[str, float | None]]:
    return [(found.node.node_id, found.score) for found in nodes]


@pytest.mark.parametrize("hops", [1, 2])
def test_nodes_come_back_in_order_of_relevance(client: httpx.Client, hops: Literal[1, 2]) -> None:
    expected = ranking(client, hops)
    rerank = ScaleDownRerank(url=str(client.base_url), hops=hops)
    assert pairs(rerank.postprocess_nodes(FOUND, query_str=QUERY)) == expected
    assert pairs(asyncio.run(rerank.apostprocess_nodes(FOUND, query_str=QUERY))) == expected
    assert [found.score for found in FOUND] == [0.1] * 3, "the caller's own nodes stay as they are"
    assert rerank.postprocess_nodes([], query_str=QUERY) == []
    with pytest.raises(ValueError, match="query_str"):
        rerank.postprocess_nodes(FOUND)


def test_what_is_not_relevant_is_left_out(client: httpx.Client) -> None:
    (best, most), (_, second), _ = ranking(client)
    url = str(client.base_url)
    for rerank in (ScaleDownRerank(url=url, top_n=1), ScaleDownRerank(url=url, min_relevance=(most + second) / 2)):
        assert pairs(rerank.postprocess_nodes(FOUND, query_str=QUERY)) == [(best, most)]


def test_an_answer_has_its_sources_and_what_it_cost(client: httpx.Client) -> None:
    expected = answer(client, passages=PASSAGES)
    ours = engine(client)
    for response in (ours.query(QUERY), asyncio.run(ours.aquery(QUERY))):
        assert isinstance(response, Response)
        assert response.response == expected["answer"]
        assert pairs(response.source_nodes) == [(each["id"], each["relevance"]) for each in expected["passages"]]
        assert response.metadata is not None
        assert response.metadata["tokens_saved"] == expected["usage"]["tokens_saved"]
        assert response.metadata["answerable"] == expected["answerable"]
        assert response.metadata["checkpoint"] == expected["checkpoint"]


def test_a_stream_adds_up_to_the_answer(client: httpx.Client) -> None:
    whole = engine(client).query(QUERY)
    ours = engine(client, streaming=True)
    stream = ours.query(QUERY)
    assert isinstance(stream, StreamingResponse)
    assert pairs(stream.source_nodes) == pairs(whole.source_nodes)
    pieces = list(stream.response_gen)
    assert len(pieces) > 2

    async def collect() -> tuple[list[str], Any]:
        response = await ours.aquery(QUERY)
        assert isinstance(response, AsyncStreamingResponse)
        return [piece async for piece in response.async_response_gen()], response.metadata

    awaited, metadata = asyncio.run(collect())
    assert "".join(pieces) == "".join(awaited) == str(whole)
    assert stream.metadata == metadata == whole.metadata


def test_what_is_in_the_wrong_place_is_refused(client: httpx.Client) -> None:
    with pytest.raises(ValidationError, match="mode"):
        engine(client, mode="hybrid")
    with pytest.raises(ValidationError, match="top_k"):
        ScaleDownRerank(top_k=3)  # type: ignore[call-arg]
    assert ScaleDownRerank.from_dict(ScaleDownRerank(top_n=2).to_dict()).top_n == 2  # as LlamaIndex saves it


def test_postprocessors_run_before_the_answer(client: httpx.Client) -> None:
    best = ranking(client)[0]
    rerank = ScaleDownRerank(url=str(client.base_url), top_n=1)
    for response in (
        engine(client, node_postprocessors=[rerank]).query(QUERY),
        asyncio.run(engine(client, node_postprocessors=[rerank]).aquery(QUERY)),
    ):
        assert pairs(response.source_nodes) == [best]


def test_nothing_retrieved_is_no_error(client: httpx.Client) -> None:
    nobody = SummaryIndex(nodes=[]).as_retriever()
    assert str(engine(client, retriever=nobody).query(QUERY)) == "Empty Response"
    assert str(asyncio.run(engine(client, retriever=nobody).aquery(QUERY))) == "Empty Response"


def test_a_node_without_text_is_left_out(client: httpx.Client) -> None:
    picture = NodeWithScore(node=TextNode(id_="picture", text=""), score=0.9)
    ours = ScaleDownRerank(url=str(client.base_url))
    assert pairs(ours.postprocess_nodes([picture, *FOUND], query_str=QUERY)) == ranking(client)
    assert ours.postprocess_nodes([picture], query_str=QUERY) == []
