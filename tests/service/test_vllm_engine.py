"""Answers written by a vLLM server, here an HTTP double of one: the same answers, and what happens when it fails."""

import asyncio
import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError

from core.checkpoint import load_checkpoint, save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig
from core.errors import CheckpointError, EngineError
from core.model import Model, build_model
from service import engine as engine_module
from service.app import create_app
from service.generation import vllm_server
from service.generation.golden_answer import GoldenRequest, golden_request
from service.generation.vllm_wire import parse_models
from service.settings import Settings
from service.versions import version_of
from tests.service.calls import PASSAGES, QUERY, answer, error, events
from tests.service.conftest import Serve, make_settings, serve_app
from tests.service.test_checkpoints import change, serve_checkpoint
from tests.service.test_metrics import value
from tests.service.vllm_double import VllmDouble, prompt_of
from tests.waiting import wait_for

BODY = {"query": QUERY, "passages": PASSAGES, "max_new_tokens": 8}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 11}


def alike(got: dict[str, Any]) -> dict[str, Any]:
    """An answer without its timings."""
    return {name: value for name, value in got.items() if name != "timings_ms"}


@pytest.fixture(scope="module", autouse=True)
def _watched_closely() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "WATCH_SECONDS", 0.1)
        yield


@pytest.fixture(scope="module")
def vllm(model: Model) -> Iterator[VllmDouble]:
    with VllmDouble(model.generator).running() as double:
        yield double


@pytest.fixture(scope="module")
def remote(serve: Serve, vllm: VllmDouble) -> Iterator[httpx.Client]:
    """A service whose answers the double writes."""
    with serve(generator_url=vllm.url) as client:
        assert client.get("/readyz").status_code == 200
        yield client


@pytest.fixture(autouse=True)
def _whole_again(vllm: VllmDouble) -> Iterator[None]:
    yield
    vllm.broken, vllm.refused, vllm.token_s, vllm.health, vllm.health_s = [], [], 0.0, 200, 0.0


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", ["text", "hybrid", "compressed"])
def test_answers_are_the_torch_engines(
    client: httpx.Client, remote: httpx.Client, vllm: VllmDouble, mode: str, options: dict[str, Any]
) -> None:
    got = answer(remote, mode=mode, **options)
    assert alike(got) == alike(answer(client, mode=mode, **options))
    assert list(got["timings_ms"]) == ["tokenize", "queue", "compress", "first_token", "decode", "total"]
    sent = vllm.requests[-1]
    assert ("prompt" in sent, "prompt_embeds" in sent) == (mode == "text", mode != "text")
    assert prompt_of(sent).tokens == got["usage"]["prompt_tokens"]


def test_a_checkpoints_generator_is_let_go_of(root: Path) -> None:
    own = make_settings(checkpoint=root / "first")
    with serve_app(create_app(own)) as client:
        expected, whole = answer(client), value(client, "scaledown_model_bytes")
    with VllmDouble(load_checkpoint(root / "first").generator).running() as double:
        theirs = make_settings(checkpoint=root / "first", generator_url=double.url)
        with serve_app(create_app(theirs)) as client:
            assert alike(answer(client)) == alike(expected)
            assert value(client, "scaledown_model_bytes") < whole


def test_a_stream_has_the_whole_answer_in_pieces(client: httpx.Client, remote: httpx.Client) -> None:
    pieces = events(remote.post("/answer", json={**BODY, "stream": True}).text)
    local = events(client.post("/answer", json={**BODY, "stream": True}).text)
    assert [name for name, _ in pieces] == [name for name, _ in local]
    tokens = [data for name, data in pieces if name == "token"]
    assert tokens
    assert tokens == [data for name, data in local if name == "token"]


def test_chat_completions_too(client: httpx.Client, remote: httpx.Client) -> None:
    body = {"model": "untrained", "messages": [{"role": "user", "content": QUERY}], "documents": PASSAGES}
    replies = [c.post("/v1/chat/completions", json={**body, "max_tokens": 8}).json() for c in (client, remote)]
    assert replies[0]["choices"] == replies[1]["choices"]
    assert replies[0]["usage"] == replies[1]["usage"]


