"""What bad input gets: a 4xx in the one error shape that names the field and the limit, and never a 500."""

import gzip
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from service.dialects.openai_schemas import ChatRequest, CompletionRequest
from service.dialects.rerank_schemas import CohereRequest, JinaRequest
from service.dialects.tei import TeiRequest
from service.schemas import AnswerRequest, RerankRequest
from tests.service.calls import PASSAGES, QUERY, answer, error
from tests.service.conftest import Serve

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"query": ""}, "query"),
        ({"query": " \n "}, "query"),
        ({"query": 3}, "query"),
        ({"query": None}, "query"),
        ({"query": "a\0b"}, "query"),
        ({"passages": []}, "passages"),
        ({"passages": "text"}, "passages"),
        ({"passages": {"0": "text"}}, "passages"),
        ({"passages": [""]}, "passages.0"),
        ({"passages": ["a", 3]}, "passages.1"),
        ({"passages": ["a", None]}, "passages.1"),
        ({"passages": ["a", {"text": ""}]}, "passages.1.text"),
        ({"passages": ["a", {"text": "b\0"}]}, "passages.1.text"),
        ({"passages": ["a", {"title": "b"}]}, "passages.1"),
        ({"passages": ["a", {"text": "b", "body": "c"}]}, "passages.1.body"),
        ({"passages": [{"text": "b", "title": 1}]}, "passages.0.title"),
        ({"passages": [{"text": "b", "id": 1}]}, "passages.0.id"),
        ({"passages": [{"text": "b", "embedding_id": "nothing"}]}, "passages.0.embedding_id"),
        ({"mode": "fast"}, "mode"),
        ({"rate": 5}, "rate"),
        ({"rate": "16"}, "rate"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"stop": "x"}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"stream": "yes"}, "stream"),
        ({"timeout": 0}, "timeout"),
        ({"maxtokens": 3}, "maxtokens"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else value,
)
def test_wrong_values_name_their_field(client: httpx.Client, values: dict[str, Any], field: str) -> None:
    response = client.post("/answer", json={"query": QUERY, "passages": ["text"], **values})
    assert response.status_code == 422
    assert error(response)["field"] == field
    assert error(response)["code"] == "invalid_input"


@pytest.mark.parametrize(
    ("values", "message", "limit"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: must be greater than or equal to 1", None),
        ({"mode": "fast"}, "mode: must be 'compressed', 'text', 'hybrid' or 'auto'", None),
        ({"passages": []}, "passages: has too few items: give at least 1", None),
        ({"passages": [3]}, "passages.0: must be a text or an object", None),
        ({"passages": [{"id": "x" * 300, "text": "b"}]}, "passages.0.id: is over the limit of 256 characters", 256),
        ({"stop": [""]}, "stop.0: has too few characters: give at least 1", None),
        ({"stop": ["x" * 300]}, "stop.0: is over the limit of 256 characters", 256),
        ({"max_tokens": 8}, "max_tokens: unknown field; did you mean max_new_tokens?", None),
        ({"maxNewTokens": 8}, "maxNewTokens: unknown field; did you mean max_new_tokens?", None),
        ({"temprature": 1}, "temprature: unknown field; did you mean temperature?", None),
        ({"top_n": 1}, "top_n: unknown field", None),
        ({"passages": [{"content": "a"}]}, "passages.0.content: unknown field; did you mean text?", None),
        (
            {"passages": ["a", {"page_content": "a"}]},
            "passages.1.page_content: unknown field; did you mean text?",
            None,
        ),
    ],
)
def test_messages_say_what_to_change(
    client: httpx.Client, values: dict[str, Any], message: str, limit: int | None
) -> None:
    found = error(client.post("/answer", json={"query": QUERY, "passages": ["text"], **values}))
    assert (found["message"], found["limit"]) == (message, limit)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/answer", {"question": "a", "passages": ["b"]}, "question: unknown field; did you mean query?"),
        ("/answer", {"query": "a", "contexts": ["b"]}, "contexts: unknown field; did you mean passages?"),
        ("/compress", {"query": "a", "documents": ["b"]}, "documents: unknown field; did you mean passages?"),
        ("/rerank", {"querry": "a", "passages": ["b"]}, "querry: unknown field; did you mean query?"),
        ("/v1/rerank", {"query": "a", "passages": ["b"]}, "passages: unknown field; did you mean documents?"),
        (
            "/v1/rerank",
            {"query": "a", "documents": [{"content": "b"}]},
            "documents.0.text: is required; content is not read",
        ),
        ("/v1/chat/completions", {"model": "scaledown", "query": "a"}, "query: unknown field; did you mean messages?"),
        (
            "/v1/completions",
            {"prompt": "a", "max_new_tokens": 1},
            "max_new_tokens: unknown field; did you mean max_tokens?",
        ),
    ],
)
def test_a_field_by_another_name_is_told_before_the_one_that_is_missing(
    client: httpx.Client, path: str, body: dict[str, Any], message: str
) -> None:
    found = client.post(path, json=body).json()["error"]
    assert found["message"] == message
    assert found.get("field", found.get("param")) == message.partition(":")[0]


