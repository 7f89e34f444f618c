"""Between a call and httpx: the request that carries it, and what a broken connection means."""

import json
import math
from typing import Any

import httpx

from service.client.calls import Call, Keys
from service.client.errors import UnreachableError

# A little more than the service's default deadline, so that it is the service who says what took so long.
TIMEOUT_S = 130.0
MARGIN_S = 10.0


def address_of(base_url: str) -> str:
    """`base_url` without a slash at its end. Raises UnreachableError for what cannot be the address of a service."""
    try:
        url = httpx.URL(base_url)
        good = url.scheme in ("http", "https") and bool(url.host)
    except httpx.InvalidURL:
        good = False
    if not good:
        raise UnreachableError(f"{base_url!r} is no address of a service, such as http://127.0.0.1:8000", sent=False)
    return base_url.rstrip("/")


def request_of(http: httpx.Client | httpx.AsyncClient, base_url: str, keys: Keys, call: Call[Any]) -> httpx.Request:
    """The HTTP request of a call.

    What is no good JSON (NaN, half a surrogate pair) is sent all the same: the service says in which field it is.
    """
    headers = keys.headers(call)
    if call.body is None:
        return http.build_request(call.method, base_url + call.path, headers=headers)
    headers["Content-Type"] = "application/json"
    content = json.dumps(call.body)
    read = None if call.patient else _patience(http.timeout.read, call.body.get("timeout"))
    timeout = httpx.Timeout(connect=http.timeout.connect, read=read, write=http.timeout.write, pool=http.timeout.pool)
    return http.build_request(call.method, base_url + call.path, content=content, headers=headers, timeout=timeout)


def _patience(usual: float | None, deadline: object) -> float | None:
    """Seconds that an answer is waited for: the usual ones, or more where the service was given a later deadline."""
    if not isinstance(deadline, int | float) or usual is None or not usual < deadline + MARGIN_S < math.inf:
        return usual
    return deadline + MARGIN_S


def unreachable(error: httpx.TransportError) -> UnreachableError:
    """What a failure of the connection means. One that failed to connect has sent nothing."""
    sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    url = error.request.url
    service = f"the service at {url.scheme}://{url.netloc.decode()}"
    if isinstance(error, httpx.TimeoutException):
        return UnreachableError(f"{service} did not answer in time ({type(error).__name__})", sent=sent)
    return UnreachableError(f"{service} cannot be reached: {error}", sent=sent)
