"""Chats with an OpenAI-compatible endpoint: many at once, patient with a busy server. Does not know what is asked."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from core.errors import ScaledownError

Message = dict[str, str]
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
MAX_WAIT_S = 30.0


class EndpointError(ScaledownError):
    """The endpoint refuses, keeps failing after every retry, or does not answer in the documented form."""

    code = "endpoint"


@dataclass(frozen=True, slots=True)
class ChatEndpoint:
    """Where the model is. `url` ends before `/chat/completions` (".../v1"); `api_key` may be empty.

    concurrency     requests in flight at once
    tries           how often one request is sent before the endpoint is given up
    timeout_s       seconds one request may take
    """

    url: str
    model: str
    api_key: str = ""
    concurrency: int = 8
    tries: int = 6
    timeout_s: float = 120.0


def complete_chats(
    endpoint: ChatEndpoint,
    chats: Sequence[Sequence[Message]],
    max_tokens: int,
    *,
    transport: httpx.BaseTransport | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """The greedy reply to each chat, in order. Raises EndpointError. `transport` and `sleep` are replaced in tests."""
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}

    def ask(chat: Sequence[Message]) -> str:
        body = {"model": endpoint.model, "messages": list(chat), "temperature": 0, "max_tokens": max_tokens}
        return _ask(client, endpoint, body, sleep)

    with (
        httpx.Client(headers=headers, timeout=endpoint.timeout_s, transport=transport) as client,
        ThreadPoolExecutor(endpoint.concurrency) as pool,
    ):
        replies = [pool.submit(ask, chat) for chat in chats]
        try:
            return [reply.result() for reply in replies]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # nothing more is sent to an endpoint that was given up
            raise


def _ask(client: httpx.Client, endpoint: ChatEndpoint, body: dict[str, object], sleep: Callable[[float], None]) -> str:
    """One reply; waits, ever longer, and asks again where the endpoint is busy or out of reach."""
    problem = "was never asked"
    for attempt in range(endpoint.tries):
        wait = min(MAX_WAIT_S, 2.0**attempt / 2)
        try:
            response = client.post(f"{endpoint.url.rstrip('/')}/chat/completions", json=body)
        except httpx.TransportError as error:
            problem = f"cannot be reached ({type(error).__name__})"
        else:
            if response.is_success:
                return _content(response)
            problem = f"answers HTTP {response.status_code}"
            if response.status_code not in RETRIED:
                break
            wait = _retry_after(response, wait)
        if attempt + 1 < endpoint.tries:
            sleep(wait)
    raise EndpointError(f"the endpoint of {endpoint.model!r} {problem}")


def _retry_after(response: httpx.Response, otherwise: float) -> float:
    """The wait the endpoint asks for, in seconds and at most MAX_WAIT_S."""
    value = response.headers.get("retry-after", "")
    return min(MAX_WAIT_S, float(value)) if value.isdecimal() else otherwise


def _content(response: httpx.Response) -> str:
    """The text of the first choice, empty where the model said nothing. Raises EndpointError for another form."""
    try:
        return str(response.json()["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        raise EndpointError("the endpoint does not reply in the form of /chat/completions") from None
