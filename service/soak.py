"""`python -m service.soak`: keep a running service busy for a long time, and say whether it stays as it was.

Every client sends its next request as soon as it has the answer to the last one. What is reported: failures,
refusals, latency, and how the memory of the service went. What a request costs is `service.benchmark`'s.
"""

import argparse
import asyncio
import contextlib
import itertools
import re
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

from core.errors import ConfigError
from service.benchmark.load import Outcome, closed_loop, connect, require_loopback
from service.benchmark.statistics import percentiles
from service.settings import explain

TOPICS = ("tides", "bread", "radium", "glass", "whales", "coffee", "bridges", "printing", "copper", "tea")
SENTENCE = "The history of {topic} is long, and in the year {year} it was described by {count} travellers in detail."
SETTLING = 0.3  # share of the time in which caches fill and buffers find their size
SAMPLES = 120  # of memory, in all
MIN_SAMPLES = 10  # fewer say nothing about a trend


class Sample(NamedTuple):
    """Memory of the service's processes at one time: seconds from the start, bytes."""

    seconds: float
    bytes: int


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit status is 1 if a request failed other than by being refused, or memory grew too fast."""
    options = build_parser().parse_args(arguments)
    try:
        require_loopback(options.url)
    except ConfigError as error:
        print(explain(error), file=sys.stderr)
        return 2
    outcome, samples = asyncio.run(soak(options))
    show(outcome, options.clients)
    grows = show_memory(samples, options.max_growth)
    return 1 if outcome.failed or grows else 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m service.soak", description=__doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="a service on this machine (default: %(default)s)")
    add("--key", default="", help="API key, if the service asks for one")
    add("--clients", type=int, default=8, help="clients at one time (default: %(default)s)")
    add("--requests", type=int, default=64, help="different requests, taken in turn (default: %(default)s)")
    add("--seconds", type=float, default=600.0, help="how long (default: %(default)s); 0: every request once")
    add("--passages", type=int, default=5, help="passages in a request (default: %(default)s)")
    add("--sentences", type=int, default=8, help="sentences in a passage (default: %(default)s)")
    add("--mode", choices=("compressed", "hybrid", "text"), default="compressed")
    add("--max-new-tokens", type=int, default=16, help="tokens of an answer (default: %(default)s)")
    add(
        "--max-growth",
        type=float,
        default=60.0,
        help="MiB an hour the service's memory may grow, once it has settled (default: %(default)s)",
    )
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
    return {"query": query, "passages": passages, "mode": options.mode, "max_new_tokens": options.max_new_tokens}


async def soak(options: argparse.Namespace) -> tuple[Outcome, list[Sample]]:
    """Send all bodies, so many clients at a time; once, or again and again until the time is over."""
    bodies = [make_body(number, options) for number in range(options.requests)]
    samples: list[Sample] = []
    async with connect(options.url, options.key) as connection:
        watching = asyncio.create_task(watch_memory(connection, samples, options.seconds / SAMPLES))
        if options.seconds:
            outcome = await closed_loop(connection, itertools.cycle(bodies), options.clients, options.seconds)
        else:
            outcome = await closed_loop(connection, bodies, options.clients)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await note_memory(connection, samples, outcome.seconds)
    return outcome, samples


async def watch_memory(connection: httpx.AsyncClient, samples: list[Sample], interval: float) -> None:
    """Note the memory of the service every `interval` seconds, until cancelled."""
    began = time.perf_counter()
    while True:
        await note_memory(connection, samples, time.perf_counter() - began)
        await asyncio.sleep(max(0.5, interval))


async def note_memory(connection: httpx.AsyncClient, samples: list[Sample], seconds: float) -> None:
    """Memory of the service, of all its workers, from its metrics; nothing where its platform does not tell."""
    try:
        text = (await connection.get("/metrics")).text
    except httpx.HTTPError:
        return  # that the service fails is seen by those who ask it
    found = re.findall(r"^process_resident_memory_bytes(?:\{.*\})? (\S+)$", text, re.MULTILINE)
    if found:
        samples.append(Sample(seconds, int(sum(map(float, found)))))


def show(outcome: Outcome, clients: int) -> None:
    """Print what the clients saw."""
    served = len(outcome.latencies)
    print(f"{served} answers by {clients} clients in {outcome.seconds:.1f} s; ", end="")
    print(f"{outcome.refused} refused for a while, {outcome.failed} failed")
    if outcome.errors:
        print(f"errors: {dict(outcome.errors)}")
    if not served:
        return
    tokens = outcome.completion_tokens / outcome.seconds
    print(f"throughput           {served / outcome.seconds:8.2f} answers/s  {tokens:8.1f} tokens/s")
    for name, values in (("latency", outcome.latencies), ("time to first token", outcome.first_tokens)):
        waits = percentiles(values)
        p50, p95, p99 = (1000 * seconds for seconds in (waits.p50, waits.p95, waits.p99))
        print(f"{name:<20} p50 {p50:8.0f} ms  p95 {p95:8.0f} ms  p99 {p99:8.0f} ms")


def show_memory(samples: Sequence[Sample], max_growth: float) -> bool:
    """Print how memory went; whether it grew by more than `max_growth` MiB an hour, once it had settled."""
    if not samples:
        print("memory               the service's platform does not tell")
        return False
    settled = [sample for sample in samples if sample.seconds >= SETTLING * samples[-1].seconds]
    print(f"memory               {samples[0].bytes >> 20} MiB before, {samples[-1].bytes >> 20} MiB after", end="")
    if len(settled) < MIN_SAMPLES:
        print("; too short to say whether it grows")
        return False
    slope = statistics.linear_regression([s.seconds for s in settled], [s.bytes for s in settled]).slope
    growth = slope * 3600 / 2**20
    print(f"; {growth:+.1f} MiB an hour after the first {settled[0].seconds:.0f} s (limit {max_growth:g})")
    return growth > max_growth


if __name__ == "__main__":
    sys.exit(main())
