"""Budgets and `auto` mode over HTTP: the bound holds, the choices are explained, and what tokens cost decides."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from core.answer import answer as answer_in_process
from core.config import RelevanceConfig
from core.model import Model
from core.policy import Policy, TokenCosts
from core.sampling import GenerationOptions
from service.loading import load_model
from tests.service.calls import PASSAGES, QUERY, answer, error, events
from tests.service.conftest import Serve, make_settings
from tests.service.test_answer import CORE_PASSAGES

SHORT = "Tin melts."
CHEAP_COMPRESSOR = TokenCosts(compressor_s=1e-6, prefill_s=1e-3)
DEAR_COMPRESSOR = TokenCosts(compressor_s=1e-2, prefill_s=1e-3)


def with_costs(model: Model, costs: TokenCosts) -> Model:
    """The same model on a machine where tokens cost so much, and every passage counts as holding an answer."""
    relevance = RelevanceConfig(threshold=0.0)
    return replace(model, costs=costs, config=replace(model.config, relevance=relevance))


@pytest.fixture(scope="module")
def client(serve: Serve, model: Model) -> Iterator[httpx.Client]:
    with serve(with_costs(model, CHEAP_COMPRESSOR)) as client:
        yield client


@pytest.fixture(scope="module")
def dear(serve: Serve, model: Model) -> Iterator[httpx.Client]:
    with serve(with_costs(model, DEAR_COMPRESSOR)) as client:
        yield client


def shown(got: dict[str, Any]) -> list[tuple[str, str]]:
    return [(passage["mode"], passage["reason"]) for passage in got["passages"]]


@pytest.mark.parametrize("mode", ["text", "compressed", "hybrid", "auto"])
def test_the_prompt_stays_within_its_bound(client: httpx.Client, model: Model, mode: Any) -> None:
    free = answer(client, mode=mode)["usage"]["prompt_tokens"]
    around = answer(client, mode="compressed")
    empty = around["usage"]["prompt_tokens"] - sum(passage["tokens"] for passage in around["passages"])
    for bound in range(empty, free + 20, max(1, (free + 20 - empty) // 6)):
        got = answer(client, mode=mode, max_prompt_tokens=bound, max_new_tokens=2)
        assert got["usage"]["prompt_tokens"] <= bound
        assert got["plan"]["max_prompt_tokens"] == bound
        assert all((p["tokens"] == 0) == (p["mode"] == "dropped") for p in got["passages"])
    options = GenerationOptions(max_new_tokens=8)
    served = with_costs(model, CHEAP_COMPRESSOR)
    expected = answer_in_process(served, QUERY, CORE_PASSAGES, Policy(mode, None, empty + 30), options=options)
    got = answer(client, mode=mode, max_prompt_tokens=empty + 30)
    assert (got["answer"], shown(got)) == (expected.text, [(c.mode, c.reason) for c in expected.choices])


def test_the_least_relevant_are_dropped_first(client: httpx.Client) -> None:
    whole = answer(client)
    ranks = sorted(whole["passages"], key=lambda passage: -passage["relevance"])
    bound = whole["usage"]["prompt_tokens"] - 1
    got = answer(client, mode="compressed", max_prompt_tokens=bound)
    assert [p["index"] for p in got["passages"] if p["mode"] == "dropped"] == [ranks[-1]["index"]]
    assert [p["relevance"] for p in got["passages"]] == [p["relevance"] for p in whole["passages"]]
    assert got["usage"]["text_tokens"] == whole["usage"]["text_tokens"]


def test_a_bound_without_a_mode_is_auto(client: httpx.Client) -> None:
    got = answer(client, max_prompt_tokens=2000)
    assert shown(got) == shown(answer(client, mode="auto", max_prompt_tokens=2000))
    assert ("hybrid", "relevant") in shown(got)
    assert got["plan"]["mode"] == "hybrid"  # there is room for all, and all are relevant enough
    assert shown(answer(client)) == [("compressed", "asked")] * 3


def test_a_bound_below_the_empty_prompt_is_refused(client: httpx.Client) -> None:
    for stream in (False, True):
        body = {"query": QUERY, "passages": PASSAGES, "max_prompt_tokens": 5, "stream": stream}
        response = client.post("/answer", json=body)
        assert response.status_code == 422
        assert error(response)["field"] == "max_prompt_tokens"
        assert "without any passage" in error(response)["message"]
    for wrong in (0, "many", 1.5):
        response = client.post("/answer", json={"query": QUERY, "passages": PASSAGES, "max_prompt_tokens": wrong})
        assert (response.status_code, error(response)["field"]) == (422, "max_prompt_tokens")


def test_passages_below_the_wanted_relevance_are_dropped(client: httpx.Client) -> None:
    relevance = [passage["relevance"] for passage in answer(client)["passages"]]
    limit = sorted(relevance)[1]
    got = answer(client, min_relevance=limit)
    reasons = [reason for _, reason in shown(got)]
    assert reasons == ["below_min_relevance" if each < limit else "asked" for each in relevance]
    nothing = answer(client, min_relevance=1.0)
    assert {mode for mode, _ in shown(nothing)} == {"dropped"}
    assert nothing["plan"]["mode"] is None


def test_auto_compresses_where_that_costs_less(client: httpx.Client, dear: httpx.Client) -> None:
    passages = [PASSAGES[0], SHORT]
    cheap = answer(client, mode="auto", passages=passages)
    assert shown(cheap)[0] == ("compressed", "pays")
    assert cheap["plan"]["reason"] == "costs"
    costly = answer(dear, mode="auto", passages=passages)
    assert shown(costly) == [("text", "no_gain")] * 2
    assert [p["relevance"] for p in costly["passages"]] == [None, None]
    assert costly["answerable"] is None
    assert costly["usage"]["tokens_saved"] == 0
    assert (costly["plan"]["mode"], costly["plan"]["rate"]) == ("text", None)  # the compressor read nothing
    assert costly["answer"] == answer(dear, mode="text", passages=passages)["answer"]


def test_estimates_say_what_each_way_would_take(client: httpx.Client, dear: httpx.Client) -> None:
    for served, best in ((client, "compressed"), (dear, "text")):
        estimates = answer(served, mode="auto", explain=True)["plan"]["estimates_ms"]
        assert set(estimates) == {"text", "compressed", "hybrid"}
        assert estimates[best] == min(estimates["text"], estimates["compressed"])
        assert estimates["hybrid"] <= estimates[best]
    whole = answer(client, mode="text", explain=True)
    assert whole["plan"]["estimates_ms"]["text"] == pytest.approx(whole["usage"]["prompt_tokens"])  # 1 ms a token
    assert answer(client, mode="auto")["plan"]["estimates_ms"] is None


def test_auto_scores_all_passages_where_some_have_to_go(dear: httpx.Client) -> None:
    text = answer(dear, mode="text")["usage"]["prompt_tokens"]
    fits = answer(dear, mode="auto", max_prompt_tokens=text)
    assert (fits["plan"]["reason"], fits["plan"]["mode"]) == ("costs", "text")
    over = answer(dear, mode="auto", max_prompt_tokens=text - 1)
    assert (over["plan"]["reason"], over["plan"]["mode"]) == ("relevance", "hybrid")
    assert None not in [p["relevance"] for p in over["passages"]]


def test_auto_takes_a_coarser_rate_under_a_tight_bound(client: httpx.Client) -> None:
    fine = answer(client, mode="compressed", rate=8)["usage"]["prompt_tokens"]
    assert answer(client, mode="auto", rate=8)["plan"]["rate"] == 8
    tight = answer(client, mode="auto", rate=8, max_prompt_tokens=fine - 20)
    assert tight["plan"]["rate"] == 16
    assert answer(client, mode="compressed", rate=8, max_prompt_tokens=fine - 20)["plan"]["rate"] == 8


def test_auto_compresses_what_is_too_long_as_text(dear: httpx.Client) -> None:
    got = answer(dear, mode="auto", passages=["word " * 9000], max_new_tokens=2)
    assert shown(got) == [("compressed", "pays")]


def test_embeddings_without_text_are_never_text(client: httpx.Client) -> None:
    made = client.post("/compress", json={"query": QUERY, "passages": PASSAGES[:1]}).json()["passages"][0]
    got = answer(client, mode="auto", passages=[{"embeddings": made["embeddings"]}, SHORT], max_prompt_tokens=500)
    assert shown(got)[0] == ("compressed", "no_text")


def test_a_stream_says_the_same(client: httpx.Client) -> None:
    body = {"query": QUERY, "passages": PASSAGES, "max_new_tokens": 8, "max_prompt_tokens": 200}
    whole = answer(client, max_prompt_tokens=200)
    got = events(client.post("/answer", json={**body, "stream": True}).text)
    assert got[0][1]["passages"] == whole["passages"]
    assert {**got[-1][1], "timings_ms": None} == {**whole, "timings_ms": None}


def test_openai_clients_have_it_too(client: httpx.Client) -> None:
    native = answer(client, max_prompt_tokens=150, min_relevance=0.01)
    body = {
        "model": "scaledown",
        "messages": [{"role": "user", "content": QUERY}],
        "documents": PASSAGES,
        "max_tokens": 8,
        "max_prompt_tokens": 150,
        "min_relevance": 0.01,
    }
    got = client.post("/v1/chat/completions", json=body).json()
    assert got["choices"][0]["message"]["content"] == native["answer"]
    assert got["usage"]["prompt_tokens"] == native["usage"]["prompt_tokens"] <= 150
    assert got["scaledown"] == {name: native[name] for name in ("passages", "answerable", "plan")}
    streamed = client.post("/v1/chat/completions", json={**body, "stream": True}).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in streamed if line.startswith("data: {")]
    assert chunks[-1]["choices"][0]["finish_reason"] is not None
    assert chunks[-1]["scaledown"] == got["scaledown"]
    refused = client.post("/v1/chat/completions", json={**body, "max_prompt_tokens": 3})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_prompt_tokens")


def test_costs_are_measured_at_the_start_or_taken_from_the_settings(serve: Serve, model: Model, root: Any) -> None:
    fresh = replace(model, costs=None)
    with serve(fresh) as client:
        assert answer(client, explain=True)["plan"]["estimates_ms"]["text"] > 0
    assert fresh.costs is not None
    assert min(fresh.costs.compressor_s, fresh.costs.prefill_s) > 0
    settings = make_settings(checkpoint=root / "first", compressor_token_us=20, prefill_token_us=100)
    assert load_model(settings).costs == TokenCosts(20 / 1e6, 100 / 1e6)
