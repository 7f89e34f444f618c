"""Waiting for what a service does in its own time, and failing where it never does."""

import time
from collections.abc import Callable
from typing import Any

import httpx


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> None:
    """Until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def wait_until_empty(client: httpx.Client, seconds: float = 20) -> None:
    """Until no request holds a place, and no token is reserved."""
    wait_for(lambda: "scaledown_requests_in_flight 0.0" in client.get("/metrics").text, seconds)
    assert "scaledown_reserved_tokens 0.0" in client.get("/metrics").text
