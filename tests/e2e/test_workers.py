"""Two worker processes as operators run them: swaps that all make or none, a worker that is killed, one /metrics."""

import contextlib
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig
from core.model import build_model
from service.versions import version_of
from tests.e2e.test_process import BODY, running
from tests.waiting import wait_for

KEY = "admin-0123456789abcdef"
QUESTION = {**BODY, "max_new_tokens": 4}
SECONDS = 180  # a busy machine takes a minute to import torch twice
# The service on a machine that has no room for a third process when it is first asked for one.
CROWDED = """
import asyncio, sys
start, asked = asyncio.create_subprocess_exec, []
async def start_unless_third(*values, **options):
    asked.append(values)
    if len(asked) == 3:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return await start(*values, **options)
asyncio.create_subprocess_exec = start_unless_third
from service.__main__ import main
sys.exit(main([]))
"""


class Service:
    """The supervised service, and clients that come on a connection of their own: any worker may get them."""

    def __init__(self, process: Any, client: httpx.Client, log: list[str]) -> None:
        self.process = process
        self.url = str(client.base_url)
        self.log = log
        self.answered = 0

    def ask(self) -> dict[str, Any]:
        response = httpx.post(f"{self.url}/answer", json=QUESTION, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        self.answered += 1  # asked from one thread at a time, or counted by the caller
        return dict(response.json())

    def change(self, action: str, name: str | None = None) -> httpx.Response:
        body = {"action": action} | ({"name": name} if name else {})
        headers = {"X-API-Key": KEY}
        return httpx.post(f"{self.url}/admin/checkpoints", json=body, headers=headers, timeout=120, trust_env=False)

    def versions(self) -> set[str]:
        """What the workers say is active; twelve connections hardly all reach the same one."""
        responses = [httpx.get(f"{self.url}/readyz", timeout=30, trust_env=False) for _ in range(12)]
        return {response.json()["checkpoint"] for response in responses}

    def metric(self, series: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text
        found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def workers(self) -> set[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return {int(child) for child in children.split()}

    def metrics_folder(self) -> Path:
        environment = Path(f"/proc/{min(self.workers())}/environ").read_bytes().decode()
        return Path(dict(line.split("=", 1) for line in environment.split("\0") if line)["PROMETHEUS_MULTIPROC_DIR"])

    def lines(self, message: str) -> int:
        return sum(f'"message": "{message}"' in line for line in self.log)


@pytest.fixture(scope="module")
def root(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first` and `second`, a `broken` one, and the link `current` to the first."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = Config(
        compressor=CompressorConfig(n_layers=1, chunk_tokens=64), generator=GeneratorConfig(base_model=str(tiny_llama))
    )
    for seed, name in enumerate(("first", "second")):
        save_checkpoint(build_model(config, seed=seed), folder / name)
    shutil.copytree(folder / "second", folder / "broken")
    weights = bytearray((folder / "broken" / "compressor.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "broken" / "compressor.safetensors").write_bytes(weights)
    (folder / "current").symlink_to(folder / "first")
    return folder


@pytest.fixture(scope="module")
def service(root: Path) -> Iterator[Service]:
    """Two workers on the link `current`. The tests of this module follow each other on it."""
    with running(root / "current", command=("-c", CROWDED), workers="2", admin_key=KEY) as (process, client, log):
        service = Service(process, client, log)
        wait_for(lambda: service.lines("a worker serves") == 2, SECONDS)
        yield service


@contextlib.contextmanager
def clients(service: Service, answers: dict[str, str]) -> Iterator[None]:
    """Four clients that ask without a pause; every answer must be that of the version it names."""
    stop, failures, counts = threading.Event(), [], [0] * 4

    def ask(number: int) -> None:
        while not stop.is_set():
            try:
                response = httpx.post(f"{service.url}/answer", json=QUESTION, timeout=60, trust_env=False)
            except httpx.TransportError as error:
                failures.append(repr(error))
                return
            if response.status_code != 200 or response.json()["answer"] != answers[response.json()["checkpoint"]]:
                failures.append(response.text)
                return
            counts[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    service.answered += sum(counts)
    assert not failures
    assert all(counts)


def test_twenty_swaps_under_load_fail_no_request_and_name_their_version_truly(service: Service, root: Path) -> None:
    answers = {}
    for name in ("first", "second"):
        assert service.change("activate", name).status_code == 200
        got = service.ask()
        assert got["checkpoint"] == version_of(root / name)
        answers[got["checkpoint"]] = got["answer"]
    with clients(service, answers):
        for swap in range(20):
            name = ("first", "second")[swap % 2]
            response = service.change("activate", name)
            assert response.json()["active"] == version_of(root / name), response.text
            assert service.versions() == {version_of(root / name)}


def test_any_worker_shows_the_metrics_of_all(service: Service) -> None:
    wait_for(
        lambda: service.metric('scaledown_requests_total{route="/answer",status="200"}') == service.answered, SECONDS
    )
    # The first swap found its checkpoint active already, and a swap is counted once, not once a worker.
    assert service.metric('scaledown_checkpoint_swaps_total{result="ok"}') == 21
    for worker in "01":
        assert service.metric(f'process_resident_memory_bytes{{worker="{worker}"}}') > 10_000_000
    asked = {re.findall(r'"worker": (\d)', line)[0] for line in service.log if '"route": "/answer"' in line}
    assert asked == {"0", "1"}
    wait_for(lambda: service.metric("scaledown_requests_in_flight") == 0, SECONDS)


def test_a_broken_checkpoint_switches_no_worker_and_the_answer_says_why(service: Service, root: Path) -> None:
    refused = service.change("activate", "broken")
    assert refused.status_code == 409
    assert "compressor.safetensors" in refused.json()["error"]["message"]
    assert service.versions() == {version_of(root / "second")}
    assert service.metric('scaledown_checkpoint_swaps_total{result="refused"}') == 1


def test_a_killed_worker_comes_back_on_the_active_version(service: Service, root: Path) -> None:
    before, served = service.workers(), service.answered
    os.kill(min(before), signal.SIGKILL)
    wait_for(lambda: min(before) not in service.workers(), SECONDS)
    service.ask()  # by the other one, meanwhile
    wait_for(lambda: service.lines("a worker serves") == 3, SECONDS)
    assert len(service.workers()) == 2
    assert service.versions() == {version_of(root / "second")}
    assert service.lines("a worker cannot be started") == 1  # and is tried again
    assert service.metric("scaledown_worker_exits_total") == 2
    # What the dead one has counted is not lost.
    assert service.metric('scaledown_requests_total{route="/answer",status="200"}') == served + 1
    # The new worker has never had the version that is rolled back to: it loads it, and all change together.
    assert service.change("rollback").json()["active"] == version_of(root / "first")
    assert service.versions() == {version_of(root / "first")}


def test_sighup_follows_the_link_in_every_worker(service: Service, root: Path) -> None:
    (root / "next").symlink_to(root / "second")
    (root / "next").rename(root / "current")
    service.process.send_signal(signal.SIGHUP)
    wait_for(lambda: service.versions() == {version_of(root / "second")}, SECONDS)


def test_workers_are_replaced_though_their_metrics_were_cleaned_away(service: Service, root: Path) -> None:
    def replace(process: int) -> None:
        served = service.lines("a worker serves")
        os.kill(process, signal.SIGKILL)
        wait_for(lambda: service.lines("a worker serves") == served + 1, SECONDS)

    shutil.rmtree(service.metrics_folder())
    for process in service.workers():
        replace(process)
    assert service.versions() == {version_of(root / "second")}
    for worker in "01":
        assert service.metric(f'process_resident_memory_bytes{{worker="{worker}"}}') > 10_000_000


def test_sigterm_drains_all_workers_and_the_exit_code_is_0(service: Service) -> None:
    body = {**BODY, "max_new_tokens": 40}

    def ask() -> httpx.Response | None:
        try:
            return httpx.post(f"{service.url}/answer", json=body, timeout=60, trust_env=False)
        except httpx.TransportError:
            return None  # came when the socket was closed

    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask) for _ in range(12)]
        wait_for(lambda: service.metric("scaledown_requests_in_flight") > 0, SECONDS)
        service.process.send_signal(signal.SIGTERM)
        responses = [response for future in asked if (response := future.result())]
    assert service.process.wait(60) == 0
    assert {response.status_code for response in responses} <= {200, 503}
    assert any(response.status_code == 200 for response in responses)
    assert not service.lines("workers did not stop in time and are killed")
