"""The Ray Serve application with a vLLM server, here an HTTP double of one, and a compressor replica in this process.

Ray's handles run without a cluster in its local testing mode. What that lacks, `serve.multiplexed`, is done by hand.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.answer import answer as lone_answer
from core.checkpoint import load_checkpoint
from core.errors import CheckpointError
from core.model import Model
from core.passages import Passage
from core.sampling import GenerationOptions
from service import engine as engine_module
from service.app import create_app
from service.errors import GeneratorUnavailableError
from service.versions import version_of
from tests.service.calls import PASSAGES, QUERY, answer, error, events
from tests.service.conftest import serve_app
from tests.service.vllm_double import VllmDouble
from tests.waiting import wait_for

serve = pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own modules warn of each other

KEY = "admin-0123456789abcdef"
BODY = {"query": QUERY, "passages": PASSAGES, "max_new_tokens": 8}
Load = Callable[[str], Awaitable[Any]]


def keep_all(**_: object) -> Callable[[Load], Load]:
    """`serve.multiplexed` for a few versions: it needs a replica that is an actor."""

    def decorate(load: Load) -> Load:
        held: dict[str, Any] = {}

        async def get(version: str) -> Any:
            if version not in held:
                held[version] = await load(version)
            return held[version]

        return get

    return decorate


@pytest.fixture(scope="module", autouse=True)
def _local() -> Iterator[None]:
    from service.ray_app import replicas

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "multiplexed", keep_all)
        patch.setattr(replicas, "configure_logging", lambda level: None)  # a replica's process, not this one's
        patch.setattr(engine_module, "WATCH_SECONDS", 0.1)
        yield


@pytest.fixture(scope="module")
def first(root: Path) -> Model:
    return load_checkpoint(root / "first")


@pytest.fixture(scope="module")
def vllm(first: Model) -> Iterator[VllmDouble]:
    with VllmDouble(first.generator).running() as double:
        yield double


def make_app(root: Path, vllm: VllmDouble, **of_compressor: object) -> Any:
    """The ingress's application, and its fleet: one compressor replica, and no generators."""
    from service.ray_app.fleet import Fleet
    from service.ray_app.remote import RemoteEngine
    from service.ray_app.replicas import CompressorReplica
    from service.ray_app.settings import read_settings

    costs = {"compressor_token_us": "10", "prefill_token_us": "100"}
    values = {"checkpoint": str(root / "first"), "generator_url": vllm.url, "admin_key": KEY, "dtype": "float32"}
    settings = read_settings({**values, **costs, "threads": "1"})
    deployment = serve.deployment(CompressorReplica, name="Compressor")
    replica = deployment.bind(settings.of_compressor().model_copy(update=of_compressor))
    fleet = Fleet(serve.run(replica, _local_testing_mode=True), None)
    return create_app(settings.of_ingress(), engine_class=partial(RemoteEngine, fleet)), fleet


@pytest.fixture(scope="module")
def client(root: Path, vllm: VllmDouble) -> Iterator[httpx.Client]:
    app, _ = make_app(root, vllm)
    with serve_app(app) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        yield client


def alone(model: Model, mode: Any) -> str:
    """What one process answers to `BODY`."""
    passages = [Passage(each) if isinstance(each, str) else Passage(**each) for each in PASSAGES]
    return lone_answer(model, QUERY, passages, mode, options=GenerationOptions(max_new_tokens=8)).text


@pytest.mark.parametrize("mode", ["text", "hybrid", "compressed"])
def test_answers_are_those_of_one_process(client: httpx.Client, vllm: VllmDouble, first: Model, mode: str) -> None:
    assert answer(client, **BODY, mode=mode)["answer"] == alone(first, mode)
    assert ("prompt" in vllm.requests[-1]) == (mode == "text")
    streamed = events(client.post("/answer", json={**BODY, "mode": mode, "stream": True}).text)
    assert streamed[-1][0] == "done"
    assert "".join(content["text"] for name, content in streamed if name == "token") == alone(first, mode)


def test_a_swap_reaches_the_compressor(client: httpx.Client, root: Path, first: Model) -> None:
    """Both checkpoints have the generator that the double serves."""
    for name, model in (("second", load_checkpoint(root / "second")), ("first", first)):
        body = {"action": "activate", "name": name}
        changed = client.post("/admin/checkpoints", json=body, headers={"X-API-Key": KEY})
        assert changed.json()["active"] == version_of(root / name)
        got = answer(client, **BODY, mode="compressed")
        assert (got["checkpoint"], got["answer"]) == (version_of(root / name), alone(model, "compressed"))


def test_a_server_that_goes_away_is_noticed_and_taken_back(root: Path, first: Model) -> None:
    vllm = VllmDouble(first.generator)
    app, _ = make_app(root, vllm)
    with serve_app(app) as client:
        assert client.get("/readyz").status_code == 503
        with vllm.running():
            wait_for(lambda: client.get("/readyz").status_code == 200)
            assert answer(client, **BODY)["answer"]
            assert "scaledown_generator_up 1.0" in client.get("/metrics").text
        wait_for(lambda: client.get("/readyz").status_code == 503)
        assert "scaledown_generator_up 0.0" in client.get("/metrics").text
        assert error(client.post("/answer", json=BODY))["code"] == "generator_unavailable"
        assert client.post("/rerank", json={"query": QUERY, "passages": PASSAGES}).status_code == 200


def test_it_is_not_ready_while_no_compressor_is_up(
    root: Path, vllm: VllmDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, fleet = make_app(root, vllm)

    async def none_is_up(version: str) -> None:
        raise GeneratorUnavailableError("no replica is up")

    with serve_app(app) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        with monkeypatch.context() as patch:
            patch.setattr(fleet, "prepare", none_is_up)
            wait_for(lambda: "no replica is up" in client.get("/readyz").text)
            assert error(client.post("/answer", json=BODY))["code"] == "generator_unavailable"
        wait_for(lambda: client.get("/readyz").status_code == 200)
        assert answer(client, **BODY)["answer"]


def test_it_does_not_start_where_a_compressor_refuses_the_checkpoint(root: Path, vllm: VllmDouble) -> None:
    app, _ = make_app(root, vllm, max_model_bytes=1000)

    async def start() -> None:
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(CheckpointError, match=version_of(root / "first")):
        asyncio.run(start())
