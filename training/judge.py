"""An LLM as judge of answers, behind any OpenAI-compatible endpoint. Knows nothing about models of this project.

Three levels as in OSCAR (fig. 13): 1 correct, 0.5 partly correct, 0 wrong; the wording is our own.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from core.errors import ScaledownError

SYSTEM = (
    "You grade answers. Reply with one number and nothing else: 1 if the answer is correct, 0.5 if it is partly "
    "correct, 0 if it is wrong."
)
_VERDICT = re.compile(r"(?<![\d.])(0\.50?|1(?:\.0)?|0(?:\.0)?)(?!\.?\d)")
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
MAX_WAIT_S = 30.0


class JudgeError(ScaledownError):
    """The judge's endpoint refuses, or keeps failing after every retry."""

    code = "judge"


@dataclass(frozen=True, slots=True)
class Case:
    """One answer to be judged."""

    query: str
    references: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class JudgeEndpoint:
    """Where the judge is. `url` ends before `/chat/completions` (".../v1"); `api_key` may be empty.

    concurrency     requests in flight at once
    tries           how often one request is sent before the judge is given up
    timeout_s       seconds one request may take
    """

    url: str
    model: str
    api_key: str = ""
    concurrency: int = 8
    tries: int = 5
    timeout_s: float = 60.0


def judge_messages(case: Case) -> list[dict[str, str]]:
    """The chat the judge answers."""
    user = (
        f"Question: {case.query}\nReference answers: {' | '.join(case.references)}\nAnswer to grade: {case.answer}\n"
        "Is the answer correct, judged by the question and the references? "
        "1 (correct), 0.5 (partly correct) or 0 (wrong)."
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def parse_verdict(text: str) -> float | None:
    """The first of 1, 0.5 or 0 that stands alone in the reply; None where there is none."""
    found = _VERDICT.search(text)
    return float(found.group(1)) if found else None


def judge(
    endpoint: JudgeEndpoint,
    cases: Sequence[Case],
    *,
    transport: httpx.BaseTransport | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[list[float | None]]:
    """Verdicts in the order of `cases`, in blocks that are complete, so that the caller can save each.

    Raises JudgeError. `transport` and `sleep` are replaced in tests.
    """
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    with (
        httpx.Client(headers=headers, timeout=endpoint.timeout_s, transport=transport) as client,
        ThreadPoolExecutor(endpoint.concurrency) as pool,
    ):
        for block in _blocks(cases, 4 * endpoint.concurrency):
            yield list(pool.map(lambda case: _ask(client, endpoint, case, sleep), block))


def _blocks(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


def _ask(client: httpx.Client, endpoint: JudgeEndpoint, case: Case, sleep: Callable[[float], None]) -> float | None:
    """One verdict; waits and asks again where the endpoint is busy or out of reach."""
    body = {"model": endpoint.model, "messages": judge_messages(case), "temperature": 0, "max_tokens": 8}
    problem = "was never asked"
    for attempt in range(endpoint.tries):
        wait = min(MAX_WAIT_S, 2.0**attempt / 2)
        try:
            response = client.post(f"{endpoint.url.rstrip('/')}/chat/completions", json=body)
        except httpx.TransportError as error:
            problem = f"cannot be reached ({type(error).__name__})"
        else:
            if response.is_success:
                return parse_verdict(_content(response))
            problem = f"answers HTTP {response.status_code}"
            if response.status_code not in _RETRIED:
                break
            wait = _retry_after(response, wait)
        if attempt + 1 < endpoint.tries:
            sleep(wait)
    raise JudgeError(f"the judge {endpoint.model!r} {problem}")


def _retry_after(response: httpx.Response, otherwise: float) -> float:
    """The wait the endpoint asks for, in seconds and at most MAX_WAIT_S."""
    value = response.headers.get("retry-after", "")
    return min(MAX_WAIT_S, float(value)) if value.isdecimal() else otherwise


def _content(response: httpx.Response) -> str:
    """The text of the first choice. Raises JudgeError where the reply has not that form."""
    try:
        return str(response.json()["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError):
        raise JudgeError("the judge's endpoint does not reply in the form of /chat/completions") from None
