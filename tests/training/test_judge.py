"""The judge against an in-process double of an OpenAI-compatible endpoint."""

import json
import threading
from collections.abc import Callable

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.chat_endpoint import ChatEndpoint, EndpointError
from training.judge import Case, judge, judge_messages, parse_verdict

CASE = Case("Who wrote Faust?", ("Goethe", "J. W. von Goethe"), "Goethe")


class ChatEndpointDouble:
    """Replies to /chat/completions in process; stands in for a real judge model, and judges by `verdict`."""

    def __init__(self, verdict: Callable[[str], str]) -> None:
        self.verdict = verdict
        self.requests: list[httpx.Request] = []
        self._lock = threading.Lock()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            self.requests.append(request)
        reply = self.verdict(json.loads(request.content)["messages"][1]["content"])
        return httpx.Response(200, json={"choices": [{"message": {"role": "assistant", "content": reply}}]})


def run(
    handler: Callable[[httpx.Request], httpx.Response], cases: list[Case], concurrency: int = 8
) -> list[list[float | None]]:
    endpoint = ChatEndpoint("http://judge.test/v1", "a-model", "secret", concurrency)
    return list(judge(endpoint, cases, transport=httpx.MockTransport(handler)))


def test_verdicts_come_in_the_order_of_the_cases_in_blocks_that_can_be_saved() -> None:
    cases = [Case(f"question {number}", ("x",), str(number % 3)) for number in range(50)]
    levels = {"0": "0", "1": "0.5", "2": "1"}
    double = ChatEndpointDouble(lambda user: levels[user.split("Answer to grade: ")[1][0]])
    blocks = run(double, cases, concurrency=3)
    assert [score for block in blocks for score in block] == [(number % 3) / 2 for number in range(50)]
    assert [len(block) for block in blocks] == [12, 12, 12, 12, 2]
    assert len(double.requests) == 50


def test_the_judge_sees_question_answer_and_all_references() -> None:
    double = ChatEndpointDouble(lambda _: "nonsense")
    assert run(double, [CASE]) == [[None]]
    body = json.loads(double.requests[0].content)
    assert (body["model"], body["temperature"]) == ("a-model", 0)
    assert body["messages"] == judge_messages(CASE)
    user = body["messages"][1]["content"]
    assert all(part in user for part in ("Who wrote Faust?", "Goethe | J. W. von Goethe", "Answer to grade: Goethe"))


def test_blocks_before_a_refusal_are_given_out() -> None:
    seen: list[httpx.Request] = []

    def refuse_after_four(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if len(seen) > 4:
            return httpx.Response(401)
        return httpx.Response(200, json={"choices": [{"message": {"content": "1"}}]})

    endpoint = ChatEndpoint("http://judge.test/v1", "a-model", concurrency=1)
    blocks = judge(endpoint, [CASE] * 6, transport=httpx.MockTransport(refuse_after_four))
    assert next(blocks) == [1.0] * 4
    with pytest.raises(EndpointError, match="HTTP 401"):
        next(blocks)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        *[
            ("1", 1.0),
            ("0.5: partly correct", 0.5),
            (" 0 ", 0.0),
            ("1: correct.", 1.0),
            ("Score: 0.", 0.0),
            ("1.0", 1.0),
        ],
        *[("Correct", None), ("10", None), ("1.5", None), ("0.55", None), ("2001", None), ("", None)],
    ],
)
def test_parse_verdict(text: str, verdict: float | None) -> None:
    assert parse_verdict(text) == verdict


@given(st.text())
def test_parse_verdict_gives_a_level_or_nothing(text: str) -> None:
    assert parse_verdict(text) in {None, 0.0, 0.5, 1.0}
