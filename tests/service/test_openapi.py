"""The OpenAPI document: complete, and its examples work as they stand."""

from typing import Any

import httpx
import pytest

PATHS = ["/answer", "/rerank", "/compress"]
DIALECTS = ["/v1/rerank", "/v2/rerank", "/v1/chat/completions", "/v1/completions"]


def bodies(document: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """The schemas of the bodies that an endpoint takes."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = [each["$ref"].removeprefix("#/components/schemas/") for each in schema.get("oneOf", [schema])]
    return [document["components"]["schemas"][name] for name in names]


@pytest.mark.parametrize("path", PATHS + DIALECTS)
def test_the_examples_are_good_requests(client: httpx.Client, path: str) -> None:
    for schema in bodies(client.get("/openapi.json").json(), path):
        body = {name: value["examples"][0] for name, value in schema["properties"].items() if "examples" in value}
        assert set(schema["required"]) <= set(body)
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", PATHS + DIALECTS)
def test_null_is_the_same_as_leaving_a_field_out(client: httpx.Client, path: str) -> None:
    for schema in bodies(client.get("/openapi.json").json(), path):
        fields, needed = schema["properties"], ["documents", *schema["required"]]  # of chat, `messages` may hold them
        body = {name: fields[name]["examples"][0] for name in needed if name in fields}
        nulls: dict[str, Any] = {name: None for name in fields if name not in body}
        for name in nulls:
            kinds = fields[name].get("anyOf", [fields[name]])
            assert any(kind.get("type", "null") == "null" for kind in kinds), name
        left_out, given = client.post(path, json=body), client.post(path, json={**nulls, **body})
        assert (left_out.status_code, given.status_code) == (200, 200), given.text
        if path == "/answer":
            assert given.json()["answer"] == left_out.json()["answer"]


@pytest.mark.parametrize("path", PATHS)
def test_every_error_has_the_one_shape(client: httpx.Client, path: str) -> None:
    document = client.get("/openapi.json").json()
    responses = document["paths"][path]["post"]["responses"]
    dialects = {"400", "424"}  # as Jina and TEI say it
    statuses = {"401", "403", "404", "408", "413", "415", "422", "429", "500", "503", "504"}
    assert {"200", *statuses} == set(responses) - dialects
    assert responses["401"]["description"] == "no key"
    assert set(responses["429"]["headers"]) == {"Retry-After"}
    for status, response in responses.items():
        schema = response["content"]["application/json"]["schema"]
        if path == "/rerank" and status not in {"200", *dialects}:
            schema = schema["anyOf"][0]  # the others are TEI's and Jina's, to those who ask as their clients do
        if status not in {"200", *dialects}:
            assert schema["$ref"].endswith("/ErrorResponse")


def test_keys_headers_and_names_for_generated_clients(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operations = {
        (path, method): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    for (path, _), operation in operations.items():
        is_open = path in ("/livez", "/readyz", "/health", "/metrics")
        key = "admin_key" if path.startswith("/admin") else "api_key"
        assert operation.get("security", []) == ([] if is_open else [{key: []}])
    for path in PATHS + DIALECTS:
        names = {each["name"] for each in operations[path, "post"]["parameters"] if each["in"] == "header"}
        assert names == {"X-Checkpoint", "X-Request-Id"}
    called = [operation["operationId"] for operation in operations.values()]
    assert len(set(called)) == len(called)
    assert {"answer", "rerank", "compress", "chat", "health", "readyz"} <= set(called)
