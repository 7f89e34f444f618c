"""The service as operators run it: a process of its own, real sockets, real signals."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig
from core.model import build_model
from service import demo
from service.versions import version_of
from tests.free_port import free_port
from tests.waiting import wait_for

BODY: dict[str, Any] = {
    "query": "Who discovered polonium?",
    "passages": ["Marie Curie discovered polonium and radium. " * 5, "Bread is made of flour and water."],
    "max_new_tokens": 40,
}


# The service, which gets SIGHUP before it has loaded its model.
HUNG_UP = """
import os, signal, sys
from service import __main__ as command
serve = command.serve
def serve_after_signal(*values):
    os.kill(os.getpid(), signal.SIGHUP)
    serve(*values)
command.serve = serve_after_signal
sys.exit(command.main([]))
"""
# The service with a model that takes long to load.
LARGE = """
import sys, time
from service import versions
from service.__main__ import main
def load(*_):
    print("loading", file=sys.stderr, flush=True)
    time.sleep(600)
versions.load_to_serve = load
sys.exit(main([]))
"""
# The service with a step of the worker that goes on, in and out of torch, for longer than anybody waits.
BUSY = """
import sys, time, torch
from service.__main__ import main
from service.lane import Lane
def advance(lane):
    print("a step", file=sys.stderr, flush=True)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        torch.ones(32, 32) @ torch.ones(32, 32)
Lane.advance = advance
sys.exit(main([]))
"""
# The service, for which another checkpoint than the first takes long to load.
LARGE_SWAP = """
import sys, time
from service import versions
from service.__main__ import main
load = versions.load_to_serve
def load_slowly(settings, folder):
    if folder.name == "second":
        print("loading", file=sys.stderr, flush=True)
        time.sleep(600)
    return load(settings, folder)
versions.load_to_serve = load_slowly
sys.exit(main([]))
"""
# The service with few files that it may have open.
FEW_FILES = """
import resource, sys
from service.__main__ import main
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
sys.exit(main([]))
"""
# The service on a machine whose kernel kills a worker for its memory.
KILLED = """
import asyncio, sys
from service.__main__ import main
start = asyncio.create_subprocess_exec
async def start_killed(*_, **options):
    return await start("sh", "-c", "kill -9 $$", **options)
