"""`python -m service.soak`: keep a running service busy for a long time, and say whether it stays as it was.

Every client sends its next request as soon as it has the answer to the last one. What is reported: failures,
refusals, latency, and the memory of the service before and after. What a request costs is `service.benchmark`'s.
"""

import argparse
import asyncio
import itertools
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

TOPICS = ("tides", "bread", "radium", "glass", "whales", "coffee", "bridges", "printing", "copper", "tea")
SENTENCE = "The history of {topic} is long, and in the year {year} it was described by {count} travellers in detail."


@dataclass
class Outcome:
    """What the clients saw; times in seconds."""

    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    completion_tokens: int = 0
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit status is 1 if any request failed other than by being refused."""
    options = build_parser().parse_args(arguments)
    bodies = [make_body(number, options) for number in range(options.requests)]
    before = resident_bytes(options.url)
    outcome = asyncio.run(run_load(options, bodies))
    show(outcome, options.clients)
    print(f"memory of the service {before >> 20} MiB before, {resident_bytes(options.url) >> 20} MiB after")
    return 1 if outcome.failed else 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m service.soak", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service is (default: %(default)s)")
    parser.add_argument("--key", default="", help="API key, if the service asks for one")
    parser.add_argument("--clients", type=int, default=8, help="clients at one time (default: %(default)s)")
    parser.add_argument(
        "--requests", type=int, default=64, help="different requests, taken in turn (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="how long (default: %(default)s); 0: every request once"
    )
    parser.add_argument("--passages", type=int, default=5, help="passages in a request (default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=8, help="sentences in a passage (default: %(default)s)")
    parser.add_argument("--mode", choices=("compressed", "hybrid", "text"), default="compressed")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="tokens of an answer (default: %(default)s)")
    return parser


def make_body(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """The body of one request; no two are equal."""
    passages = [
        " ".join(
            SENTENCE.format(topic=TOPICS[(number + i) % len(TOPICS)], year=1500 + number + s, count=2 + i + s)
            for s in range(options.sentences)
        )
        for i in range(options.passages)
    ]
    query = f"Who described {TOPICS[number % len(TOPICS)]} in {1500 + number}?"
    values = {"mode": options.mode, "max_new_tokens": options.max_new_tokens, "stream": True}
    return {"query": query, "passages": passages, **values}


async def run_load(options: argparse.Namespace, bodies: list[dict[str, Any]]) -> Outcome:
    """Send all bodies, so many clients at a time; once, or again and again until the time is over."""
    outcome, end = Outcome(), time.perf_counter() + options.seconds
    waiting = iter(bodies) if not options.seconds else itertools.cycle(bodies)
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    limits = httpx.Limits(max_connections=options.clients)
    async with httpx.AsyncClient(
        base_url=options.url, headers=headers, timeout=600, limits=limits, trust_env=False
    ) as connection:

        async def client() -> None:
            for body in waiting:
                await ask(connection, body, outcome)
                if options.seconds and time.perf_counter() > end:
                    return

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(options.clients)))
        outcome.seconds = time.perf_counter() - began
    return outcome


def resident_bytes(url: str) -> int:
    """Memory of the service's process, from its metrics; 0 where the platform does not tell."""
    text = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text
    found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    return int(float(found[1])) if found else 0


async def ask(connection: httpx.AsyncClient, body: dict[str, Any], outcome: Outcome) -> None:
    """One request as a stream, until it is answered; a refusal is counted and tried again."""
    while True:
        began, first = time.perf_counter(), None
        async with connection.stream("POST", "/answer", json=body) as response:
            if response.status_code in (429, 503):
                outcome.refused += 1
                await asyncio.sleep(min(1.0, float(response.headers.get("retry-after", 1))))
                continue
            done = None
            name = ""
            async for line in response.aiter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                    first = first or (time.perf_counter() if name == "token" else None)
                elif line.startswith("data: ") and name == "done":
                    done = json.loads(line.removeprefix("data: "))
        ended = time.perf_counter()
        if done is None:
            outcome.failed += 1
            return
        outcome.latencies.append(ended - began)
        outcome.first_tokens.append((first or ended) - began)
        outcome.completion_tokens += done["usage"]["completion_tokens"]
        return


def show(outcome: Outcome, clients: int) -> None:
    """Print what the clients saw."""
    served = len(outcome.latencies)
    print(f"{served} answers by {clients} clients in {outcome.seconds:.1f} s; ", end="")
    print(f"{outcome.refused} refused for a while, {outcome.failed} failed")
    if served < 2:
        return
    tokens = outcome.completion_tokens / outcome.seconds
    print(f"throughput           {served / outcome.seconds:8.2f} answers/s  {tokens:8.1f} tokens/s")
    for name, values in (("latency", outcome.latencies), ("time to first token", outcome.first_tokens)):
        points = statistics.quantiles(values, n=100, method="inclusive")
        p50, p95, p99 = (1000 * points[percent - 1] for percent in (50, 95, 99))
        print(f"{name:<20} p50 {p50:8.0f} ms  p95 {p95:8.0f} ms  p99 {p99:8.0f} ms")


if __name__ == "__main__":
    sys.exit(main())
