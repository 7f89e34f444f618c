"""Requests that the service's tests share."""

import json
from typing import Any

import httpx

QUERY = "Who discovered polonium?"
PASSAGES: list[Any] = [
    "Marie Curie was born in Warsaw in 1867. She discovered polonium and radium together with her husband. " * 6,
    {"id": "bread", "title": "Bread", "text": "Bread is made of flour, water, salt and yeast."},
    {"text": "The moon moves around the earth in about 27 days."},
]


def answer(client: httpx.Client, **values: Any) -> dict[str, Any]:
    """A successful answer."""
    response = client.post("/answer", json={"query": QUERY, "passages": PASSAGES, "max_new_tokens": 8, **values})
    assert response.status_code == 200, response.text
    return dict(response.json())


def error(response: httpx.Response) -> dict[str, Any]:
    """The error in a response, once its shape is checked."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message", "field", "limit", "request_id"}
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    return dict(body["error"])


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream, comments left out."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith(":")]
        if lines:
            assert lines[0].startswith("event: ")
            assert lines[1].startswith("data: ")
            found.append((lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))))
    return found