@pytest.mark.parametrize("name", ["x" * 100_000, "a\ud800b", "a\nb\x1b[31m"])
def test_an_unknown_name_is_repeated_short_and_printable(client: httpx.Client, name: str) -> None:
    response = client.post("/answer", content=json.dumps({"query": "a", "passages": ["b"], name: 1}), headers=JSON)
    assert response.status_code == 422
    found = error(response)
    assert found["field"].isprintable()
    assert found["field"][0] == name[0]
    assert len(found["message"]) < 100


@pytest.mark.parametrize("path", ["/answer", "/rerank", "/compress"])
@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (rb'{"query": "a\ud800", "passages": ["b"]}', "query"),
        (rb'{"query": "a", "passages": ["b\udfff"]}', "passages.0"),
        (rb'{"query": "a", "passages": [{"title": "\ud83d", "text": "b"}]}', "passages.0.title"),
        (b"{}", "query"),
        (b'{"query": "a"}', "passages"),
        (b"[]", "body"),
        (b"null", "body"),
        (b"", "body"),
    ],
)
def test_malformed_text_names_its_field(client: httpx.Client, path: str, raw: bytes, field: str) -> None:
    response = client.post(path, content=raw, headers=JSON)
    assert response.status_code == 422
    assert error(response)["field"] == field


