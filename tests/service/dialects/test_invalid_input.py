"""Whatever is sent to a dialect gets an answer or a 4xx in the dialect's own shape, and never a 500."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.calls import QUERY

JSON = {"Content-Type": "application/json"}
OPENAI = {"error"}
SHAPES = {
    "/v1/rerank": {"detail", "error"},
    "/v2/rerank": {"message"},
    "/v1/chat/completions": OPENAI,
    "/v1/completions": OPENAI,
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/rerank": {"query": QUERY, "documents": ["a", "b"]},
    "/v2/rerank": {"query": QUERY, "documents": ["a", "b"]},
    "/v1/chat/completions": {
        "model": "scaledown",
        "messages": [{"role": "user", "content": QUERY}],
        "documents": ["a"],
        "max_tokens": 1,
    },
    "/v1/completions": {"model": "scaledown", "prompt": QUERY, "documents": ["a"], "max_tokens": 1},
}
WORDS = ["model", "query", "documents", "top_n", "messages", "prompt", "role", "content", "text", "title", "data", "id"]
WORDS += [
    "user",
    "tool",
    "context",
    "assistant",
    "type",
    "stream",
    "stop",
    "n",
    "mode",
    "rate",
    "stream_options",
    "\ud800",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from([*WORDS, "scaledown", "\0", "\ud800", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted(BODIES)), change=st.dictionaries(st.sampled_from(WORDS), VALUES, min_size=1))
def test_any_json_gets_an_answer_or_the_dialects_error(client: httpx.Client, path: str, change: dict[str, Any]) -> None:
    response = client.post(path, content=json.dumps({**BODIES[path], **change}), headers=JSON)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        check_shape(path, response)


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"null", b'{"model": "\\ud800"}', b"[" * 99])
def test_bodies_that_are_no_request(client: httpx.Client, path: str, content: bytes) -> None:
    response = client.post(path, content=content, headers=JSON)
    assert response.status_code == 400
    check_shape(path, response)


@pytest.mark.parametrize("path", SHAPES)
def test_what_http_refuses_has_the_shape_too(client: httpx.Client, path: str) -> None:
    wrong_method, no_json = client.get(path), client.post(path, content=b"x", headers={"Content-Type": "text/plain"})
    assert (wrong_method.status_code, no_json.status_code) == (405, 415)
    check_shape(path, wrong_method)
    check_shape(path, no_json)


def check_shape(path: str, response: httpx.Response) -> None:
    body = response.json()
    assert set(body) == SHAPES[path]
    if "error" in body:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"]
    else:
        assert body["message"]
    assert response.headers["x-request-id"]
