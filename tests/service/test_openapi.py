"""The OpenAPI document: complete, and its examples work as they stand."""

from typing import Any

import httpx
import pytest

PATHS = ["/answer", "/rerank", "/compress"]


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema a reference points at."""
    name = schema["$ref"].removeprefix("#/components/schemas/")
    return dict(document["components"]["schemas"][name])


@pytest.mark.parametrize("path", PATHS)
def test_the_examples_are_good_requests(client: httpx.Client, path: str) -> None:
    document = client.get("/openapi.json").json()
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    properties = resolve(document, content["schema"])["properties"]
    body = {name: value["examples"][0] for name, value in properties.items() if "examples" in value}
    assert {"query", "passages"} <= set(body)
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", PATHS)
def test_every_error_has_the_one_shape(client: httpx.Client, path: str) -> None:
    document = client.get("/openapi.json").json()
    responses = document["paths"][path]["post"]["responses"]
    assert {"200", "401", "403", "408", "413", "415", "422", "429", "500", "503", "504"} == set(responses)
    for status, response in responses.items():
        if status != "200":
            assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
