"""Clients of a service: closed loops, where each waits for its answer, and open ones, where arrivals do not wait.

Closed loops find the throughput; open loops show what callers wait at a rate that does not slow down with the service
(a closed loop hides that: its clients hold back while the service is slow). Knows HTTP only, no models.
"""

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from core.errors import ConfigError
from service.benchmark.statistics import percentiles
from service.listening import is_loopback

Body = dict[str, Any]
REQUEST_SECONDS = 600
KEEPALIVE_SECONDS = 2.0  # under the 5 after which the service closes an idle connection
RETRY_STATUS = (429, 503)
MAX_RETRY_SECONDS = 1.0  # of a closed loop: Retry-After is made for callers who are not measuring


@dataclass
class Outcome:
    """What the clients of one load saw; seconds. `errors` by code; `refused` is how often there was no room.

    cached   chunks that the service did not compress, as it or their document's pass was in a cache
    """

    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    completion_tokens: int = 0
    cached: int = 0
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        """Requests that ended without an answer, but for refusals."""
        return self.errors.total()


def require_loopback(url: str) -> None:
    """Raises ConfigError for a service that is not on this machine: a load is an attack on anyone else's."""
    if not is_loopback(urlsplit(url).hostname or ""):
        raise ConfigError("url: must be a service on this machine, such as http://127.0.0.1:8000")


async def closed_loop(
    connection: httpx.AsyncClient, bodies: Iterable[Body], clients: int, seconds: float = math.inf
) -> Outcome:
    """`clients` at a time; each sends its next request as soon as its last is answered, and again if refused.

    Ends after the last of `bodies`, which may be endless, or with the first answers after so many `seconds`.
    """
    outcome, waiting, began = Outcome(), iter(bodies), time.perf_counter()

    async def client() -> None:
        for body in waiting:  # shared: each body is taken by one client
            due = time.perf_counter()  # of the first attempt: to be refused is to wait
            while (retry_after := await _ask(connection, body, outcome, due)) is not None:
                await asyncio.sleep(min(retry_after, MAX_RETRY_SECONDS))
            if time.perf_counter() - began >= seconds:
                return

    await asyncio.gather(*(client() for _ in range(clients)))
    outcome.seconds = time.perf_counter() - began
    return outcome


async def open_loop(connection: httpx.AsyncClient, bodies: Sequence[Body], rate: float, seed: int = 0) -> Outcome:
    """Arrivals of a Poisson process, `rate` a second on average; a refused request is lost."""
    outcome, source, tasks = Outcome(), random.Random(seed), []
    began = time.perf_counter()
    arrival = began
    for body in bodies:
        await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
        # Waiting is counted from when the request was due: a client that comes late must not hide it.
        tasks.append(asyncio.create_task(_ask(connection, body, outcome, arrival)))
        arrival += source.expovariate(rate)
    await asyncio.gather(*tasks)
    outcome.seconds = time.perf_counter() - began
    return outcome


def connect(url: str, key: str = "") -> httpx.AsyncClient:
    """A client that opens as many connections as it needs, and takes nothing from the environment."""
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=REQUEST_SECONDS,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
        trust_env=False,
    )


async def _ask(connection: httpx.AsyncClient, body: Body, outcome: Outcome, due: float) -> float | None:
    """One request as a stream, noted in `outcome`; seconds after which to try again where it was refused.

    What it waited is counted from when it was `due`.
    """
    try:
        async with connection.stream("POST", "/answer", json={**body, "stream": True}) as response:
            if response.status_code in RETRY_STATUS:
                outcome.refused += 1
                return _seconds(response.headers.get("retry-after", ""))
            if response.status_code != 200:
                outcome.errors[f"status {response.status_code}"] += 1
                return None
            await _read(response, outcome, due)
    except httpx.HTTPError as error:
        outcome.errors[type(error).__name__] += 1
    return None


async def _read(response: httpx.Response, outcome: Outcome, due: float) -> None:
    """Follow the events of one answer."""
    name, first = "", None
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
            if name == "token" and first is None:
                first = time.perf_counter()
        elif line.startswith("data: ") and name in ("done", "error"):
            content, now = json.loads(line.removeprefix("data: ")), time.perf_counter()
            if name == "error":
                outcome.errors[content["error"]["code"]] += 1
                return
            outcome.latencies.append(now - due)
            outcome.first_tokens.append((first or now) - due)
            outcome.completion_tokens += content["usage"]["completion_tokens"]
            outcome.cached += content["usage"]["cached_chunks"] + content["usage"]["cached_documents"]
            return
    outcome.errors["stream cut"] += 1


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return MAX_RETRY_SECONDS


def summarise(label: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One load's entry of the JSON, over all of its repeats."""
    seconds = sum(outcome.seconds for outcome in outcomes)
    latencies = [value for outcome in outcomes for value in outcome.latencies]
    first_tokens = [value for outcome in outcomes for value in outcome.first_tokens]
    errors: Counter[str] = sum((outcome.errors for outcome in outcomes), Counter())
    return {
        "label": label,
        "answers": len(latencies),
        "seconds": seconds,
        "answers_per_s": len(latencies) / seconds,
        "tokens_per_s": sum(outcome.completion_tokens for outcome in outcomes) / seconds,
        "latency_s": asdict(percentiles(latencies)) if latencies else None,
        "first_token_s": asdict(percentiles(first_tokens)) if first_tokens else None,
        "refused": sum(outcome.refused for outcome in outcomes),
        "cached_chunks": sum(outcome.cached for outcome in outcomes),
        "failed": errors.total(),
        "errors": dict(errors),
        "throughput_over_direct": None,
    }
