"""Who is let in, and what those hear who are not."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from core.errors import OverloadedError
from core.model import Model
from core.pipeline import compress_rows
from service import lane as lane_module
from service.admission import MAX_RETRY_AFTER_S, Gate
from tests.service.calls import PASSAGES, QUERY, error
from tests.service.conftest import Serve
from tests.waiting import wait_until_empty


def test_requests_and_tokens_are_counted_and_given_back() -> None:
    gate = Gate(max_requests=2, max_tokens=100)
    first = gate.reserve(60)
    with pytest.raises(OverloadedError):
        gate.reserve(41)
    first.correct(20)
    second = gate.reserve(80)
    with pytest.raises(OverloadedError):
        gate.reserve(0)
    for reservation in (first, first, second):
        reservation.release()
    assert (gate.requests, gate.tokens) == (0, 0)
    first.correct(1000)
    assert gate.tokens == 0


def test_a_large_request_gets_into_an_empty_service() -> None:
    gate = Gate(max_requests=2, max_tokens=100)
    gate.reserve(1000).release()
    assert gate.tokens == 0


def test_retry_after_follows_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    gate = Gate(max_requests=10, max_tokens=100)
    assert gate.wait_for(50) == 1
    reservation = gate.reserve(100)
    now += 10  # ten tokens a second
    reservation.release()
    assert gate.wait_for(50) == pytest.approx(5)
    assert gate.wait_for(10**9) == MAX_RETRY_AFTER_S
    cancelled = gate.reserve(100)
    now += 10
    cancelled.release(served=False)
    assert gate.wait_for(50) > 5  # time passed and nothing was served


@pytest.mark.parametrize("status", [429, 503])
def test_a_full_service_refuses_and_says_when_to_come_back(
    serve: Serve, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(model: Model, rows: Any) -> Any:
        entered.set()
        assert release.wait(20)
        return compress_rows(model, rows)

    body = {"query": QUERY, "passages": PASSAGES}
    with serve(max_requests=1, overload_status=status) as client, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(lane_module, "compress_rows", slow)
        occupant = pool.submit(client.post, "/rerank", json=body)
        assert entered.wait(20)
        refused = client.post("/rerank", json=body)
        release.set()
        assert occupant.result(20).status_code == 200
        assert refused.status_code == status
        assert int(refused.headers["retry-after"]) >= 1
        assert error(refused)["code"] == "overloaded"
        wait_until_empty(client)
        assert client.post("/rerank", json=body).status_code == 200


def test_every_one_of_many_clients_gets_the_lone_answer(serve: Serve) -> None:
    """Small and large requests in all modes at once; the only other response is 429, after which a client retries."""
    bodies = [
        {"query": QUERY, "passages": PASSAGES * (1 + 3 * (i % 4 == 0)), "max_new_tokens": 4 + i % 3, "mode": mode}
        for i in range(8)
        for mode in ("compressed", "hybrid", "text")
    ]
    limits = httpx.Limits(max_connections=200)
    refusals = 0

    def ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
        nonlocal refusals
        for _ in range(200):
            response = client.post("/answer", json=body)
            if response.status_code == 200:
                return dict(response.json())
            assert response.status_code == 429, response.text
            assert int(response.headers["retry-after"]) >= 1
            refusals += 1
            time.sleep(0.5)
        raise AssertionError("never admitted")

    with serve(max_tokens_in_flight=8000) as client:
        alone = [client.post("/answer", json=body).json() for body in bodies]
        with (
            httpx.Client(base_url=client.base_url, timeout=60, trust_env=False, limits=limits) as many,
            ThreadPoolExecutor(len(bodies) * 3) as pool,
        ):
            answers = list(pool.map(lambda body: ask(many, body), bodies * 3))
        for got, expected in zip(answers, alone * 3, strict=True):
            assert got["answer"] == expected["answer"]
            assert got["usage"] == expected["usage"]
        assert refusals
        wait_until_empty(client)
