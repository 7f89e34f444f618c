"""Chats with an OpenAI-compatible endpoint: many at once, patient with a busy server. Does not know what is asked."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from core.errors import ConfigError, ScaledownError

Message = dict[str, str]
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
REFUSED = frozenset({400, 413, 422})  # this one chat cannot be served; most often it is too long for the model
MAX_WAIT_S = 30.0
SHOWN_CHARACTERS = 300  # of a reply that is no answer


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


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one chat.

    text      empty where the model said nothing
    cut       the text ends where `max_tokens` did, not where the model would have ended it
    refusal   why the endpoint does not take this chat; empty where it does
    """

    text: str
    cut: bool = False
    refusal: str = ""


def check_url(url: str, option: str) -> None:
    """Raises ConfigError that names `option` where `url` is none that can be asked."""
    try:
        parsed = httpx.URL(url)
        good = parsed.scheme in ("http", "https") and bool(parsed.host)
    except httpx.InvalidURL:
        good = False
    if not good:
        raise ConfigError(f"{option}: must be a URL such as http://host:port/v1")


def complete_chats(
    endpoint: ChatEndpoint,
    chats: Sequence[Sequence[Message]],
    max_tokens: int,
    *,
    may_refuse: bool = False,
    transport: httpx.BaseTransport | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Reply]:
    """The greedy reply to each chat, in order. `transport` and `sleep` are replaced in tests.

    may_refuse   a chat that the endpoint answers with one of the statuses REFUSED has a reply that says so

    Raises EndpointError.
    """
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}

    def ask(chat: Sequence[Message]) -> Reply:
        body = {"model": endpoint.model, "messages": list(chat), "temperature": 0, "max_tokens": max_tokens}
        return _ask(client, endpoint, body, sleep, may_refuse=may_refuse)

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


def _ask(
    client: httpx.Client,
    endpoint: ChatEndpoint,
    body: dict[str, object],
    sleep: Callable[[float], None],
    *,
    may_refuse: bool,
) -> Reply:
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
                return _read(endpoint, response)
            problem = f"HTTP {response.status_code}: {_shown(endpoint, response)}"
            if may_refuse and response.status_code in REFUSED:
                return Reply("", refusal=_name(endpoint, problem))
            if response.status_code not in RETRIED:
                break
            wait = _retry_after(response, wait)
        if attempt + 1 < endpoint.tries:
            sleep(wait)
    raise EndpointError(_name(endpoint, problem))


def _retry_after(response: httpx.Response, otherwise: float) -> float:
    """The wait the endpoint asks for, in seconds and at most MAX_WAIT_S."""
    value = response.headers.get("retry-after", "")
    return min(MAX_WAIT_S, float(value)) if value.isdecimal() else otherwise


def _read(endpoint: ChatEndpoint, response: httpx.Response) -> Reply:
    """The first choice. Raises EndpointError for another form."""
    try:
        choice = response.json()["choices"][0]
        return Reply(str(choice["message"]["content"] or ""), cut=choice.get("finish_reason") == "length")
    except (AttributeError, ValueError, LookupError, TypeError):
        problem = f"does not reply in the form of /chat/completions: {_shown(endpoint, response)}"
        raise EndpointError(_name(endpoint, problem)) from None


def _shown(endpoint: ChatEndpoint, response: httpx.Response) -> str:
    """The beginning of the body; the key, which some servers repeat, is left out."""
    text = response.text.replace(endpoint.api_key, "***") if endpoint.api_key else response.text
    return " ".join(text[:SHOWN_CHARACTERS].split())


def _name(endpoint: ChatEndpoint, problem: str) -> str:
    """`problem` with the model's name and the URL, without what may be secret in it."""
    url = httpx.URL(endpoint.url).copy_with(userinfo=b"", query=None)
    return f"the endpoint {url} of {endpoint.model!r}: {problem}"
