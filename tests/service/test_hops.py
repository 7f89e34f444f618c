"""Two hops over HTTP: the service says what the pipeline says, in every call that takes them."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from core.answer import answer as pipeline_answer
from core.compressed import CompressedPassage
from core.model import Model
from core.pipeline import compress, prepare, rerank
from core.policy import Policy, RequestMode
from core.sampling import GenerationOptions
from tests.service.calls import PASSAGES, QUERY, answer, error
from tests.service.conftest import Serve
from tests.service.test_answer import CORE_PASSAGES


def relevances(got: dict[str, Any]) -> list[float]:
    return [passage["relevance"] for passage in got["passages"]]


def expected(model: Model, hops: int = 2, query: str = QUERY) -> list[CompressedPassage]:
    return compress(model, [prepare(model, query, CORE_PASSAGES)], hops=hops)[0]


@pytest.mark.parametrize("mode", ["text", "hybrid", "compressed", "auto"])
def test_an_answer_is_the_pipelines(client: httpx.Client, model: Model, mode: RequestMode) -> None:
    least = 1e-9  # so that `auto` has to know the relevance
    got = answer(client, mode=mode, hops=2, min_relevance=least)
    policy = Policy(mode, min_relevance=least, hops=2)
    ours = pipeline_answer(model, QUERY, CORE_PASSAGES, policy, None, GenerationOptions(max_new_tokens=8))
    assert got["answer"] == ours.text
    assert relevances(got) == pytest.approx([passage.relevance for passage in ours.passages], abs=1e-5)
    once = relevances(answer(client, mode=mode, min_relevance=least))
    assert max(abs(one - two) for one, two in zip(once, relevances(got), strict=True)) > 1e-3


def test_compress_and_rerank_take_two_hops(client: httpx.Client, model: Model) -> None:
    passages = expected(model)
    body = {"query": QUERY, "passages": PASSAGES, "hops": 2}
    made = client.post("/compress", json=body).json()
    assert relevances(made) == pytest.approx([passage.relevance for passage in passages], abs=1e-5)
    ranked = client.post("/rerank", json=body).json()
    assert [result["index"] for result in ranked["results"]] == rerank(passages)


def test_chat_takes_two_hops(client: httpx.Client) -> None:
    body = {"model": "scaledown", "messages": [{"role": "user", "content": QUERY}], "documents": PASSAGES}
    got = client.post("/v1/chat/completions", json={**body, "max_tokens": 8, "hops": 2})
    assert got.json()["choices"][0]["message"]["content"] == answer(client, hops=2)["answer"]


@pytest.mark.parametrize("hops", [0, 3, "2", 2.5])
def test_other_hops_are_refused(client: httpx.Client, hops: object) -> None:
    response = client.post("/answer", json={"query": QUERY, "passages": PASSAGES, "hops": hops})
    assert response.status_code == 422
    assert error(response)["field"] == "hops"


def test_passages_that_came_compressed_stay_as_they_are(client: httpx.Client) -> None:
    made = client.post("/compress", json={"query": QUERY, "passages": PASSAGES[:1], "store": True}).json()["passages"][
        0
    ]
    passages = [{"embedding_id": made["embedding_id"]}, *PASSAGES[1:]]
    got = relevances(answer(client, passages=passages, hops=2))
    assert got[0] == pytest.approx(made["relevance"], abs=1e-6)
    assert got[1:] == pytest.approx(relevances(answer(client, passages=PASSAGES[1:], hops=2)), abs=1e-5)


def test_what_was_read_twice_is_known_the_next_time(serve: Serve, model: Model) -> None:
    with serve(embedding_cache_bytes=2**20) as client:
        first, second = answer(client, hops=2), answer(client, hops=2)
        assert relevances(second) == relevances(first)
        assert second["answer"] == first["answer"]
        chunks = sum(len(passage.chunks) for passage in expected(model))
        assert second["usage"]["cached_chunks"] == chunks
        assert relevances(answer(client)) != relevances(first)


def test_many_at_once_get_what_each_gets_alone(client: httpx.Client, model: Model) -> None:
    cases = [(query, hops) for query in (QUERY, "What is bread made of?", "Moon?", "Who?") for hops in (1, 2)] * 3

    def ask(case: tuple[str, int]) -> list[float]:
        return relevances(answer(client, query=case[0], hops=case[1]))

    with ThreadPoolExecutor(len(cases)) as pool:
        for (query, hops), got in zip(cases, pool.map(ask, cases), strict=True):
            alone = [passage.relevance for passage in expected(model, hops, query)]
            assert got == pytest.approx(alone, abs=1e-5)
