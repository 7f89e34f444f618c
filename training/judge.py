"""An LLM as judge of answers, behind any OpenAI-compatible endpoint. Knows nothing about models of this project.

Three levels as in OSCAR (fig. 13): 1 correct, 0.5 partly correct, 0 wrong; the wording is our own.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx

from training.chat_endpoint import ChatEndpoint, complete_chats

SYSTEM = (
    "You grade answers. Reply with one number and nothing else: 1 if the answer is correct, 0.5 if it is partly "
    "correct, 0 if it is wrong."
)
_VERDICT = re.compile(r"(?<![\d.])(0\.50?|1(?:\.0)?|0(?:\.0)?)(?!\.?\d)")
_MAX_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Case:
    """One answer to be judged."""

    query: str
    references: tuple[str, ...]
    answer: str


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
    endpoint: ChatEndpoint, cases: Sequence[Case], *, transport: httpx.BaseTransport | None = None
) -> Iterator[list[float | None]]:
    """Verdicts in the order of `cases`, in blocks that are complete, so that the caller can save each.

    Raises EndpointError. `transport` is replaced in tests.
    """
    size = 4 * endpoint.concurrency
    for start in range(0, len(cases), size):
        chats = [judge_messages(case) for case in cases[start : start + size]]
        yield [parse_verdict(reply.text) for reply in complete_chats(endpoint, chats, _MAX_TOKENS, transport=transport)]
