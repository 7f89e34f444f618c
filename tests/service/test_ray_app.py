"""The Ray Serve application on a real local cluster, with tiny checkpoints. Takes minutes, and 3 GB of memory.

pip install '.[ray]' && pytest -m long tests/service/test_ray_app.py
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.answer import answer as lone_answer
from core.checkpoint import load_checkpoint
from core.config import Mode
from core.passages import Passage
from core.sampling import GenerationOptions
from tests.service.calls import PASSAGES, error, events
from tests.tiny_checkpoints import edit_tensors, sign

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
serve = pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

# Ray's own modules warn of each other.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]

KEY = "admin-0123456789abcdef"
ADMIN = {"Authorization": f"Bearer {KEY}"}
START_SECONDS = 1200  # on a machine that is busy with other work
MODES: tuple[Mode, ...] = ("compressed", "hybrid", "text")
QUERIES = tuple(f"{question} ({number})" for number in range(8) for question in ("Who found it?", "What is bread?"))
NEW_TOKENS = 24


class Lone:
    """What one process answers, by checkpoint version."""

    def __init__(self, root: Path) -> None:
        self.models = {model.name: model for model in (load_checkpoint(root / name) for name in ("first", "second"))}
        self._known: dict[tuple[str, str, Mode], str] = {}

    def answer(self, version: str, query: str, mode: Mode) -> str:
        key = (version, query, mode)
        if key not in self._known:
            passages = [Passage(each) if isinstance(each, str) else Passage(**each) for each in PASSAGES]
            options = GenerationOptions(max_new_tokens=NEW_TOKENS)
            self._known[key] = lone_answer(self.models[version], query, passages, mode, options=options).text
        return self._known[key]


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As many CPUs as there are processes to start, however many this machine has.
    own = {"num_cpus": 8, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    ray.init(log_to_driver=False, **({} if "RAY_ADDRESS" in os.environ else own))
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def deploy(folder: Path, **values: object) -> None:
    from service.ray_app import build_app

    costs = {"compressor_token_us": 10, "prefill_token_us": 100}  # not to be measured by every process
    shown = {"checkpoint": folder / "first", "admin_key": KEY, "dtype": "float32", "threads": 1, **costs, **values}
    serve.run(build_app({name: str(value) for name, value in shown.items()}))


@pytest.fixture(scope="module")
def client(cluster: str, folder: Path) -> Iterator[httpx.Client]:
    """Two compressors and two generators."""
    two = {f"{kind}_{bound}_replicas": 2 for kind in ("compressor", "generator") for bound in ("min", "max")}
    deploy(folder, max_new_tokens=4000, timeout_seconds=600, **two)
    with httpx.Client(base_url=cluster, timeout=600, trust_env=False) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def wait_until(true: Any, seconds: float = START_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def processes(deployment: str) -> list[int]:
    """The replicas of a deployment that are up, by the name that Ray gives a process once it has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::ServeReplica:default:" + deployment.encode()):
                found.append(int(path.parent.name))
    return sorted(found)


def ask(client: httpx.Client, number: int, **headers: str) -> tuple[str, Mode, httpx.Response]:
    query, mode = QUERIES[number % len(QUERIES)], MODES[number % len(MODES)]
    body = {"query": query, "passages": PASSAGES, "mode": mode, "max_new_tokens": NEW_TOKENS}
    return query, mode, client.post("/answer", json=body, headers=headers)


class Load:
    """Requests without a pause from several threads, until the block ends."""

    def __init__(self, client: httpx.Client, callers: int = 12) -> None:
        self.done: list[tuple[str, Mode, httpx.Response]] = []
        self._client = client
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self._callers = callers
        self._futures: list[Future[None]] = []

    def __enter__(self) -> "Load":
        self._futures = [self._pool.submit(self._call, number) for number in range(self._callers)]
        self.wait(self._callers)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown()
        for future in self._futures:
            future.result()

    def wait(self, more: int) -> None:
        """Let so many requests more be answered."""
        goal = len(self.done) + more
        wait_until(lambda: len(self.done) >= goal)

    def _call(self, number: int) -> None:
        while not self._ended.is_set():
            self.done.append(ask(self._client, number))
            number += self._callers


