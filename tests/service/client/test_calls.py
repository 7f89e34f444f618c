"""What the clients share, without a server: retries, errors, events however their bytes are cut."""

import itertools
import json
import pickle
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client import (
    DeadlineError,
    Done,
    Embeddings,
    FailedError,
    InvalidRequestError,
    OverloadedError,
    Passage,
    PassagesRead,
    ProtocolError,
    ResponseError,
    Retry,
    ServiceError,
    Token,
    UnreachableError,
)
from service.client.calls import EventReader, Keys, answer_call, change_call, ready_call, rerank_call
from service.client.errors import response_error, retry_after
from service.client.transport import request_of

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ANSWER: dict[str, Any] = {
    "answer": "a\u2028b\x85",
    "finish_reason": "stop",
    "passages": [{"index": 0, "id": None, "relevance": 0.5, "mode": "text"}],
    "answerable": None,
    "usage": {"text_tokens": 9, "prompt_tokens": 5, "tokens_saved": 4, "completion_tokens": 2},
    "timings_ms": {"total": 1.5},
    "checkpoint": "demo@1",
}


def error_body(code: str, **detail: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": "no", "field": None, "limit": None, "request_id": "r", **detail}}


def overloaded(retry_after_s: float | None) -> OverloadedError:
    return OverloadedError(429, error_body("overloaded")["error"], retry_after_s)


def stream(*events: tuple[str, dict[str, Any]]) -> bytes:
    return "".join(f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n" for name, data in events).encode()


@given(st.text(min_size=1), st.lists(st.integers(0, 1000)))
def test_events_are_the_same_however_their_bytes_are_cut(text: str, cuts: list[int]) -> None:
    text = text.encode("utf-8", "replace").decode()
    data = b": keep-alive\n\n" + stream(
        ("passages", {"passages": ANSWER["passages"], "checkpoint": "demo@1"}),
        ("token", {"text": text}),
        ("done", {**ANSWER, "a_newer_field": 1}),
    )
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    reader = EventReader()
    events = [event for a, b in itertools.pairwise(edges) for event in reader.feed(data[a:b])]
    reader.close()
    read, token, done = events
    assert isinstance(read, PassagesRead)
    assert read.passages[0].relevance == 0.5
    assert token == Token(text)
    assert isinstance(done, Done)
    assert done.answer.answer == ANSWER["answer"]
    assert done.answer.usage.tokens_saved == 4


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("deadline", DeadlineError),
        ("stopping", OverloadedError),
        ("generator_unavailable", OverloadedError),
        ("too_large", InvalidRequestError),
        ("x", FailedError),
    ],
)
def test_an_error_event_is_raised_by_its_code(code: str, kind: type[ResponseError]) -> None:
    with pytest.raises(kind) as caught:
        list(EventReader().feed(stream(("error", error_body(code)))))
    assert (caught.value.code, caught.value.request_id, caught.value.status) == (code, "r", 200)


@pytest.mark.parametrize(
    "data",
    [
        b"event: news\ndata: {}\n\n",
        b"event: token\ndata: {}\n\n",
        b"event: token\ndata: {\n\n",
        b"event: error\ndata: 1\n\n",
    ],
)
def test_what_the_service_does_not_send_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(EventReader().feed(data))


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    reader = EventReader()
    assert list(reader.feed(stream(("token", {"text": "half"})))) == [Token("half")]
    with pytest.raises(ProtocolError, match="before the answer was complete"):
        reader.close()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("7", 7.0),
        ("Fri, 02 Jan 2026 03:04:35 GMT", 30.0),
        ("Fri, 02 Jan 2026 03:04:35 -0000", 30.0),
        ("Fri, 02 Jan 2026 03:00:00 GMT", 0.0),
        ("soon", None),
        ("-3", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, NOW) == seconds


def test_retries_wait_as_long_as_asked_and_no_longer_than_allowed() -> None:
    retry = Retry(attempts=3, max_wait_s=10)
    assert retry.wait(1, overloaded(7)) == 7
    assert retry.wait(1, overloaded(11)) is None
    assert retry.wait(3, overloaded(1)) is None
    waits = [Retry(attempts=99, max_wait_s=10).wait(tried, overloaded(None)) or 0 for tried in range(1, 10)]
    assert 0.3 < waits[0] < 0.7
    assert waits[-1] == 10
    assert retry.wait(1, UnreachableError("refused", sent=False)) is not None


@pytest.mark.parametrize(
    "error",
    [
        UnreachableError("broken", sent=True),
        ProtocolError("?"),
        InvalidRequestError(422, {}),
        FailedError(500, {}),
        DeadlineError(504, {}),
    ],
)
def test_what_cannot_help_is_not_tried_again(error: ServiceError) -> None:
    assert Retry().wait(1, error) is None


