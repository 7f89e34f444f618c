"""The judge against an in-process double of an OpenAI-compatible endpoint."""

import json
import threading
from collections.abc import Callable

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.judge import Case, JudgeEndpoint, JudgeError, judge, judge_messages, parse_verdict

CASE = Case("Who wrote Faust?", ("Goethe", "J. W. von Goethe"), "Goethe")


class ChatEndpointDouble:
    """Replies to /chat/completions in process; stands in for a real judge model, and judges by `verdict`."""

    def __init__(self, verdict: Callable[[str], str], failures: list[httpx.Response | Exception] | None = None) -> None:
        self.verdict = verdict
        self.failures = failures or []
        self.requests: list[httpx.Request] = []
        self._lock = threading.Lock()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            self.requests.append(request)
            failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, Exception):
            raise failure
        if failure is not None:
            return failure
        user = json.loads(request.content)["messages"][1]["content"]
        return httpx.Response(
            200, json={"choices": [{"message": {"role": "assistant", "content": self.verdict(user)}}]}
        )


def run(double: ChatEndpointDouble, cases: list[Case], **options: object) -> tuple[list[float | None], list[float]]:
    waits: list[float] = []
    endpoint = JudgeEndpoint("http://judge.test/v1/", "a-model", **options)  # type: ignore[arg-type]  # test options
    blocks = judge(endpoint, cases, transport=httpx.MockTransport(double), sleep=waits.append)
    return [score for block in blocks for score in block], waits


def test_verdicts_come_in_the_order_of_the_cases() -> None:
    cases = [Case(f"question {number}", ("x",), str(number % 3)) for number in range(50)]
    levels = {"0": "0", "1": "0.5", "2": "1"}
    double = ChatEndpointDouble(lambda user: levels[user.split("Answer to grade: ")[1][0]])
    scores, waits = run(double, cases, concurrency=3)
    assert scores == [(number % 3) / 2 for number in range(50)]
    assert len(double.requests) == 50
    assert waits == []


def test_request_names_model_key_and_all_references() -> None:
    double = ChatEndpointDouble(lambda _: "1")
    scores, _ = run(double, [CASE], api_key="secret")
    request, body = double.requests[0], json.loads(double.requests[0].content)
    assert scores == [1.0]
    assert str(request.url) == "http://judge.test/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("a-model", 0)
    assert body["messages"] == judge_messages(CASE)
    assert "Goethe | J. W. von Goethe" in body["messages"][1]["content"]


def test_busy_and_unreachable_endpoints_are_asked_again() -> None:
    failures: list[httpx.Response | Exception] = [
        httpx.Response(429, headers={"retry-after": "7"}),
        httpx.ConnectError("refused"),
        httpx.Response(503, headers={"retry-after": "3600"}),
    ]
    double = ChatEndpointDouble(lambda _: "0.5", failures)
    scores, waits = run(double, [CASE])
    assert scores == [0.5]
    assert waits == [7.0, 1.0, 30.0]  # as asked; the second step of the back-off; as asked, but no longer than 30 s


@pytest.mark.parametrize(
    ("failures", "message", "requests"),
    [
        ([httpx.Response(401)], "HTTP 401", 1),
        ([httpx.Response(500)] * 3, "HTTP 500", 3),
        ([httpx.ReadTimeout("slow")] * 3, "cannot be reached", 3),
        ([httpx.Response(200, json={"choices": []})], "does not reply in the form", 1),
        ([httpx.Response(200, text="<html>")], "does not reply in the form", 1),
    ],
)
def test_hopeless_endpoints_raise(failures: list[httpx.Response | Exception], message: str, requests: int) -> None:
    double = ChatEndpointDouble(lambda _: "1", list(failures))
    with pytest.raises(JudgeError, match=message):
        run(double, [CASE], tries=3)
    assert len(double.requests) == requests


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
