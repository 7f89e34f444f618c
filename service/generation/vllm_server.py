"""A vLLM server over HTTP: completions as streams of tokens, retries, and errors in our words. Knows no jobs.

Lives on the event loop. A completion whose stream is closed before its end is stopped by vLLM.
"""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx

from core.errors import EngineError, OverloadedError, ScaledownError
from service.errors import GeneratorUnavailableError
from service.generation.vllm_wire import Written, error_message, parse_completion, parse_event, parse_models
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)
TRIES = 3
RETRY_WAIT_S = 0.2
CONNECT_S = 5.0
PROBE_S = 5.0
LATE_PROBES = 3  # in a row, before a server that is only slow is taken for away
JSON = {"Content-Type": "application/json"}
UNREACHABLE = "the generator cannot be reached"


class VllmServer:
    """One server: `model` and `max_tokens` are what it serves, once `connect` has asked it.

    outages   how often it was found to be away: what was known of it before an outage may not hold after it
    failures  requests that failed while it may well be there: a reason to look, not to turn others away
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        key = settings.generator_key
        self.model = settings.generator_model
        self.max_tokens: int | None = None
        self.outages = 0
        self.failures = 0
        self._late = 0  # probes without an answer, in a row
        self._wanted = settings.generator_model
        self._metrics = metrics
        self._client = httpx.AsyncClient(
            base_url=settings.generator_url,
            headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else {},
            timeout=httpx.Timeout(settings.stall_seconds, connect=CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.max_requests),
        )

    @property
    def url(self) -> str:
        """Where it is. The setting takes no credentials in it."""
        return str(self._client.base_url)

    async def aclose(self) -> None:
        """Let go of the connections."""
        await self._client.aclose()

    async def connect(self) -> None:
        """Ask what is served. Raises GeneratorUnavailableError, and EngineError for a model that is not there."""
        response = await self._ask("GET", "models", None)
        if response.status_code != 200:
            raise self.failed(_status(response), _reason(response))
        self.model, self.max_tokens = parse_models(response.text, self._wanted)

    async def probe(self) -> None:
        """Ask whether it is well (`/health` beside `/v1`). Raises GeneratorUnavailableError.

        Away is what cannot be reached, says that it is not well, or gives no answer LATE_PROBES times in a row.
        """
        root = str(self._client.base_url).rstrip("/").removesuffix("/v1")
        try:
            response = await self._ask("GET", f"{root}/health", None)
        except GeneratorUnavailableError as error:
            self._late += 1
            raise (self.away(error.message, error.reason) if self._late >= LATE_PROBES else error) from None
        self._late = 0
        if response.status_code != 200:
            raise self.away(_status(response))

    async def complete(self, fields: Mapping[str, Any]) -> Written:
        """One completion in one piece, with log-probabilities. Raises as `stream` does."""
        response = await self._ask("POST", "completions", self.body(fields))
        if response.status_code != 200:
            raise self._refusal(response)
        return parse_completion(response.text)

    def body(self, fields: Mapping[str, Any]) -> bytes:
        """The JSON of a completion of this server's model; may be called in any thread."""
        return json.dumps({"model": self.model, **fields}).encode()

    async def stream(self, body: bytes) -> AsyncGenerator[list[int]]:
        """The tokens of one completion as they come; sent again if the connection fails before the first of them.

        Raises GeneratorUnavailableError, OverloadedError where it has no room, and EngineError.
        """
        for attempt in range(1, TRIES + 1):
            begun = False
            try:
                async with self._client.stream("POST", "completions", content=body, headers=JSON) as response:
                    if response.status_code != 200:
                        await response.aread()
                        raise self._refusal(response)
                    async for line in _lines(response):
                        tokens = parse_event(line)
                        if tokens:
                            begun = True
                            yield tokens
                return
            except httpx.HTTPError as error:
                log.warning("the generator failed", extra={"error": type(error).__name__, "attempt": attempt})
                if begun or attempt == TRIES or isinstance(error, httpx.ReadTimeout):
                    raise self._unavailable(error) from None
            self._metrics.generator_retries.inc()
            await asyncio.sleep(RETRY_WAIT_S * attempt)

    async def _ask(self, method: str, path: str, body: bytes | None) -> httpx.Response:
        timeout = PROBE_S if body is None else httpx.USE_CLIENT_DEFAULT
        try:
            return await self._client.request(method, path, content=body, headers=JSON, timeout=timeout)
        except httpx.HTTPError as error:
            raise self._unavailable(error) from None

    def away(self, message: str = UNREACHABLE, reason: str = "") -> GeneratorUnavailableError:
        """Note an outage; the error to raise."""
        self.outages += 1
        return GeneratorUnavailableError(message, reason)

    def failed(self, message: str, reason: str = "") -> GeneratorUnavailableError:
        """Note the failure of one request, which may be the request's own fault; the error to raise."""
        self.failures += 1
        return GeneratorUnavailableError(message, reason)

    def _unavailable(self, error: httpx.HTTPError) -> GeneratorUnavailableError:
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return self.away(reason=_first_cause(error))
        stuck = isinstance(error, httpx.ReadTimeout)
        return self.failed("the generator makes no progress" if stuck else "the generator broke the connection")

    def _refusal(self, response: httpx.Response) -> ScaledownError:
        """A completion's status that is not 200 as an error of ours; what the server said is for the operator only."""
        said = ""
        with contextlib.suppress(ValueError):
            body = response.json()
            said = error_message(body) if isinstance(body, dict) else ""
        log.warning("the generator refused", extra={"status": response.status_code, "reason": said})
        if response.status_code in (429, 503):
            wait = response.headers.get("Retry-After", "")
            return OverloadedError("the generator has no room", float(wait) if wait.isdecimal() else 5.0)
        if response.status_code in (400, 422):
            return EngineError(f"the generator refused the prompt: {said}")
        return self.failed(_status(response), _reason(response))


def _first_cause(error: BaseException) -> str:
    """Why a connection failed, by what the system said: httpx says only that all attempts did."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]  # one for each address of the name
        elif (cause := error.__cause__ or error.__context__) is not None:
            error = cause
        elif isinstance(error, OSError) and error.errno is not None and error.errno > 0:
            return os.strerror(error.errno)  # asyncio has words of its own, with the address again
        else:
            return str(error) or type(error).__name__


def _status(response: httpx.Response) -> str:
    return f"the generator answers with status {response.status_code}"


def _reason(response: httpx.Response) -> str:
    """The same for the operator, with the way out."""
    wants_key = response.status_code in (401, 403)
    return _status(response) + (": set SCALEDOWN_GENERATOR_KEY to a key that it takes" if wants_key else "")


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes]:
    """Lines of an event stream. Cut as bytes: httpx cuts text, also at U+2028 and others that JSON may hold."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line
    yield rest
