"""A process under load and attack, over real sockets: 200 clients, some that leave, slow and huge bodies, no worker."""

import asyncio
import contextlib
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.test_process import BODY, root, running
from tests.waiting import wait_until_empty

__all__ = ["root"]  # a fixture
CLIENTS = 200
HEAD = b"POST /answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
# The service, and a signal that ends its worker's thread: no request can do that.
MORTAL = """
import ctypes, signal, sys, threading
from service.__main__ import main

def kill_worker(*_):
    worker = next(thread for thread in threading.enumerate() if thread.name == "worker")
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit))

signal.signal(signal.SIGUSR1, kill_worker)
sys.exit(main([]))
"""


@pytest.fixture(scope="module")
def service(root: Path) -> Iterator[httpx.Client]:
    """One process for all that it has to survive; small limits, so that they are reached."""
    limits = {"max_requests": "48", "max_body_bytes": "100000", "body_seconds": "6", "max_buffered_bytes": "10000000"}
    with running(root / "first", **limits) as (process, client, _):
        yield client
        assert process.poll() is None


def bodies() -> list[dict[str, Any]]:
    """Small and large, in all modes."""
    passages = BODY["passages"]
    sizes = (passages[:1], passages, passages * 4, passages * 12)
    return [
        {**BODY, "passages": size, "mode": mode, "max_new_tokens": 3 + count}
        for count, size in enumerate(sizes)
        for mode in ("compressed", "hybrid", "text")
    ]


def essence(answer: dict[str, Any]) -> tuple[Any, ...]:
    """What may not depend on who else asks."""
    usage = {name: count for name, count in answer["usage"].items() if not name.startswith("cached_")}
    return answer["answer"], answer["finish_reason"], usage, [each["mode"] for each in answer["passages"]]


def test_each_of_200_clients_gets_the_lone_answer_and_no_error_but_429(service: httpx.Client) -> None:
    different = bodies()
    alone = [essence(service.post("/answer", json=body).json()) for body in different]
    seen: Counter[int] = Counter()

    async def ask(connection: httpx.AsyncClient, number: int) -> tuple[Any, ...]:
        while True:
            response = await connection.post("/answer", json=different[number % len(different)])
            seen[response.status_code] += 1
            if response.status_code == 200:
                return essence(response.json())
            assert response.status_code == 429, response.text
            await asyncio.sleep(min(2.0, float(response.headers["retry-after"])))

    async def all_at_once() -> list[tuple[Any, ...]]:
        limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(
            base_url=service.base_url, timeout=120, trust_env=False, limits=limits
        ) as connection:
            return await asyncio.gather(*(ask(connection, number) for number in range(CLIENTS)))

    answers = asyncio.run(all_at_once())
    wrong = {number % len(alone) for number, answer in enumerate(answers) if answer != alone[number % len(alone)]}
    assert [(alone[number], answers[number]) for number in sorted(wrong)] == []
    assert seen[200] == CLIENTS
    assert seen[429] > 0
    wait_until_empty(service)


def test_clients_that_leave_free_their_places(service: httpx.Client) -> None:
    for _ in range(2):  # more of them than there are places
        connections = [connect(service) for _ in range(40)]
        for number, connection in enumerate(connections):
            request = service.build_request(
                "POST", "/answer", json={**BODY, "max_new_tokens": 500, "stream": number % 2 == 0}
            )
            head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
            connection.sendall(f"POST /answer HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        connections[0].recv(1)
        for connection in connections:
            connection.close()
    wait_until_empty(service)
    assert service.post("/answer", json=BODY).status_code == 200


def test_slow_and_oversized_bodies_hold_nobody_up(service: httpx.Client) -> None:
    expected = essence(service.post("/answer", json=BODY).json())
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(service)) for _ in range(60)]
        for connection in slow[:30]:
            connection.sendall(HEAD + b"Content-Length: 90000\r\n\r\n{")  # and no more
        for connection in slow[30:]:
            connection.sendall(b"POST /answer HTTP/1.1\r\nX-Slow: ")
        huge = stack.enter_context(connect(service))
        huge.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n")
        assert huge.recv(4096).startswith(b"HTTP/1.1 413 ")
        endless = stack.enter_context(connect(service))
        endless.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
        with contextlib.suppress(ConnectionError):  # closed while more arrives
            for _ in range(50):
                endless.sendall(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert endless.recv(4096).startswith(b"HTTP/1.1 413 ")
        assert essence(service.post("/answer", json=BODY).json()) == expected
        for connection in slow[:30]:
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert essence(service.post("/answer", json=BODY).json()) == expected
    wait_until_empty(service)


def test_a_dead_worker_ends_the_process_within_seconds(root: Path) -> None:
    with running(root / "first", command=("-c", MORTAL)) as (process, client, log):
        with client.stream("POST", "/answer", json={**BODY, "max_new_tokens": 500, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGUSR1)
            began = time.monotonic()
            text = "\n".join(lines)
        assert "event: error" in text
        assert process.wait(timeout=10) == 70
        assert time.monotonic() - began < 10
    assert any("the worker thread dies" in line for line in log)


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=20)
