"""POST /answer: the contract, and that the service says what the pipeline says."""

from typing import Any

import httpx
import pytest

from core.answer import answer as pipeline_answer
from core.config import Mode
from core.model import Model
from core.passages import Passage
from core.sampling import GenerationOptions
from tests.service.calls import PASSAGES, QUERY, answer, error, events
from tests.service.conftest import Serve

CORE_PASSAGES = [
    Passage(PASSAGES[0]),
    Passage(PASSAGES[1]["text"], PASSAGES[1]["title"], PASSAGES[1]["id"]),
    Passage(PASSAGES[2]["text"]),
]

TEXTS = {
    "japanese": "日本語の文章です。東京は首都です。",
    "arabic": "مرحبا بالعالم",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 20,
    "controls": "a\tb\r\nc\u2028d",
    "100kB": "x" * 100_000,
    "ligatures": "naïve ﬁ ǆ",
}


@pytest.mark.parametrize("mode", ["text", "hybrid", "compressed"])
@pytest.mark.parametrize("rate", [None, 8])
def test_answer_is_the_pipelines(client: httpx.Client, model: Model, mode: Mode, rate: int | None) -> None:
    got = answer(client, mode=mode, rate=rate)
    expected = pipeline_answer(model, QUERY, CORE_PASSAGES, mode, rate, GenerationOptions(max_new_tokens=8))
    assert got["answer"] == expected.text
    assert got["finish_reason"] == expected.finish_reason
    assert [passage["mode"] for passage in got["passages"]] == expected.modes
    assert [passage["relevance"] for passage in got["passages"]] == pytest.approx(
        [passage.relevance for passage in expected.passages], abs=1e-5
    )
    assert got["usage"] == {
        "text_tokens": expected.text_tokens,
        "prompt_tokens": expected.prompt_tokens,
        "tokens_saved": expected.text_tokens - expected.prompt_tokens,
        "completion_tokens": expected.completion_tokens,
        "cached_chunks": 0,
        "cached_documents": 0,
    }


def test_response_has_the_contracts_fields(client: httpx.Client) -> None:
    got = answer(client)
    assert [(p["index"], p["id"]) for p in got["passages"]] == [(0, None), (1, "bread"), (2, None)]
    assert all(0 <= p["relevance"] <= 1 for p in got["passages"])
    assert got["checkpoint"] == "untrained"
    assert list(got["timings_ms"]) == ["tokenize", "queue", "compress", "first_token", "decode", "total"]
    assert all(value >= 0 for value in got["timings_ms"].values())
    stages = sum(value for stage, value in got["timings_ms"].items() if stage != "total")
    assert stages <= got["timings_ms"]["total"] + 1
    best = max(p["relevance"] for p in got["passages"])
    assert got["answerable"] == {"probability": best, "answerable": best >= 0.5}


def test_text_mode_saves_nothing(client: httpx.Client) -> None:
    usage = answer(client, mode="text")["usage"]
    assert usage["prompt_tokens"] == usage["text_tokens"]
    assert usage["tokens_saved"] == 0


def test_hybrid_top_shows_so_many_as_text(client: httpx.Client) -> None:
    modes = [p["mode"] for p in answer(client, mode="hybrid", hybrid_top=2)["passages"]]
    assert sorted(modes) == ["compressed", "hybrid", "hybrid"]


@pytest.mark.parametrize("values", [{}, {"mode": "compressed"}, {"mode": "text"}, {"mode": "auto"}])
def test_hybrid_top_is_refused_where_it_has_no_effect(client: httpx.Client, values: dict[str, Any]) -> None:
    native = {"query": QUERY, "passages": PASSAGES, "hybrid_top": 2, **values}
    chat = {"model": "scaledown", "messages": [{"role": "user", "content": QUERY}], "documents": ["a"], "hybrid_top": 2}
    refused = client.post("/answer", json=native)
    assert refused.status_code == 422
    assert refused.json()["error"]["field"] == "hybrid_top"
    assert "only for mode hybrid" in refused.json()["error"]["message"]
    dialect = client.post("/v1/chat/completions", json={**chat, **values})
    assert (dialect.status_code, dialect.json()["error"]["param"]) == (400, "hybrid_top")


def test_a_seed_repeats_and_options_count(client: httpx.Client) -> None:
    options = {"temperature": 5.0, "seed": 3, "max_new_tokens": 16}
    first = answer(client, **options)["answer"]
    assert answer(client, **options)["answer"] == first
    assert answer(client, **{**options, "seed": 4})["answer"] != first
    assert answer(client, **options, top_k=1)["answer"] == answer(client, max_new_tokens=16)["answer"]


def test_stop_string_ends_the_answer_before_it(client: httpx.Client) -> None:
    whole = answer(client, max_new_tokens=12)["answer"]
    stop = whole[3:5]
    got = answer(client, max_new_tokens=12, stop=[stop])
    assert got["answer"] == whole[: whole.index(stop)]
    assert got["finish_reason"] == "stop"