def test_statuses_have_classes_and_carry_what_the_service_said() -> None:
    content = json.dumps(error_body("too_large", field="passages", limit=3)).encode()
    error = response_error(413, {}, content)
    assert isinstance(error, InvalidRequestError)
    assert (error.status, error.code, error.field, error.limit, error.request_id) == (
        413,
        "too_large",
        "passages",
        3,
        "r",
    )
    full = response_error(503, {"retry-after": "5"}, content)
    assert isinstance(full, OverloadedError)
    assert full.retry_after_s == 5
    assert isinstance(response_error(500, {}, content), FailedError)
    for strange in (b"", b"<html>", b"[]", b'{"error": "text"}', b'{"detail": 1}'):
        assert isinstance(response_error(500, {}, strange), ProtocolError)


@pytest.mark.parametrize(("status", "kind"), [(502, OverloadedError), (503, OverloadedError), (504, DeadlineError)])
def test_what_a_proxy_says_in_the_services_place_counts(status: int, kind: type[ResponseError]) -> None:
    error = response_error(status, {"retry-after": "2"}, b"<html>Bad Gateway</html>")
    assert isinstance(error, kind)
    assert (error.status, error.code, error.retry_after_s) == (status, "proxy", 2)
    assert Retry().wait(1, error) == (2 if kind is OverloadedError else None)


@pytest.mark.parametrize(
    "error",
    [
        UnreachableError("broken", sent=True),
        ProtocolError("?"),
        OverloadedError(429, error_body("overloaded", field="passages")["error"], 3),
    ],
)
def test_errors_pass_from_process_to_process(error: ServiceError) -> None:
    got = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes
    assert (type(got), str(got), vars(got)) == (type(error), str(error), vars(error))


def test_what_is_sent() -> None:
    embeddings = Embeddings("float32", "base64", (1, 2), "AACAPwAAAEA=", 0.5, 9, "demo@1")
    assert embeddings.rows() == [[1.0, 2.0]]
    passages: list[str | Passage] = [
        "a",
        Passage("b", id="x"),
        Passage(embedding_id="e"),
        Passage(embeddings=embeddings),
    ]
    call = answer_call("q", passages, {"mode": "text", "stop": ["."]})
    sent = json.loads(json.dumps(call.body))
    assert (call.method, call.path, call.admin) == ("POST", "/answer", False)
    assert {name: sent[name] for name in ("query", "mode", "stop")} == {"query": "q", "mode": "text", "stop": ["."]}
    assert sent["passages"][:3] == ["a", {"text": "b", "id": "x"}, {"embedding_id": "e"}]
    assert sent["passages"][3]["embeddings"]["shape"] == [1, 2]
    assert rerank_call("q", ["a"], {}).body == {"query": "q", "passages": ["a"]}
    assert rerank_call("q", ["a"], {"top_n": None}).body == {"query": "q", "passages": ["a"]}
    with pytest.raises(TypeError, match="stream: call `stream`"):
        answer_call("q", ["a"], {"stream": True})  # type: ignore[typeddict-unknown-key]
    assert change_call("rollback").body == {"action": "rollback"}
    assert change_call("load", "demo").admin


@pytest.mark.parametrize(
    ("usual", "deadline", "patience"),
    [(130.0, None, 130.0), (130.0, 60, 130.0), (130.0, 300, 310.0), (None, 300, None), (130.0, "soon", 130.0)],
)
def test_a_later_deadline_is_waited_for(usual: float | None, deadline: Any, patience: float | None) -> None:
    options: Any = {} if deadline is None else {"timeout": deadline}
    with httpx.Client(timeout=httpx.Timeout(5, read=usual)) as http:
        request = request_of(http, "http://service", Keys(), answer_call("q", ["p"], options))
    assert request.extensions["timeout"] == {"connect": 5, "read": patience, "write": 5, "pool": 5}


def test_a_large_checkpoint_is_waited_for_as_long_as_it_takes() -> None:
    with httpx.Client(timeout=5) as http:
        request = request_of(http, "http://service", Keys(), change_call("activate", "large"))
    assert request.extensions["timeout"] == {"connect": 5, "read": None, "write": 5, "pool": 5}


def test_a_response_of_another_kind_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no Ranking: results"):
        rerank_call("q", ["a"], {}).result(200, {}, b'{"timings_ms": {}, "checkpoint": "x"}')
    for content in (b"[]", b"{}", b"ok"):
        with pytest.raises(ProtocolError):
            ready_call().result(200, {}, content)
    assert not ready_call().result(503, {}, b'{"status": "loading"}').ready
