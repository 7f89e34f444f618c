"""Between a call and httpx: the request that carries it, and what a broken connection means."""

from typing import Any

import httpx

from service.client.calls import Call, Keys
from service.client.errors import UnreachableError

# A little more than the service's default deadline, so that it is the service who says what took so long.
TIMEOUT_S = 130.0


def request_of(http: httpx.Client | httpx.AsyncClient, base_url: str, keys: Keys, call: Call[Any]) -> httpx.Request:
    """The HTTP request of a call."""
    return http.build_request(call.method, base_url + call.path, json=call.body, headers=keys.headers(call))


def unreachable(error: httpx.TransportError) -> UnreachableError:
    """What a failure of the connection means. One that failed to connect has sent nothing."""
    sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    url = error.request.url
    service = f"the service at {url.scheme}://{url.netloc.decode()}"
    if isinstance(error, httpx.TimeoutException):
        return UnreachableError(f"{service} did not answer in time ({type(error).__name__})", sent=sent)
    return UnreachableError(f"{service} cannot be reached: {error}", sent=sent)