def test_stream_is_the_whole_answer_in_pieces(client: httpx.Client) -> None:
    whole = answer(client)
    body = {"query": QUERY, "passages": PASSAGES, "max_new_tokens": 8, "stream": True}
    response = client.post("/answer", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    got = events(response.text)
    assert [name for name, _ in got] == ["passages", *["token"] * (len(got) - 2), "done"]
    assert got[0][1] == {"passages": whole["passages"], "checkpoint": "untrained"}
    assert "".join(data["text"] for name, data in got if name == "token") == whole["answer"]
    assert {**got[-1][1], "timings_ms": None} == {**whole, "timings_ms": None}


def test_every_event_of_a_stream_is_two_lines_whatever_a_client_takes_for_the_end_of_one(client: httpx.Client) -> None:
    name = "a\u2028b\u2029c\x85d"
    passages = [{"id": name, "text": "Marie Curie discovered polonium."}]
    body = {"query": QUERY, "passages": passages, "max_new_tokens": 8, "stream": True}
    found = events(client.post("/answer", json=body).text)  # lines as Python has them, httpx's `iter_lines` too
    assert [each["id"] for _, data in found for each in data.get("passages", [])] == [name, name]


def test_stream_refuses_with_a_status_before_it_begins(client: httpx.Client) -> None:
    response = client.post("/answer", json={"query": QUERY, "passages": ["x"], "rate": 5, "stream": True})
    assert response.status_code == 422
    assert error(response)["field"] == "rate"


def test_silence_on_a_stream_is_filled_with_comments(serve: Serve) -> None:
    with serve(keepalive_seconds=0.001) as client:
        body = {"query": QUERY, "passages": PASSAGES, "max_new_tokens": 64, "stream": True}
        text = client.post("/answer", json=body).text
    assert ": keep-alive\n\n" in text
    assert events(text)[-1][0] == "done"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("mode", ["compressed", "text"])
def test_any_text_works(client: httpx.Client, text: str, mode: str) -> None:
    if mode == "text" and len(text) > 10_000:
        text = text[:5000]  # as text it has to fit the generator
    got = answer(client, passages=[text], mode=mode, max_new_tokens=2)
    assert len(got["passages"]) == 1


def test_control_tokens_in_a_passage_stay_text(client: httpx.Client) -> None:
    plain = answer(client, passages=["end of turn"], mode="text")["usage"]["prompt_tokens"]
    spelled = answer(client, passages=["<|im_end|>"], mode="text")["usage"]["prompt_tokens"]
    assert spelled > plain - 3  # several pieces, not one control token


@pytest.mark.parametrize("mode", ["text", "hybrid"])
def test_a_prompt_that_cannot_fit_is_refused_with_the_ways_out(client: httpx.Client, mode: Mode) -> None:
    response = client.post("/answer", json={"query": QUERY, "passages": ["word " * 9000], "mode": mode})
    assert response.status_code == 413
    assert (error(response)["field"], error(response)["limit"]) == ("passages", 8192)
    ways = "the generator's 8192 positions: send less, use mode compressed or auto, or set max_prompt_tokens"
    assert error(response)["message"].endswith(ways)


@pytest.mark.parametrize("mode", ["text", "compressed"])
def test_a_query_over_the_compressors_budget_is_refused_by_its_name(client: httpx.Client, mode: Mode) -> None:
    response = client.post("/answer", json={"query": "日" * 86, "passages": ["Bread."], "mode": mode})  # 3 tokens each
    assert (response.status_code, error(response)["field"], error(response)["limit"]) == (413, "query", 256)
    assert client.post("/rerank", json={"query": "日" * 86, "passages": ["Bread."]}).status_code == 413
    assert client.post("/rerank", json={"query": "日" * 85, "passages": ["Bread."]}).status_code == 200


def test_a_passage_may_be_one_token(client: httpx.Client) -> None:
    response = client.post("/rerank", json={"query": "What is the capital of France?", "passages": ["Paris"]})
    assert response.status_code == 200, response.text
    assert [result["index"] for result in response.json()["results"]] == [0]


def test_rerank_is_sorted_and_cut(client: httpx.Client) -> None:
    body = {"query": QUERY, "passages": PASSAGES}
    results = client.post("/rerank", json=body).json()["results"]
    relevance = [result["relevance"] for result in results]
    assert relevance == sorted(relevance, reverse=True)
    assert sorted(result["index"] for result in results) == [0, 1, 2]
    assert client.post("/rerank", json={**body, "top_n": 2}).json()["results"] == results[:2]
    by_index = {p["index"]: p["relevance"] for p in answer(client)["passages"]}
    assert {r["index"]: r["relevance"] for r in results} == pytest.approx(by_index, abs=1e-5)
