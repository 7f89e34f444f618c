"""The service against a real vLLM on this CPU: what the double only claims. Takes minutes.

service/benchmark/set_up_vllm.sh /tmp/vllm && VLLM_ENVIRONMENT=/tmp/vllm pytest -m long tests/service/test_real_vllm.py
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.answer import answer as local_answer
from core.base_models import resolve_base_model
from core.checkpoint import load_checkpoint, save_checkpoint
from core.config import Mode
from core.golden import PASSAGES, QUERY
from core.model import Model
from core.passages import Passage
from core.sampling import GenerationOptions
from service.settings import SHIPPED
from tests.free_port import free_port
from tests.service.conftest import Serve
from training.export import read_source

SCRIPT = Path(__file__).parent.parent.parent / "service" / "benchmark" / "serve_vllm.sh"
ENVIRONMENT = os.environ.get("VLLM_ENVIRONMENT", "")
START_SECONDS = 600
QUERIES = (
    QUERY,
    "How long is the bridge?",
    "What has to rest before it is baked?",
    "Where does the Aare rise?",
    "How long is the Aare?",
    "What is bread made of?",
)
OPTIONS = ("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not ENVIRONMENT, reason="VLLM_ENVIRONMENT names no virtual environment with vLLM"),
]


@pytest.fixture(scope="module")
def demo() -> Model:
    if not SHIPPED.is_dir():
        pytest.skip("there is no demo checkpoint")
    return load_checkpoint(SHIPPED)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's generator, its adapter merged in."""
    source, folder = read_source(SHIPPED), tmp_path_factory.mktemp("merged") / "demo"
    save_checkpoint(source.model, folder, adapter=source.adapter, merge=True)
    return folder / "generator"


@contextlib.contextmanager
def vllm(generator: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real vLLM, ready; killed with its workers at the end."""
    command = [str(SCRIPT), ENVIRONMENT, str(generator), str(port), *OPTIONS]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        end = time.monotonic() + START_SECONDS
        while not healthy(port):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, "vLLM does not become ready"
            time.sleep(1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


def ask(client: httpx.Client, query: str, mode: str, **values: Any) -> httpx.Response:
    body = {"query": query, "passages": list(PASSAGES), "mode": mode, "max_new_tokens": 24, **values}
    return client.post("/answer", json=body, timeout=300)


def wait_until_ready(client: httpx.Client, status: int) -> None:
    end = time.monotonic() + 60
    while client.get("/readyz").status_code != status:
        assert time.monotonic() < end, client.get("/readyz").text
        time.sleep(0.5)


def test_the_real_vllm(serve: Serve, demo: Model, merged: Path, port: int, tmp_path: Path) -> None:
    """One test, because vLLM takes a minute to start: answers, concurrency, streaming, kill -9 and return."""
    log = tmp_path / "vllm.log"
    with serve(demo, generator_url=f"http://127.0.0.1:{port}/v1") as client:
        assert client.get("/readyz").status_code == 503
        with vllm(merged, port, log) as process:
            wait_until_ready(client, 200)
            _same_answers(client, demo)
            _limits_hold(client)
            os.killpg(process.pid, signal.SIGKILL)
            assert ask(client, QUERY, "compressed").status_code == 503
            wait_until_ready(client, 503)
        with vllm(merged, port, log):
            wait_until_ready(client, 200)
            assert ask(client, QUERY, "compressed").status_code == 200


def _same_answers(client: httpx.Client, demo: Model) -> None:
    """Greedy answers of all modes, asked all at once, are the torch engine's."""
    passages, options = [Passage(text) for text in PASSAGES], GenerationOptions(max_new_tokens=24)
    modes: tuple[Mode, ...] = ("text", "compressed", "hybrid")
    asked = [(query, mode) for query in QUERIES for mode in modes]
    with ThreadPoolExecutor(len(asked)) as pool:
        got = [response.json() for response in pool.map(lambda pair: ask(client, *pair), asked)]
    expected = [local_answer(demo, query, passages, mode, None, options) for query, mode in asked]
    assert [each["answer"] for each in got] == [each.text for each in expected]
    assert [each["finish_reason"] for each in got] == [each.finish_reason for each in expected]
    assert [each["usage"]["completion_tokens"] for each in got] == [each.completion_tokens for each in expected]


def _limits_hold(client: httpx.Client) -> None:
    """Stop strings, seeds and lengths do what they do in our engine."""
    whole = ask(client, "How long is the Aare?", "compressed").json()["answer"]
    stop = whole[len(whole) // 2 :][:2]
    stopped = ask(client, "How long is the Aare?", "compressed", stop=[stop]).json()
    assert (stopped["answer"], stopped["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    short = ask(client, "What is bread made of?", "text", max_new_tokens=2).json()
    assert (short["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 2)
    sampled = [ask(client, QUERY, "text", temperature=1.0, seed=5).json()["answer"] for _ in range(2)]
    assert sampled[0] == sampled[1]
    streamed = ask(client, "How long is the Aare?", "compressed", stream=True).text
    assert streamed.rstrip().split("event: ")[-1].startswith("done")


def test_the_base_model_without_its_adapter_is_refused(serve: Serve, demo: Model, port: int, tmp_path: Path) -> None:
    base = resolve_base_model(demo.config.generator.base_model).path
    with serve(demo, generator_url=f"http://127.0.0.1:{port}/v1") as client, vllm(base, port, tmp_path / "vllm.log"):
        end = time.monotonic() + 60
        while "does not serve this checkpoint" not in client.get("/readyz").text:
            assert time.monotonic() < end, client.get("/readyz").text
            time.sleep(0.5)
        assert ask(client, QUERY, "compressed").status_code == 503
