"""The rerank classes that LangChain, LlamaIndex and Haystack have for Cohere and Jina, pointed at this service."""

import gc
from collections.abc import Iterator

import httpx
import pytest
from haystack.dataclasses import Document as HaystackDocument
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from langchain_cohere import CohereRerank as LangChainCohereRerank
from langchain_core.documents import Document as LangChainDocument
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank as LlamaIndexCohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from pydantic import SecretStr

from tests.service.calls import QUERY
from tests.service.conftest import Serve

KEY = "alpha-0123456789abcdef"
TEXTS = ["The moon moves around the earth.", "Marie Curie discovered polonium.", "Bread is made of flour."]

# They leave their connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture(scope="module")
def keyed(serve: Serve) -> Iterator[httpx.Client]:
    """A service that wants a key, as these classes all send one."""
    with serve(api_keys=KEY) as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client
    gc.collect()  # here, where the warnings are expected


def address(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


def expected(client: httpx.Client) -> list[tuple[str, float]]:
    response = client.post("/rerank", json={"query": QUERY, "passages": TEXTS, "top_n": 2})
    return [(TEXTS[each["index"]], each["relevance"]) for each in response.json()["results"]]


def test_langchains_cohere_rerank(keyed: httpx.Client) -> None:
    rerank = LangChainCohereRerank(
        model="any", top_n=2, base_url=address(keyed), cohere_api_key=SecretStr(KEY), client=None
    )
    got = rerank.compress_documents([LangChainDocument(text) for text in TEXTS], QUERY)
    assert [(each.page_content, each.metadata["relevance_score"]) for each in got] == expected(keyed)


def test_llamaindexs_cohere_and_jina_rerank(keyed: httpx.Client) -> None:
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    for rerank in (
        LlamaIndexCohereRerank(top_n=2, model="any", api_key=KEY, base_url=address(keyed)),
        JinaRerank(top_n=2, model="any", api_key=KEY, base_url=f"{address(keyed)}/v1"),
    ):
        got = rerank.postprocess_nodes(nodes, query_str=QUERY)
        assert [(each.text, each.score) for each in got] == expected(keyed)


def test_haystacks_cohere_ranker(keyed: httpx.Client) -> None:
    ranker = CohereRanker(model="any", top_k=2, api_key=Secret.from_token(KEY), api_base_url=address(keyed))
    got = ranker.run(QUERY, [HaystackDocument(content=text) for text in TEXTS])["documents"]
    assert [(each.content, each.score) for each in got] == expected(keyed)
