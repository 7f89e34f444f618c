"""The way to one service: its address and keys, given or from the environment. Opens clients that last for one use.

An adapter may live for ever, in many threads and event loops at once: it keeps a `Connection` and no sockets.
"""

import os
import ssl
from dataclasses import dataclass, field
from functools import cache

import httpx

from service.client.asynchronous import AsyncClient
from service.client.blocking import Client
from service.client.transport import TIMEOUT_S

DEFAULT_URL = "http://127.0.0.1:8000"
URL, API_KEY, ADMIN_KEY = "SCALEDOWN_URL", "SCALEDOWN_API_KEY", "SCALEDOWN_ADMIN_KEY"


@dataclass(frozen=True)
class Connection:
    """Where the service is. What is not given is read from the environment when a client is opened.

    url        SCALEDOWN_URL, or else port 8000 of this machine
    api_key    SCALEDOWN_API_KEY, or else none
    admin_key  SCALEDOWN_ADMIN_KEY, or else none
    timeout    seconds of silence after which a request is given up, unless its deadline is later
    """

    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    timeout: float = TIMEOUT_S

    @property
    def address(self) -> str:
        """The URL that clients are opened with."""
        return self.url or os.environ.get(URL) or DEFAULT_URL

    def client(self) -> Client:
        """A client to use in a `with`."""
        return Client(
            self.address,
            api_key=self.api_key or os.environ.get(API_KEY) or None,
            admin_key=self.admin_key or os.environ.get(ADMIN_KEY) or None,
            http=httpx.Client(timeout=self.timeout, verify=_certificates()),
        )

    def async_client(self) -> AsyncClient:
        """A client to use in an `async with`."""
        return AsyncClient(
            self.address,
            api_key=self.api_key or os.environ.get(API_KEY) or None,
            admin_key=self.admin_key or os.environ.get(ADMIN_KEY) or None,
            http=httpx.AsyncClient(timeout=self.timeout, verify=_certificates()),
        )


@cache  # reading the certificates takes longer than opening a connection
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()