def test_a_stop_string_ends_the_answer_and_the_servers_work(
    client: httpx.Client, remote: httpx.Client, vllm: VllmDouble
) -> None:
    whole = answer(client, max_new_tokens=24, mode="text")["answer"]
    stop = whole[len(whole) // 2 :][:3]
    vllm.token_s, before = 0.02, vllm.cancelled
    got = answer(remote, max_new_tokens=180, mode="text", stop=[stop])
    assert got["answer"] == whole[: whole.index(stop)]
    assert got["finish_reason"] == "stop"
    wait_for(lambda: vllm.cancelled > before)


def test_a_client_that_leaves_stops_the_server(remote: httpx.Client, vllm: VllmDouble) -> None:
    vllm.token_s, before = 0.05, vllm.cancelled
    with remote.stream("POST", "/answer", json={**BODY, "max_new_tokens": 180, "stream": True}) as response:
        next(response.iter_lines())
    wait_for(lambda: vllm.cancelled > before)
    response = remote.post("/answer", json={**BODY, "max_new_tokens": 180, "timeout": 0.3})
    assert response.status_code == 504
    wait_for(lambda: vllm.cancelled > before + 1)


def test_many_at_once(client: httpx.Client, remote: httpx.Client) -> None:
    async def ask_all() -> list[Any]:
        async with httpx.AsyncClient(base_url=remote.base_url, timeout=30, trust_env=False) as caller:
            asked = (caller.post("/answer", json={**BODY, **SAMPLED, "seed": seed}) for seed in range(8))
            return [response.json()["answer"] for response in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [answer(client, **{**SAMPLED, "seed": seed})["answer"] for seed in range(8)]


def test_a_connection_lost_before_the_first_token_is_no_loss(
    client: httpx.Client, remote: httpx.Client, vllm: VllmDouble
) -> None:
    vllm.broken = ["reset", "reset"]
    assert alike(answer(remote)) == alike(answer(client))
    assert "scaledown_generator_retries_total 2.0" in remote.get("/metrics").text


def test_a_connection_lost_within_the_answer_is_an_error(remote: httpx.Client, vllm: VllmDouble) -> None:
    vllm.broken = ["cut"]
    response = remote.post("/answer", json=BODY)
    assert response.status_code == 503
    assert error(response)["code"] == "generator_unavailable"
    wait_for(lambda: remote.get("/readyz").status_code == 200)
    vllm.broken = ["cut"]
    name, data = events(remote.post("/answer", json={**BODY, "stream": True}).text)[-1]
    assert (name, data["error"]["code"]) == ("error", "generator_unavailable")
    wait_for(lambda: remote.get("/readyz").status_code == 200)


@pytest.mark.parametrize(
    ("status", "shown", "code"), [(503, 429, "overloaded"), (400, 500, "internal"), (401, 503, "generator_unavailable")]
)
def test_refusals(remote: httpx.Client, vllm: VllmDouble, status: int, shown: int, code: str) -> None:
    vllm.broken = [status]
    response = remote.post("/answer", json=BODY)
    assert response.status_code == shown
    assert error(response)["code"] == code
    assert "secret" not in response.text
    assert ("Retry-After" in response.headers) == (shown != 500)
    wait_for(lambda: remote.get("/readyz").status_code == 200)


def test_away_and_back(serve: Serve, model: Model) -> None:
    vllm = VllmDouble(model.generator)
    with serve(generator_url=vllm.url, generator_key="a key of the server's") as client:
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "generator" in ready.json()["status"]
        response = client.post("/answer", json=BODY)
        assert response.status_code == 503
        assert error(response)["code"] == "generator_unavailable"
        # What needs no generator goes on.
        assert client.post("/rerank", json={"query": QUERY, "passages": PASSAGES}).status_code == 200
        for _ in range(2):
            with vllm.running():
                wait_for(lambda: client.get("/readyz").status_code == 200)
                assert answer(client)["answer"]
                assert vllm.headers["authorization"] == "Bearer a key of the server's"
                assert "scaledown_generator_up 1.0" in client.get("/metrics").text
            assert client.post("/answer", json=BODY).status_code == 503
            wait_for(lambda: client.get("/readyz").status_code == 503)


def test_a_look_that_fails_is_not_the_last_one(serve: Serve, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([RuntimeError("can't allocate memory"), TypeError("of a library's")])

    def scarce(asked: Model) -> GoldenRequest:
        for failure in failures:
            raise failure
        return golden_request(asked)

    vllm = VllmDouble(model.generator)
    with serve(generator_url=vllm.url) as client:
        monkeypatch.setattr("service.generation.vllm_engine.golden_request", scarce)
        with vllm.running():
            wait_for(lambda: client.get("/readyz").status_code == 200)
            assert answer(client)["answer"]
    assert next(failures, None) is None


def outages(client: httpx.Client) -> int:
    """How often the service has found its server away; `/readyz` would show it for a moment only."""
    return client.app.state.engine.server.outages  # type: ignore[attr-defined,no-any-return]


def golden_answers(vllm: VllmDouble) -> int:
    return sum("logprobs" in body for body in vllm.requests)


def test_a_server_that_says_it_is_not_well_is_away(remote: httpx.Client, vllm: VllmDouble) -> None:
    vllm.health = 503  # vLLM whose engine is dead, or a balancer with nobody behind it
    wait_for(lambda: remote.get("/readyz").status_code == 503)
    assert "status 503" in remote.get("/readyz").text
    assert value(remote, "scaledown_generator_up") == 0
    response = remote.post("/answer", json=BODY)
    assert (response.status_code, error(response)["code"]) == (503, "generator_unavailable")
    vllm.health = 200
    wait_for(lambda: remote.get("/readyz").status_code == 200)
    assert value(remote, "scaledown_generator_up") == 1
    assert answer(remote)["answer"]


@pytest.mark.parametrize("failure", [500, 502, 401, "cut"])
def test_a_request_that_fails_fails_alone(remote: httpx.Client, vllm: VllmDouble, failure: int | str) -> None:
    before, asked = outages(remote), golden_answers(vllm)
    for _ in range(2):
        vllm.broken = [failure]
        response = remote.post("/answer", json=BODY)
        assert (response.status_code, error(response)["code"]) == (503, "generator_unavailable")
        assert remote.get("/readyz").status_code == 200
        assert answer(remote)["answer"]
    wait_for(lambda: golden_answers(vllm) > asked)  # whether more is wrong is seen to meanwhile
    assert outages(remote) == before


def test_when_the_golden_answer_fails_too_the_server_is_away(remote: httpx.Client, vllm: VllmDouble) -> None:
    before = outages(remote)
    vllm.broken, vllm.refused = [500], [500]
    assert remote.post("/answer", json=BODY).status_code == 503
    wait_for(lambda: outages(remote) == before + 1)
    wait_for(lambda: remote.get("/readyz").status_code == 200)


def test_a_slow_probe_is_an_outage_only_if_the_next_are_slow_too(
    remote: httpx.Client, vllm: VllmDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "PROBE_S", 1.0)
    before, vllm.probes, vllm.health_s = outages(remote), 0, 3.0
    wait_for(lambda: vllm.probes == 1)
    vllm.health_s = 0.0
    wait_for(lambda: vllm.probes > 3)  # the first was late
    assert outages(remote) == before
    vllm.probes, vllm.health_s = 0, 3.0
    wait_for(lambda: "no progress" in remote.get("/readyz").text)
    assert vllm.probes >= vllm_server.LATE_PROBES
    vllm.health_s = 0.0
    wait_for(lambda: remote.get("/readyz").status_code == 200)


def test_versions_that_are_held_come_back_too(root: Path) -> None:
    """Both checkpoints have the generator that the double serves."""
    vllm = VllmDouble(load_checkpoint(root / "first").generator)
    with vllm.running(), serve_checkpoint(root / "first", generator_url=vllm.url, keep_checkpoints=1) as client:
        held = change(client, "load", "second").json()["version"]
        assert held == version_of(root / "second")
        named = {"X-Checkpoint": held}
        assert client.post("/answer", json=BODY, headers=named).json()["checkpoint"] == held
        vllm.health = 503
        wait_for(lambda: client.post("/answer", json=BODY, headers=named).status_code == 503)
        vllm.health = 200
        wait_for(lambda: client.post("/answer", json=BODY, headers=named).status_code == 200)
        assert answer(client)["checkpoint"] == version_of(root / "first")


def test_a_version_that_is_refused_leaves_the_gauge_as_it_is(
    root: Path, tiny_mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "WATCH_SECONDS", 60)  # nobody mends it meanwhile
    other = Config(compressor=CompressorConfig(n_layers=1), generator=GeneratorConfig(base_model=str(tiny_mistral)))
    save_checkpoint(build_model(other, seed=0), tmp_path / "other")
    vllm = VllmDouble(load_checkpoint(root / "first").generator)
    with (
        vllm.running(),
        serve_checkpoint(root / "first", generator_url=vllm.url, checkpoint_root=tmp_path) as client,
    ):
        assert change(client, "activate", "other").status_code == 409
        assert value(client, "scaledown_generator_up") == 1
        assert answer(client)["checkpoint"] == version_of(root / "first")


def test_a_version_in_memory_is_looked_at_again_by_whatever_name_it_is_asked_for(root: Path) -> None:
    """Both checkpoints have the generator that the double serves, until it serves another."""
    generator = load_checkpoint(root / "first").generator
    vllm = VllmDouble(generator)
    with vllm.running(), serve_checkpoint(root / "first", generator_url=vllm.url) as client:
        held = change(client, "load", "second").json()["version"]
        with torch.no_grad():
            generator.model.get_decoder().layers[0].mlp.down_proj.weight.mul_(-3)
        vllm.health = 503
        wait_for(lambda: client.get("/readyz").status_code == 503)
        vllm.health = 200
        for name in (held, "second"):
            response = change(client, "activate", name)
            assert (response.status_code, response.json()["error"]["code"]) == (409, "checkpoint")


def other_weights(model: Model) -> VllmDouble:
    """A server of another generator of the same shape."""
    generator = copy.deepcopy(model.generator)
    with torch.no_grad():
        generator.model.get_decoder().layers[0].mlp.down_proj.weight.mul_(-3)
    return VllmDouble(generator)


def test_other_weights_are_refused_at_start(model: Model) -> None:
    async def start(url: str) -> None:
        app = create_app(make_settings(generator_url=url), model)
        async with app.router.lifespan_context(app):
            pass

    with other_weights(model).running() as vllm, pytest.raises(CheckpointError, match="merged export"):
        asyncio.run(start(vllm.url))


def test_other_weights_after_a_restart_are_not_used(serve: Serve, model: Model) -> None:
    vllm, other = VllmDouble(model.generator), other_weights(model)
    other.port = vllm.port
    with serve(generator_url=vllm.url) as client:
        with vllm.running():
            wait_for(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/answer", json=BODY).status_code == 503
        with other.running():
            wait_for(lambda: "does not serve this checkpoint" in client.get("/readyz").text)
            assert client.post("/answer", json=BODY).status_code == 503
        assert all(body["logprobs"] for body in other.requests)  # asked for the golden answer only


def test_the_servers_room_is_a_limit(serve: Serve, model: Model) -> None:
    small = copy.copy(model)
    small.generator = copy.copy(model.generator)
    with (
        VllmDouble(model.generator, max_model_len=200).running() as vllm,
        serve(small, generator_url=vllm.url) as client,
    ):
        response = client.post("/answer", json={**BODY, "mode": "text"})
        assert response.status_code == 413
        assert error(response)["limit"] == 200
        vllm.health, vllm.max_model_len = 503, 400  # it is started again with more room
        wait_for(lambda: client.get("/readyz").status_code == 503)
        vllm.health = 200
        wait_for(lambda: client.get("/readyz").status_code == 200)
        assert error(client.post("/answer", json={**BODY, "max_new_tokens": 500}))["limit"] == 400


@pytest.mark.parametrize("name", ["another", "generator"])
def test_the_model_can_be_named(serve: Serve, model: Model, vllm: VllmDouble, name: str) -> None:
    app = create_app(make_settings(generator_url=vllm.url, generator_model=name), model)

    async def start() -> None:
        async with app.router.lifespan_context(app):
            pass

    if name == "generator":
        asyncio.run(start())
    else:
        with pytest.raises(CheckpointError, match=r"generator_model: must be one of .*generator"):
            asyncio.run(start())


@pytest.mark.parametrize("listed", [[], "[]", 3, {"id": "a"}, ["a"], [{"name": "a"}], None])
def test_a_list_of_models_that_is_none_names_none(listed: object) -> None:
    with pytest.raises(EngineError, match="must be one of the models the generator serves: none"):
        parse_models(json.dumps({"data": listed}), "")


@pytest.mark.parametrize(
    "values",
    [
        {"engine": "vllm"},
        {"engine": "torch", "generator_url": "http://h:1/v1"},
        {"generator_url": "ftp://h"},
        {"generator_url": "http://user:password@h/v1"},
    ],
)
def test_settings_that_contradict(values: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=r"engine|generator_url"):
        Settings.model_validate(values)


def test_the_log_says_where_and_why_it_is_away_and_that_it_is_back(
    serve: Serve, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "service.generation.vllm_engine"]

    vllm = VllmDouble(model.generator)
    with caplog.at_level(logging.INFO), serve(generator_url=vllm.url) as client:
        wait_for(lambda: outages(client) > 3)
        with vllm.running():
            wait_for(lambda: client.get("/readyz").status_code == 200)
        wait_for(lambda: len(said()) == 3)
        assert [record.levelname for record in said()] == ["WARNING", "INFO", "WARNING"]
        away = said()[0].__dict__
        assert away["url"].rstrip("/") == vllm.url
        assert "refused" in away["reason"]
        unready = client.get("/readyz").text
        assert "the generator cannot be reached" in unready
        assert "127.0.0.1" not in unready


def test_a_server_that_wants_a_key_is_told_from_one_that_is_away(
    serve: Serve, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    vllm = VllmDouble(model.generator)
    vllm.refused = [401] * 1000
    with vllm.running(), serve(generator_url=vllm.url):
        pass
    [reason] = [record.__dict__["reason"] for record in caplog.records if "is away" in record.message]
    assert "401: set SCALEDOWN_GENERATOR_KEY" in reason