@pytest.mark.parametrize(
    "raw", [b"{", b"nul", b'{"query": "a" "b"}', b"\xff", b'{"query": NaN', b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_is_refused(client: httpx.Client, raw: bytes) -> None:
    response = client.post("/answer", content=raw, headers=JSON)
    assert response.status_code in (400, 422)
    error(response)


@pytest.mark.parametrize("piece", [b'\\"', b'"', b"\\", b'"a', b"[]"])
def test_a_large_body_that_is_no_json_is_refused_at_once(client: httpx.Client, piece: bytes) -> None:
    raw = b"[" + b"{}," * 20 + b'"' + piece * 1_000_000  # in quadratic time: hours
    response = client.post("/answer", content=raw, headers=JSON)
    assert response.status_code in (413, 422)
    error(response)


@pytest.mark.parametrize("part", ["[]", "{}", '"a"', '"a\\"b"'])
def test_absurdly_many_parts_are_refused_before_they_are_read(client: httpx.Client, part: str) -> None:
    raw = '{"query": "a", "passages": [' + ",".join([part] * 100_000) + "]}"
    response = client.post("/answer", content=raw, headers=JSON)
    assert response.status_code == 413
    assert (error(response)["field"], error(response)["limit"]) == ("body", 100_000)


def test_a_compressed_body_is_refused_by_its_name(client: httpx.Client) -> None:
    raw = gzip.compress(json.dumps({"query": "a", "passages": ["b"]}).encode())
    response = client.post("/rerank", content=raw, headers={**JSON, "Content-Encoding": "gzip"})
    assert response.status_code == 415
    assert error(response)["message"] == "send the body as it is, without Content-Encoding"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_json_in_another_encoding_is_refused_unread(client: httpx.Client, encoding: str) -> None:
    # Python's parser reads it, and the quote that the escape hides is another one in these bytes.
    raw = ('{"query": "\\"", "passages": [' + ",".join(["[]"] * 150_000) + "]}").encode(encoding)
    response = client.post("/answer", content=raw, headers=JSON)
    assert response.status_code == 415
    assert "UTF-8" in error(response)["message"]


@pytest.mark.parametrize("value", ["0", "null", "1e-3"])
def test_absurdly_many_numbers_are_refused_before_they_are_read(client: httpx.Client, value: str) -> None:
    raw = '{"query": "a", "passages": [{"embeddings": {"data": [[' + ",".join([value] * 250_100) + "]]}}]}"
    response = client.post("/answer", content=raw, headers=JSON)
    assert response.status_code == 413
    assert (error(response)["field"], error(response)["limit"]) == ("body", 250_000)
    assert "base64" in error(response)["message"]


def test_commas_in_a_text_are_no_numbers(client: httpx.Client) -> None:
    response = client.post("/rerank", json={"query": "a", "passages": ["b", "1," * 190_000, ", " * 190_000]})
    assert error(response)["message"].startswith("passages: ")  # too many tokens, which is known only once it was read


def test_brackets_and_quotes_in_a_text_are_no_parts(client: httpx.Client) -> None:
    passage = "[{" * 60_000 + '"]' * 110_000 + "\\"
    response = client.post("/rerank", json={"query": "a", "passages": ["b", passage]})
    assert error(response)["message"].startswith("passages: ")  # too many tokens, which is known only once it was read


MANY: list[Any] = [1] * 60_000


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (AnswerRequest, {f"unknown{i}": 1 for i in range(60_000)}),
        (AnswerRequest, {"passages": [{"text": "a"} | {f"unknown{i}": 1 for i in range(60_000)}]}),
        (AnswerRequest, {"stop": MANY}),
        (RerankRequest, {"passages": MANY}),
        (ChatRequest, {"stop": MANY}),
        (ChatRequest, {"modalities": MANY}),
        (ChatRequest, {"documents": MANY}),
        (ChatRequest, {"messages": MANY}),
        (ChatRequest, {"logit_bias": {str(i): [] for i in range(60_000)}}),
        (CompletionRequest, {"prompt": MANY}),
        (JinaRequest, {"documents": MANY}),
        (JinaRequest, {"rank_fields": MANY}),
        (CohereRequest, {"documents": MANY}),
        (TeiRequest, {"texts": MANY}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
)
def test_many_mistakes_are_not_all_collected(kind: type[BaseModel], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(values)
    required = sum(field.is_required() for field in kind.model_fields.values())
    assert caught.value.error_count() <= required + 1  # an error takes memory and time, and only one is told


def test_of_many_unknown_fields_the_first_is_named(client: httpx.Client) -> None:
    body = {"passages": ["b"]} | {f"unknown{i}": 1 for i in range(100)} | {"query": "a"}
    assert error(client.post("/answer", json=body))["field"] == "unknown0"


def test_infinite_numbers_are_refused(client: httpx.Client) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        raw = f'{{"query": "a", "passages": ["b"], "temperature": {number}}}'
        response = client.post("/answer", content=raw, headers=JSON)
        assert response.status_code == 422
        assert error(response)["field"] == "temperature"


@pytest.mark.parametrize(
    ("values", "field", "limit"),
    [
        ({"passages": ["x"] * 4}, "passages", 3),
        ({"passages": ["x" * 501]}, "passages.0.text", 500),
        ({"query": "x" * 51}, "query", 50),
        ({"max_new_tokens": 11}, "max_new_tokens", 10),
        ({"stop": ["a", "b", "c"]}, "stop", 2),
        ({"timeout": 20}, "timeout", 10),
        ({"passages": ["one two three four five six seven eight"]}, "passages", 6),
    ],
)
def test_limits_are_named(serve: Serve, values: dict[str, Any], field: str, limit: int) -> None:
    limits = {
        "max_passages": 3,
        "max_passage_chars": 500,
        "max_query_chars": 50,
        "max_new_tokens": 10,
        "max_stop": 2,
        "max_timeout_seconds": 10,
        "max_request_tokens": 6,
    }
    with serve(**limits) as client:
        response = client.post("/answer", json={"query": "a", "passages": ["b"], "max_new_tokens": 1, **values})
        assert response.status_code == 413
        assert error(response)["field"] == field
        assert error(response)["limit"] == limit


def test_other_errors_have_the_same_shape(client: httpx.Client) -> None:
    for response, status, code in [
        (client.get("/nothing"), 404, "not_found"),
        (client.post("/answer/", json={}), 404, "not_found"),  # never a redirect to whatever Host says
        (client.get("/answer"), 405, "method_not_allowed"),
        (client.delete("/answer"), 405, "method_not_allowed"),
        (client.post("/answer", content=b"a=b", headers={"Content-Type": "text/plain"}), 415, "unsupported_media_type"),
        (client.post("/answer", content=b"[" * 5000, headers=JSON), 413, "too_large"),
    ]:
        assert response.status_code == status
        assert error(response)["code"] == code


def test_errors_do_not_repeat_the_callers_text(client: httpx.Client) -> None:
    response = client.post("/answer", json={"query": QUERY, "passages": ["b"], "mode": "SECRET-MODE"})
    assert "SECRET" not in response.text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["query", "passages", "mode", "rate", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop"]
FIELDS = st.sampled_from([*NAMES, "stream", "timeout", "hybrid_top", "no_such_field"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(FIELDS, VALUES, max_size=4), path=st.sampled_from(["/answer", "/rerank", "/compress"]))
def test_no_json_makes_the_service_fail(client: httpx.Client, values: dict[str, Any], path: str) -> None:
    defaults = {"query": "a", "passages": ["b"]} | ({"max_new_tokens": 1} if path == "/answer" else {})
    body = {**defaults, **values}
    response = client.post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code in (200, 413, 422)
    if response.status_code != 200:
        error(response)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200) | st.text(alphabet='{}[]",:0123eE-+.\\u tfn', max_size=60).map(str.encode))
def test_no_bytes_make_the_service_fail(client: httpx.Client, raw: bytes) -> None:
    response = client.post("/answer", content=raw, headers=JSON)
    assert response.status_code in (400, 413, 415, 422)  # 415: zeros make it look like UTF-16
    error(response)


def test_the_service_still_works_afterwards(client: httpx.Client) -> None:
    assert answer(client)["passages"][1]["id"] == PASSAGES[1]["id"]
