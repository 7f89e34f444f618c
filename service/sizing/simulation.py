"""The service's batching as a discrete-event simulation: the loop of `service.worker` on costs instead of models.

A replica takes turns, as the worker's thread does: one compression batch from the real `FairQueue`, one group of
prompts under the prefill budget and the slots, one token for every running answer. Replicas get their arrivals at
random and do not see each other, as behind a Kubernetes service, so each is simulated by itself.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from core.config import Mode
from service.batching import FairQueue
from service.settings import Settings
from service.sizing.costs import Costs, Sizes


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings that shape batches; see `service.settings`."""

    batch_tokens: int
    prefill_tokens: int
    max_sequences: int
    kv_tokens: int
    wait_s: float

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """Those of a service."""
        return cls(
            settings.batch_tokens,
            settings.prefill_tokens,
            settings.max_sequences,
            settings.kv_tokens,
            settings.batch_wait_ms / 1000,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of request. `ranked`: its passages pass the compressor, as the service does it in every mode."""

    sizes: Sizes
    mode: Mode
    ranked: bool = True


@dataclass(eq=False, slots=True)
class Request:
    """A simulated request; times in seconds. `client` sends the next one when this is answered, in a closed loop."""

    arrival: float
    client: int | None = None
    rows: int = 0
    written: int = 0
    first_token: float = math.nan


@dataclass(slots=True)
class Simulated:
    """What happened: seconds of each finished request, but for those of the warm-up, and how replicas spent their time.

    warm_up  finished requests of the warm-up
    """

    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    seconds: float = 0.0
    busy: float = 0.0
    warm_up: int = 0

    @property
    def answers_per_s(self) -> float:
        """Of all that was simulated."""
        return (len(self.latencies) + self.warm_up) / self.seconds if self.seconds else 0.0


class Replica:
    """One process with its worker; `costs` say how long each turn takes."""

    def __init__(self, costs: Costs, traffic: Traffic, limits: Limits) -> None:
        self._costs = costs
        self._limits = limits
        self._sizes = traffic.sizes
        self._prompt = costs.prompt_tokens(traffic.sizes, traffic.mode)
        self._rows = traffic.sizes.passages * costs.chunks(traffic.sizes) if traffic.ranked else 0
        self._row_tokens = costs.row_tokens(traffic.sizes)
        self._queue: FairQueue[Request, None] = FairQueue()
        self._ready: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def idle(self) -> bool:
        """Whether no request is here."""
        return not (self._ready or self._running or len(self._queue))

    def add(self, request: Request) -> None:
        """Take in a request that has arrived."""
        request.rows = self._rows
        if not self._rows:
            self._ready.append(request)
        self._queue.add(request, [None] * self._rows, [self._row_tokens] * self._rows)

    def turn(self, now: float) -> tuple[float, list[Request]]:
        """One turn of the worker: when it ends, and the requests that are answered then."""
        now += self._compress() + self._join()
        return self._step(now)

    def _compress(self) -> float:
        batch = self._queue.take(self._limits.batch_tokens)
        for picked in batch:
            picked.job.rows -= 1
            if not picked.job.rows:
                self._ready.append(picked.job)
        return self._costs.compress_s(sum(picked.length for picked in batch))

    def _join(self) -> float:
        """Prompts that fit the slots and the budgets are read; their first token needs no step of its own."""
        room, joining = self._prompt + self._sizes.new_tokens, 0
        while self._ready:
            running = len(self._running)
            fits = running < self._limits.max_sequences and (running + 1) * room <= self._limits.kv_tokens
            if (running and not fits) or (joining and (joining + 1) * self._prompt > self._limits.prefill_tokens):
                break
            joining += 1
            self._running.append(self._ready.popleft())
        return self._costs.prefill_s([self._prompt] * joining)

    def _step(self, now: float) -> tuple[float, list[Request]]:
        decoding = [request.written for request in self._running if request.written]
        now += self._costs.step_s(len(decoding), sum(decoding) + self._prompt * len(decoding))
        done = []
        for request in self._running:
            request.written += 1
            if request.written == 1:
                request.first_token = now
            if request.written >= self._sizes.new_tokens:
                done.append(request)
        if done:
            self._running = [request for request in self._running if request.written < self._sizes.new_tokens]
        return now, done


def simulate_open(
    costs: Costs,
    traffic: Traffic,
    limits: Limits,
    rate: float,
    replicas: int,
    seconds: float,
    seed: int = 0,
    most: int = 64,
    warm_up_s: float = 0.0,
) -> Simulated:
    """Poisson arrivals, `rate` a second over all `replicas`, for so many seconds; then what is there is finished.

    Replicas that get their arrivals at random are alike and independent, so at most `most` of them are simulated. They
    begin empty, which flatters those who come first: arrivals before `warm_up_s` are among no latencies.
    """
    total = Simulated()
    for number in range(min(replicas, most)):
        source = random.Random(f"{seed}/{number}")
        arrivals = _arrivals(source, rate / replicas, seconds)
        replica = Replica(costs, traffic, limits)
        _run(replica, costs.prepare_s(traffic.sizes), arrivals, limits.wait_s, 0, total, warm_up_s)
    return total


def simulate_closed(costs: Costs, traffic: Traffic, limits: Limits, clients: int, requests: int) -> Simulated:
    """`clients` at one replica, each sending its next request as soon as its last is answered; `requests` in all."""
    total, first = Simulated(), min(clients, requests)
    arrivals = iter([Request(0.0, client) for client in range(first)])
    _run(
        Replica(costs, traffic, limits),
        costs.prepare_s(traffic.sizes),
        arrivals,
        limits.wait_s,
        requests - first,
        total,
    )
    return total


def _arrivals(source: random.Random, rate: float, seconds: float) -> Iterator[Request]:
    now = source.expovariate(rate)
    while now < seconds:
        yield Request(now)
        now += source.expovariate(rate)


def _run(
    replica: Replica,
    prepare_s: float,
    arrivals: Iterator[Request],
    wait_s: float,
    more: int,
    total: Simulated,
    warm_up_s: float = 0.0,
) -> None:
    """Run one replica until nothing is left; adds to `total`. `more` requests follow answers, by the same clients."""
    number = 0
    pending: list[tuple[float, int, Request]] = []  # when a request is prepared and can be compressed

    def push(request: Request) -> None:
        nonlocal number
        number += 1
        heapq.heappush(pending, (request.arrival + prepare_s, number, request))

    coming = next(arrivals, None)
    now = busy = 0.0
    while True:
        while coming is not None and (coming.arrival <= now or not pending):
            push(coming)
            coming = next(arrivals, None)
        while pending and pending[0][0] <= now:
            replica.add(heapq.heappop(pending)[2])
        if replica.idle:
            if not pending:
                break
            now = pending[0][0] + wait_s  # it sleeps until the next one, and waits a moment for company
            continue
        end, done = replica.turn(now)
        busy, now = busy + end - now, end
        for request in done:
            if request.arrival < warm_up_s:
                total.warm_up += 1
            else:
                total.latencies.append(now - request.arrival)
                total.first_tokens.append(request.first_token - request.arrival)
            if request.client is not None and more:
                more -= 1
                push(Request(now, request.client))
    total.seconds += now
    total.busy += busy
