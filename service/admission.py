"""Who is let in: tokens are reserved before any work, and a refusal says when to come back. Knows no HTTP."""

import time
from dataclasses import dataclass

from core.errors import OverloadedError

# Characters of a token, on the low side: English has 4 to 5, and the reservation is corrected after tokenising.
CHARS_PER_TOKEN = 3
MAX_RETRY_AFTER_S = 120.0


@dataclass(eq=False)
class Reservation:
    """A place in the service. `release` is idempotent and belongs in a `finally`."""

    gate: "Gate"
    tokens: int
    released: bool = False

    def correct(self, tokens: int) -> None:
        """Replace the estimate by what tokenising found."""
        if not self.released:
            self.gate.tokens += tokens - self.tokens
            self.tokens = tokens

    def release(self, *, served: bool = True) -> None:
        """Give the place back; what was `served` counts towards the measured rate."""
        if not self.released:
            self.released = True
            self.gate.leave(self, served)


class Gate:
    """Counts requests and tokens in the service against their limits. Used from the event loop only.

    The rate is measured as tokens released per busy second, smoothed over about a minute.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.requests = 0
        self.tokens = 0
        self._busy_since = 0.0
        self._served_tokens = 0.0
        self._busy_seconds = 0.0

    def reserve(self, tokens: int) -> Reservation:
        """Take a place or raise OverloadedError. A request that finds the service empty is always let in."""
        if self.requests and (self.requests >= self.max_requests or self.tokens + tokens > self.max_tokens):
            excess = max(1, self.tokens + tokens - self.max_tokens)
            raise OverloadedError("the service is full: try again later", self.wait_for(excess))
        if not self.requests:
            self._busy_since = time.monotonic()
        self.requests += 1
        self.tokens += tokens
        return Reservation(self, tokens)

    def wait_for(self, tokens: int) -> float:
        """Seconds until `tokens` are likely to be free: by the measured rate, or 1 before anything was measured."""
        rate = self._served_tokens / self._busy_seconds if self._busy_seconds else 0.0
        return min(MAX_RETRY_AFTER_S, max(1.0, tokens / rate)) if rate else 1.0

    def leave(self, reservation: Reservation, served: bool) -> None:
        """Called by `Reservation.release`."""
        self.requests -= 1
        self.tokens -= reservation.tokens
        now = time.monotonic()
        elapsed, self._busy_since = now - self._busy_since, now
        # Older measurements fade with the busy time that passes.
        keep = 0.5 ** (elapsed / 30)
        self._busy_seconds = self._busy_seconds * keep + elapsed
        self._served_tokens = self._served_tokens * keep + (reservation.tokens if served else 0)
