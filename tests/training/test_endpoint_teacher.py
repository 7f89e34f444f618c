"""A teacher behind an OpenAI-compatible endpoint: what it is asked, and what becomes of a reply that is no answer."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.config import PromptConfig
from tests.tiny_labelling import ROWS, row
from training.__main__ import main
from training.chat_endpoint import ChatEndpoint, EndpointError, Reply, complete_chats
from training.data_format import Row, read_rows, write_rows
from training.teachers import EndpointTeacher

ENDPOINT = ChatEndpoint("http://teacher/v1", "big-model", "secret", concurrency=3, tries=3)
CHAT = [{"role": "user", "content": "hello"}]
TOO_LONG = {"error": {"message": "This model's maximum context length is 8192 tokens.\n", "key": "secret"}}


def replying(*statuses: int, headers: dict[str, str] | None = None) -> tuple[httpx.MockTransport, list[dict[str, Any]]]:
    """An endpoint that answers with these statuses, then well; it repeats the last line of the question."""
    left, bodies, lock = list(statuses), [], threading.Lock()

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        with lock:
            bodies.append(body)
            status = left.pop(0) if left else 200
        if status != 200:
            return httpx.Response(status, headers=headers)
        assert request.headers["authorization"] == "Bearer secret"
        content = body["messages"][-1]["content"].splitlines()[-1]
        return httpx.Response(200, json={"choices": [{"message": {"content": f" {content}\n"}}]})

    return httpx.MockTransport(handle), bodies


def refusing(chats: Sequence[str], status: int = 400) -> httpx.MockTransport:
    """An endpoint for which every question with one of these words is too long."""

    def handle(request: httpx.Request) -> httpx.Response:
        content = json.loads(request.content)["messages"][-1]["content"]
        if any(chat in content for chat in chats):
            return httpx.Response(status, json=TOO_LONG)
        return httpx.Response(200, json={"choices": [{"message": {"content": "the Alps"}}]})

    return httpx.MockTransport(handle)


def test_an_endpoint_is_asked_greedily_with_the_generators_words_and_answers_in_order() -> None:
    transport, bodies = replying()
    teacher = EndpointTeacher(ENDPOINT, PromptConfig(system="Be brief."), 9, transport=transport)
    assert [answer.text for answer in teacher.answer(ROWS)] == [f"Question: {row.query}" for row in ROWS]
    first = next(body for body in bodies if ROWS[0].query in body["messages"][1]["content"])
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("big-model", 0, 9)
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert first["messages"][1]["content"] == (
        "Background:\n[1] Rivers\nThe river number 0 rises in the Alps.\n[2] Bread is made of flour.\n"
        "Question: Where does river 0 rise?"
    )


def test_a_busy_endpoint_is_asked_again_after_the_wait_it_asks_for() -> None:
    transport, bodies = replying(429, 503, headers={"retry-after": "7"})
    waits: list[float] = []
    assert complete_chats(ENDPOINT, [CHAT], 5, transport=transport, sleep=waits.append) == [Reply(" hello\n")]
    assert (waits, len(bodies)) == ([7.0, 7.0], 3)


@pytest.mark.parametrize(
    ("statuses", "message", "requests"),
    [((503, 503, 503), "HTTP 503", 3), ((401,), "HTTP 401", 1), ((400,), "HTTP 400", 1)],
)
def test_an_endpoint_that_refuses_is_given_up(statuses: tuple[int, ...], message: str, requests: int) -> None:
    transport, bodies = replying(*statuses)
    with pytest.raises(EndpointError, match=message):
        complete_chats(ENDPOINT, [CHAT], 5, transport=transport, sleep=lambda _: None)
    assert len(bodies) == requests


def test_an_endpoint_out_of_reach_or_of_another_form_is_given_up() -> None:
    def unreachable(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route", request=request)

    for handler, message in (
        (unreachable, "cannot be reached"),
        (lambda _: httpx.Response(200, text="<html>"), "does not reply in the form of /chat/completions: <html>"),
        (lambda _: httpx.Response(200, json={"choices": ["x"]}), "does not reply in the form"),
    ):
        with pytest.raises(EndpointError, match=message):
            complete_chats(ENDPOINT, [CHAT], 5, transport=httpx.MockTransport(handler), sleep=lambda _: None)


def test_an_error_says_which_endpoint_and_what_it_says_but_nothing_secret() -> None:
    endpoint = ChatEndpoint("http://user:pass@teacher:81/v1?key=hidden", "big-model", "secret")
    with pytest.raises(EndpointError) as caught:
        complete_chats(endpoint, [CHAT], 5, transport=refusing(["hello"]))
    said = caught.value.message
    assert said.startswith("the endpoint http://teacher:81/v1 of 'big-model': HTTP 400: ")
    assert "maximum context length is 8192 tokens" in said
    assert not any(secret in said for secret in ("user", "pass", "hidden", "secret"))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_row_that_the_endpoint_refuses_has_no_answer(status: int, caplog: pytest.LogCaptureFixture) -> None:
    teacher = EndpointTeacher(ENDPOINT, PromptConfig(), transport=refusing(["river 2 "], status))
    answers = teacher.answer(ROWS)
    assert [answer.text for answer in answers] == ["the Alps" if index != 2 else "" for index in range(7)]
    assert answers[2].missing == "the endpoint refused the prompt"
    assert f"row 'r2': the endpoint http://teacher/v1 of 'big-model': HTTP {status}: " in caplog.text
    assert teacher.answer(ROWS[2:3])[0].text == "", "it has answered others: this row is in error, not the request"


def test_an_endpoint_that_refuses_all_of_the_first_rows_is_given_up() -> None:
    transport = refusing(["river"])
    with pytest.raises(EndpointError, match="each of the first 7 rows is refused; the endpoint http://teacher/v1"):
        EndpointTeacher(ENDPOINT, PromptConfig(), transport=transport).answer(ROWS)
    proven = EndpointTeacher(ENDPOINT, PromptConfig(), proven=True, transport=transport)
    assert {answer.text for answer in proven.answer(ROWS)} == {""}


@pytest.mark.parametrize(
    ("content", "answer", "missing"),
    [
        ("<think>The Rhine?\n</think>\n\nthe Alps\n", "the Alps", ""),
        ("it rises</think>in</think> the Alps", "the Alps", ""),
        ("<think>The Rhine rises", "", "the teacher did not end its <think>"),
        ("<think>The Rhine rises</think>\n", "", "the teacher said nothing"),
    ],
)
def test_what_a_teacher_thinks_is_not_its_answer(content: str, answer: str, missing: str) -> None:
    reply = httpx.Response(200, json={"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})
    teacher = EndpointTeacher(ENDPOINT, PromptConfig(), transport=httpx.MockTransport(lambda _: reply))
    (answered,) = teacher.answer(ROWS[:1])
    assert (answered.text, answered.missing) == (answer, missing)


class ChatHandler(BaseHTTPRequestHandler):
    """An endpoint whose model always says the same; river 1 makes it say more than it may, river 2 is too long."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        finish = "length" if "river 1 " in body else "stop"
        reply = {"choices": [{"message": {"content": "from the Alps"}, "finish_reason": finish}]}
        too_long = "river 2 " in body
        content = json.dumps(TOO_LONG if too_long else reply).encode()
        self.send_response(400 if too_long else 200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def chat_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.fixture
def label(chat_server: str, tmp_path: Path) -> Callable[..., list[str | None]]:
    """The command; gives the teacher's answers."""

    def run(rows: Sequence[Row], *options: str) -> list[str | None]:
        data, out = tmp_path / "rows.jsonl", tmp_path / f"labelled{len(options)}.jsonl"
        write_rows(data, rows)
        arguments = ["--data", str(data), "--endpoint", chat_server, "--teacher", "any", "--out", str(out)]
        assert main(["label", *arguments, *options]) == 0
        return [row.teacher_answer for row in read_rows(out)[0]]

    return run


def test_the_command_labels_through_an_endpoint(
    label: Callable[..., list[str | None]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        answers = label([*ROWS[:3], row(3, answers=("the Andes",))], "--block", "2")
    assert answers == ["from the Alps", None, None, "from the Alps"]
    for reason in ("the teacher's answer was cut at --max-new-tokens", "the endpoint refused the prompt"):
        assert f"1 rows keep the answers they came with: {reason}" in caplog.text
    assert "4 rows, 2 with a teacher's answer, of which 1 contain no gold answer" in caplog.text


def test_the_command_keeps_gold_answers_that_the_teacher_misses(label: Callable[..., list[str | None]]) -> None:
    assert label([ROWS[0], row(3, answers=("the Andes",))], "--must-contain-gold") == ["from the Alps", None]