def check(done: list[tuple[str, Mode, httpx.Response]], lone: Lone) -> set[str]:
    """Every answer is the lone answer of the version it names; returns those versions."""
    versions = set()
    for query, mode, response in done:
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["answer"] == lone.answer(body["checkpoint"], query, mode)
        versions.add(body["checkpoint"])
    return versions


def version(folder: Path, name: str) -> str:
    from service.versions import version_of

    return version_of(folder / name)


def change(client: httpx.Client, action: str, name: str | None = None) -> httpx.Response:
    body = {"action": action} | ({"name": name} if name else {})
    return client.post("/admin/checkpoints", json=body, headers=ADMIN)


def test_each_kind_of_replica_is_a_process_of_its_own(client: httpx.Client) -> None:
    assert [len(processes(name)) for name in ("Ingress", "Compressor", "Generator")] == [1, 2, 2]


def test_answers_are_those_of_one_process(client: httpx.Client, lone: Lone, folder: Path) -> None:
    assert check([ask(client, number) for number in range(6)], lone) == {version(folder, "first")}
    body = {"query": QUERIES[0], "passages": PASSAGES, "max_new_tokens": NEW_TOKENS, "stream": True}
    streamed = events(client.post("/answer", json=body).text)
    assert (streamed[0][0], streamed[-1][0]) == ("passages", "done")
    whole = lone.answer(version(folder, "first"), QUERIES[0], "compressed")
    assert "".join(content["text"] for name, content in streamed if name == "token") == whole
    assert streamed[-1][1]["answer"] == whole
    assert streamed[-1][1]["timings_ms"]["first_token"] > 0


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
        wait_until(lambda: len(processes(deployment)) == 2)  # Ray has started another
        load.wait(24)
    assert before[0] not in processes(deployment)
    check(load.done, lone)


def test_a_stream_whose_replica_dies_ends_with_an_error_and_the_others_with_their_answer(client: httpx.Client) -> None:
    wait_until(lambda: len(processes("Generator")) == 2)
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
    wait_until(lambda: len(processes("Generator")) == 2)


def test_a_broken_checkpoint_changes_nothing(client: httpx.Client, lone: Lone, folder: Path) -> None:
    before = client.get("/admin/checkpoints", headers=ADMIN).json()
    with Load(client) as load:
        refused = change(client, "activate", "broken")
        load.wait(12)
    assert (refused.status_code, error(refused)["code"]) == (409, "checkpoint")
    assert client.get("/admin/checkpoints", headers=ADMIN).json() == before
    assert check(load.done, lone) == {version(folder, "first")}


def test_a_swap_under_load_fails_no_request(client: httpx.Client, lone: Lone, folder: Path) -> None:
    first, second = version(folder, "first"), version(folder, "second")
    with Load(client) as load:
        changed = change(client, "activate", "second").json()
        assert (changed["active"], changed["kept"]) == (second, [first])
        after = [ask(client, number) for number in range(6)]
        load.wait(24)
    assert check(load.done, lone) == {first, second}
    assert check(after, lone) == {second}


def test_a_request_may_name_a_version_that_is_in_memory(client: httpx.Client, lone: Lone, folder: Path) -> None:
    first, second = version(folder, "first"), version(folder, "second")
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
    wait_until(lambda: [len(processes(name)) for name in ("Compressor", "Generator")] == [2, 2])
    wait_until(lambda: client.get("/readyz").status_code == 200)
    assert check([ask(client, number) for number in range(6)], lone) == {version(folder, "second")}
    assert change(client, "rollback").json()["active"] == version(folder, "first")
    assert check([ask(client, number) for number in range(6)], lone) == {version(folder, "first")}


def test_each_kind_is_scaled_by_its_own_queue(client: httpx.Client, lone: Lone, folder: Path) -> None:
    """Last, as it takes away what the others use: a deployment that is only changed keeps its number of replicas."""
    serve.delete("default")
    deploy(folder, compressor_max_replicas=1, generator_max_replicas=2, generator_target_requests=1, upscale_seconds=1)
    wait_until(lambda: [len(processes(name)) for name in ("Compressor", "Generator")] == [1, 1])
    wait_until(lambda: client.get("/readyz").status_code == 200)
    with Load(client) as load:
        wait_until(lambda: len(processes("Generator")) == 2)
        load.wait(12)
    assert len(processes("Compressor")) == 1
    check(load.done, lone)