asyncio.create_subprocess_exec = start_killed
sys.exit(main([]))
"""


@pytest.fixture(scope="module")
def root(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    config = Config(
        compressor=CompressorConfig(n_layers=1, chunk_tokens=64), generator=GeneratorConfig(base_model=str(tiny_llama))
    )
    for seed, name in enumerate(("first", "second")):
        save_checkpoint(build_model(config, seed=seed), folder / name)
    return folder


@contextlib.contextmanager
def running(
    checkpoint: Path, *, command: Sequence[str] = ("-m", "service"), **values: str
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client, list[str]]]:
    """A process that serves `checkpoint`, a client of it, and its log so far. `values` are settings."""
    port = free_port()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SCALEDOWN_")}
    own = {f"SCALEDOWN_{name.upper()}": value for name, value in {"dtype": "float32", **values}.items()}
    environment = {**inherited, **own, "SCALEDOWN_CHECKPOINT": str(checkpoint), "SCALEDOWN_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, *command], env=environment, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            end = time.monotonic() + 180
            while True:
                assert process.poll() is None, "".join(log)
                assert time.monotonic() < end, "".join(log)
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/readyz").status_code == 200:
                        break
                time.sleep(0.1)
            yield process, client, log
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        if process.stderr:
            process.stderr.close()


def test_swap_and_shutdown_under_load_lose_nothing_that_was_admitted(root: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(root / "first")
    with running(link) as (process, client, log):
        answers = {version_of(root / "first"): client.post("/answer", json=BODY).json()["answer"]}
        link.unlink()
        link.symlink_to(root / "second")
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while client.get("/readyz").json()["checkpoint"] != version_of(root / "second"):
            assert time.monotonic() < end
            time.sleep(0.05)
        answers[version_of(root / "second")] = client.post("/answer", json=BODY).json()["answer"]

        with ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(_ask, f"{client.base_url}/answer") for _ in range(24)]
            while "scaledown_requests_in_flight 0.0" in client.get("/metrics").text:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            responses = [response for future in asked if (response := future.result())]
        assert process.wait(timeout=30) == 0
    for response in responses:
        if response.status_code == 200:
            assert response.json()["answer"] == answers[response.json()["checkpoint"]]
        else:
            assert response.json()["error"]["code"] == "stopping"
    # Every request that reached the service got, at its client, the status that the service logged for it.
    lines = [json.loads(line) for line in log]
    logged = Counter(line["status"] for line in lines if line.get("route") == "/answer")
    assert logged == Counter(response.status_code for response in responses) + Counter({200: 2})
    assert logged[200] > 2


def _ask(url: str) -> httpx.Response | None:
    """The response on a connection of its own, or None where the closed socket never took the request."""
    try:
        return httpx.post(url, json=BODY, timeout=30, trust_env=False)
    except httpx.TransportError:
        return None


def test_sigterm_ends_what_cannot_finish_with_a_clear_error(root: Path) -> None:
    with running(root / "first", drain_seconds="0.2") as (process, client, _):
        with client.stream("POST", "/answer", json={**BODY, "max_new_tokens": 512, "stream": True}) as response:
            chunks = response.iter_text()
            next(chunks)
            process.send_signal(signal.SIGTERM)
            text = "".join(chunks)
        assert process.wait(timeout=30) == 0
    # A fast machine may have finished the answer within the limit.
    assert re.search(r'event: (error\ndata: .*"code": "stopping"|done)', text)


def test_a_step_that_outlasts_the_drain_is_left_and_the_exit_status_is_0(root: Path) -> None:
    """Python cannot end while a thread runs in torch: the process would be aborted, and count as failed."""
    with running(root / "first", command=("-c", BUSY), drain_seconds="0.2") as (process, client, log):
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(_ask, f"{client.base_url}/answer")
            wait_for(lambda: "a step\n" in log)
            process.send_signal(signal.SIGTERM)
            response = asked.result()
        assert process.wait(60) == 0, "".join(log)
    assert response is not None
    assert response.json()["error"]["code"] == "stopping"
    assert "terminate called" not in "".join(log)


def test_a_checkpoint_that_is_being_loaded_does_not_hold_up_the_end(root: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(root / "first")
    with running(link, command=("-c", LARGE_SWAP)) as (process, client, log):
        link.unlink()
        link.symlink_to(root / "second")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "loading\n" in log)
        assert client.post("/answer", json=BODY).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_process_without_a_free_file_says_so_now_and_then_and_recovers(root: Path) -> None:
    with running(root / "first", command=("-c", FEW_FILES)) as (_, client, log):
        address = (client.base_url.host, client.base_url.port)
        with contextlib.ExitStack() as opened:
            for connection in [socket.create_connection(address) for _ in range(150)]:
                opened.enter_context(connection)
            wait_for(lambda: any("out of system resource" in line for line in log), 20)
            time.sleep(2)
            assert sum("out of system resource" in line for line in log) < 10
        assert client.get("/livez").status_code == 200


def test_a_terminal_that_closes_during_the_start_ends_nothing(root: Path) -> None:
    with running(root / "first", command=("-c", HUNG_UP)) as (process, client, _):
        assert client.get("/readyz").json()["checkpoint"] == version_of(root / "first")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_during_the_load_ends_the_process_at_once(root: Path, number: signal.Signals, status: int) -> None:
    environment = {**os.environ, "SCALEDOWN_CHECKPOINT": str(root / "first"), "SCALEDOWN_PORT": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", LARGE], env=environment, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stderr is not None
    try:
        assert any(line == "loading\n" for line in process.stderr)
        process.send_signal(number)
        assert process.wait(30) == status
        assert f'"signal": "{number.name}"' in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_demo_shows_all_modes_and_stops(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCALEDOWN_CHECKPOINT", str(root / "first"))
    assert demo.main() == 0
    shown = capsys.readouterr().out
    for text in ("It is untrained", "--- text ---", "--- hybrid, rate", "--- compressed, rate", "saved", "exit code 0"):
        assert text in shown


def refused(*flags: str, command: Sequence[str] = ("-m", "service"), **values: str) -> tuple[int, list[str]]:
    """The exit status of a service that cannot start, and its log but for news and what libraries warn of."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SCALEDOWN_")}
    environment = inherited | {f"SCALEDOWN_{name.upper()}": value for name, value in values.items()}
    result = subprocess.run(
        [sys.executable, *command, *flags], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    lines = result.stderr.splitlines()
    passing = ('"level": "info"', '"level": "warning"')
    return result.returncode, [line for line in lines if not any(level in line for level in passing)]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_broken_checkpoint_ends_the_start_with_the_reason(tmp_path: Path, workers: str) -> None:
    (tmp_path / "empty").mkdir()
    status, lines = refused("--checkpoint", str(tmp_path / "empty"), "--port", "0", "--workers", workers)
    assert status == 3
    assert 1 <= len(lines) <= int(workers), lines  # each worker for itself
    for line in lines:
        assert json.loads(line)["message"] == "the service cannot start"
        assert "manifest.json is missing" in json.loads(line)["reason"]


def test_a_device_that_is_not_there_ends_the_start_as_a_wrong_setting(root: Path) -> None:
    status, [line] = refused("--device", "cuda:99", checkpoint=str(root / "first"), port="0")
    assert status == 2
    assert json.loads(line)["reason"].startswith("device: cuda:99 is asked for")


def test_metrics_that_cannot_be_kept_end_the_start_with_the_reason(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "file"))
    status, [line] = refused(checkpoint=str(root / "first"), port="0", workers="2")
    assert status == 2
    assert json.loads(line)["reason"].startswith("PROMETHEUS_MULTIPROC_DIR: the metrics of the workers cannot be kept")


def test_workers_that_are_killed_at_the_start_end_it_with_the_status_of_a_process_that_was(root: Path) -> None:
    status, lines = refused(command=("-c", KILLED), checkpoint=str(root / "first"), port="0", workers="2")
    assert status == 137  # which docs/operate.md names: the memory limit
    assert json.loads(lines[0])["message"] == "no worker can start"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_in_use_is_said_before_the_model_is_loaded(root: Path, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, lines = refused(command=("-c", LARGE), checkpoint=str(root / "first"), port=str(port), workers=workers)
    assert status == 3
    assert "loading" not in lines
    (line,) = [line for line in lines if line.startswith("{")]  # before it, libraries may write as they like
    assert json.loads(line)["reason"] == (
        f"port: {port} is in use on 127.0.0.1: stop what listens there or give --port"
    )
