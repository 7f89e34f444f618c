"""The judge against an in-process double of an OpenAI-compatible endpoint."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.passages import Passage
from tests.tiny_evaluation import made_answer
from training.chat_endpoint import ChatEndpoint, EndpointError
from training.evaluation import judge_answers
from training.intervals import Bootstrap
from training.judge import Case, judge, judge_messages, parse_verdict
from training.questions import Question
from training.results import JudgementRecord, ResultsFile, Setting, read_results
from training.summary import summarise

TEXT, COMPRESSED = Setting("text", None, 3), Setting("compressed", 4, 3)
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


def test_each_judges_verdicts_are_made_once_and_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question("q", "When?", ("1960",), (Passage("In 1960."),), (True,))
    results = ResultsFile.open(tmp_path / "results.jsonl", {})
    results.append([made_answer("q", setting, text, 1.0) for setting, text in ((TEXT, "1960"), (COMPRESSED, "1961"))])
    asked: list[tuple[str, str]] = []

    def judge_double(endpoint: ChatEndpoint, cases: list[Case]) -> Any:
        """Stands in for judge models: right is what a reference says; the harsh one finds no words for the rest."""
        asked.extend((endpoint.model, case.answer) for case in cases)
        wrong = None if endpoint.model == "harsh" else 0.0
        yield [1.0 if case.answer in case.references else wrong for case in cases]

    monkeypatch.setattr("training.evaluation.judge", judge_double)
    for name in ("kind", "harsh", "kind"):
        judge_answers(ChatEndpoint("http://judge.test/v1", name), [question], results)
    assert asked == [("kind", "1960"), ("kind", "1961"), ("harsh", "1960"), ("harsh", "1961")]
    text, compressed = (
        {
            judge: (each["read"], each["unreadable"], each["score"] and each["score"]["value"])
            for judge, each in entry["judges"].items()
        }
        for entry in summarise({}, read_results(results.path).records, Bootstrap(resamples=20))["settings"]
    )
    assert text == {"kind": (1, 0, 1.0), "harsh": (1, 0, 1.0)}
    assert compressed == {"kind": (1, 0, 0.0), "harsh": (0, 1, None)}


def test_verdicts_from_before_judges_were_named_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    setting = {"mode": "text", "rate": None, "passages": 3, "budget": None}
    old = {"question": "q", "setting": setting, "score": 0.5, "kind": "judgement"}
    path.write_text(f'{{"kind": "run"}}\n{json.dumps(old)}\n')
    assert read_results(path).records == [JudgementRecord("q", TEXT, 0.5, "unnamed")]
