"""The Ray Serve application on a real local cluster, with tiny checkpoints. Takes minutes, and 3 GB of memory.

pip install '.[ray]' && pytest -m long tests/service/test_ray_app.py
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.versions import version_of
from tests.free_port import free_port
from tests.service.calls import PASSAGES, error, events
from tests.service.ray_cluster import (
    ADMIN,
    NEW_TOKENS,
    QUERIES,
    START_SECONDS,
    Load,
    Lone,
    ask,
    change,
    check,
    deploy,
    processes,
)
from tests.service.vllm_double import VllmDouble
from tests.tiny_checkpoints import edit_tensors, sign
from tests.waiting import wait_for

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
serve = pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

# Ray's own modules warn of each other.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, and one that does not repeat its golden example."""
    copied = tmp_path_factory.mktemp("ray")
    for name in ("first", "second"):
        shutil.copytree(root / name, copied / name)
    shutil.copytree(root / "second", copied / "broken")
    edit_tensors(
        copied / "broken" / "compressor.safetensors",
        lambda tensors: {name: tensor + 0.1 for name, tensor in tensors.items()},
    )
    sign(copied / "broken")
    return copied


@pytest.fixture(scope="module")
def lone(folder: Path) -> Lone:
    return Lone(folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of this machine alone, or the one that RAY_ADDRESS names; yields the address of its HTTP proxy."""
    port = free_port()
    # As many CPUs as there are processes to start, however many this machine has.
    own = {"num_cpus": 8, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    ray.init(log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else own))
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def client(cluster: str, folder: Path) -> Iterator[httpx.Client]:
    """Two compressors and two generators."""
    two = {f"{kind}_{bound}_replicas": 2 for kind in ("compressor", "generator") for bound in ("min", "max")}
    deploy(folder, max_new_tokens=4000, timeout_seconds=600, **two)
    with httpx.Client(base_url=cluster, timeout=600, trust_env=False) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200, START_SECONDS)
        yield client


def test_each_kind_of_replica_is_a_process_of_its_own(client: httpx.Client) -> None:
    assert [len(processes(name)) for name in ("Ingress", "Compressor", "Generator")] == [1, 2, 2]


def test_answers_are_those_of_one_process(client: httpx.Client, lone: Lone, folder: Path) -> None:
    assert check([ask(client, number) for number in range(6)], lone) == {version_of(folder / "first")}
    body = {"query": QUERIES[0], "passages": PASSAGES, "max_new_tokens": NEW_TOKENS, "stream": True}
    streamed = events(client.post("/answer", json=body).text)
    assert (streamed[0][0], streamed[-1][0]) == ("passages", "done")
    whole = lone.answer(version_of(folder / "first"), QUERIES[0], "compressed")
    assert "".join(content["text"] for name, content in streamed if name == "token") == whole
    assert streamed[-1][1]["answer"] == whole
    assert streamed[-1][1]["timings_ms"]["first_token"] > 0
    twice = client.post("/answer", json={**body, "stream": False, "hops": 2}).json()
    assert twice["answer"] == lone.answer(version_of(folder / "first"), QUERIES[0], "compressed", 2)
    assert [each["relevance"] for each in twice["passages"]] != [
        each["relevance"] for each in streamed[-1][1]["passages"]
    ]


def test_other_routes_and_dialects_are_there(client: httpx.Client) -> None:
    query = {"query": QUERIES[0], "passages": PASSAGES}
    compressed = client.post("/compress", json=query).json()
    given = [{"embeddings": passage["embeddings"]} for passage in compressed["passages"]]
    again = client.post("/answer", json={"query": QUERIES[0], "passages": given, "max_new_tokens": 4})
    assert again.status_code == 200
    ranked = client.post("/rerank", json=query).json()["results"]
    assert {each["index"]: each["relevance"] for each in ranked} == {
        passage["index"]: passage["relevance"] for passage in compressed["passages"]
    }
    chat = {"model": "scaledown", "messages": [{"role": "user", "content": QUERIES[0]}], "documents": [PASSAGES[0]]}
    assert client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]


def test_errors_keep_their_shape(client: httpx.Client) -> None:
    empty = client.post("/answer", json={"query": QUERIES[0], "passages": [""]})
    assert (empty.status_code, error(empty)["field"]) == (422, "passages.0")
    late = client.post("/answer", json={"query": QUERIES[0], "passages": PASSAGES, "timeout": 1e-4})
    assert (late.status_code, error(late)["code"]) == (504, "deadline")
    unknown = ask(client, 0, **{"X-Checkpoint": "second@000000000000"})[2]
    assert (unknown.status_code, error(unknown)["code"]) == (404, "model_not_found")
    assert error(client.get("/admin/checkpoints"))["code"] == "unauthorized"
    assert error(client.get("/nothing"))["code"] == "not_found"


@pytest.mark.parametrize("deployment", ["Compressor", "Generator"])
def test_a_killed_replica_loses_no_request(client: httpx.Client, lone: Lone, deployment: str) -> None:
    before = processes(deployment)
    with Load(client) as load:
        os.kill(before[0], signal.SIGKILL)
        load.wait(48)
        wait_for(lambda: len(processes(deployment)) == 2, START_SECONDS)  # Ray has started another
        load.wait(24)
    assert before[0] not in processes(deployment)
    check(load.done, lone)


def test_a_stream_whose_replica_dies_ends_with_an_error_and_the_others_with_their_answer(client: httpx.Client) -> None:
    wait_for(lambda: len(processes("Generator")) == 2, START_SECONDS)
    with Load(client) as load:  # Ray gives requests that come at once to the replicas whose queues it has seen
        load.wait(24)
    begun = threading.Barrier(9)
    body = {"query": QUERIES[0], "passages": PASSAGES, "max_new_tokens": 4000, "stream": True}

    def stream() -> list[tuple[str, dict[str, Any]]]:
        text = ""
        with client.stream("POST", "/answer", json=body) as response:
            for part in response.iter_text():
                if "event: token" not in text and "event: token" in text + part:
                    begun.wait(START_SECONDS)
                text += part
        return events(text)

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(stream) for _ in range(8)]
        begun.wait(START_SECONDS)
        os.kill(processes("Generator")[0], signal.SIGKILL)
        streams = [future.result() for future in futures]
    failed = [content["error"] for streamed in streams for name, content in streamed[-1:] if name == "error"]
    assert {streamed[-1][0] for streamed in streams} == {"done", "error"}
    assert {each["code"] for each in failed} == {"generator_unavailable"}
    assert "/" not in json.dumps(failed)
    wait_for(lambda: len(processes("Generator")) == 2, START_SECONDS)


def test_a_broken_checkpoint_changes_nothing(client: httpx.Client, lone: Lone, folder: Path) -> None:
    before = client.get("/admin/checkpoints", headers=ADMIN).json()
    with Load(client) as load:
        refused = change(client, "activate", "broken")
        load.wait(12)
    assert (refused.status_code, error(refused)["code"]) == (409, "checkpoint")
    assert client.get("/admin/checkpoints", headers=ADMIN).json() == before
    assert check(load.done, lone) == {version_of(folder / "first")}


def test_a_swap_under_load_fails_no_request(client: httpx.Client, lone: Lone, folder: Path) -> None:
    first, second = version_of(folder / "first"), version_of(folder / "second")
    with Load(client) as load:
        changed = change(client, "activate", "second").json()
        assert (changed["active"], changed["kept"]) == (second, [first])
        after = [ask(client, number) for number in range(6)]
        load.wait(24)
    assert check(load.done, lone) == {first, second}
    assert check(after, lone) == {second}


def test_a_request_may_name_a_version_that_is_in_memory(client: httpx.Client, lone: Lone, folder: Path) -> None:
    first, second = version_of(folder / "first"), version_of(folder / "second")
    with Load(client) as load:
        named = [ask(client, number, **{"X-Checkpoint": first}) for number in range(6)]
    assert check(named, lone) == {first}
    assert check(load.done, lone) == {second}


def test_a_replica_that_starts_after_a_swap_serves_what_the_others_serve(
    client: httpx.Client, lone: Lone, folder: Path
) -> None:
    for deployment in ("Compressor", "Generator"):
        for pid in processes(deployment):
            os.kill(pid, signal.SIGKILL)  # all that knew of the swap
    wait_for(lambda: [len(processes(name)) for name in ("Compressor", "Generator")] == [2, 2], START_SECONDS)
    wait_for(lambda: client.get("/readyz").status_code == 200, START_SECONDS)
    assert check([ask(client, number) for number in range(6)], lone) == {version_of(folder / "second")}
    assert change(client, "rollback").json()["active"] == version_of(folder / "first")
    assert check([ask(client, number) for number in range(6)], lone) == {version_of(folder / "first")}


def test_each_kind_is_scaled_by_its_own_queue(client: httpx.Client, lone: Lone, folder: Path) -> None:
    """Last, as it takes away what the others use: a deployment that is only changed keeps its number of replicas."""
    serve.delete("default")
    deploy(folder, compressor_max_replicas=1, generator_max_replicas=2, generator_target_requests=1, upscale_seconds=1)
    wait_for(lambda: [len(processes(name)) for name in ("Compressor", "Generator")] == [1, 1], START_SECONDS)
    wait_for(lambda: client.get("/readyz").status_code == 200, START_SECONDS)
    with Load(client) as load:
        wait_for(lambda: len(processes("Generator")) == 2, START_SECONDS)
        load.wait(12)
    assert len(processes("Compressor")) == 1
    check(load.done, lone)


def test_answers_by_vllm(cluster: str, lone: Lone, folder: Path) -> None:
    """A double of vLLM in this process; tests/service/test_ray_vllm.py has the rest, without a cluster."""
    serve.delete("default")
    with VllmDouble(next(iter(lone.models.values())).generator).running() as vllm:
        deploy(folder, generator_url=vllm.url)
        with httpx.Client(base_url=cluster, timeout=600, trust_env=False) as client:
            wait_for(lambda: client.get("/readyz").status_code == 200, START_SECONDS)
            assert [len(processes(name)) for name in ("Compressor", "Generator")] == [1, 0]
            assert check([ask(client, number) for number in range(6)], lone) == {version_of(folder / "first")}
