"""Keys, headers, bodies that are too large, too slow or too many, and what is never shown."""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from pydantic import ValidationError

from core.errors import ConfigError
from service.__main__ import read_settings
from service.exit_status import REFUSED
from service.logs import JsonFormatter
from service.server import PatientProtocol
from service.settings import Settings, check_environment
from tests.service.calls import PASSAGES, QUERY, error
from tests.service.conftest import Serve, make_settings

KEY, OTHER, ADMIN = "alpha-0123456789abcdef", "beta-0123456789abcdef", "admin-0123456789abcdef"
BODY = {"query": QUERY, "passages": PASSAGES}

HEAD = "POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_guard_everything_but_health(serve: Serve) -> None:
    hashed = "sha256:" + hashlib.sha256(OTHER.encode()).hexdigest()
    with serve(api_keys=f"{KEY},{hashed}") as client:
        for path in ("/livez", "/readyz", "/health", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 200
        refused = client.post("/rerank", json=BODY)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        error(refused)
        for wrong in ("nonsense", KEY + "x", hashed, hashed.removeprefix("sha256:"), ADMIN):
            assert client.post("/rerank", json=BODY, headers=bearer(wrong)).status_code in (401, 403)
        for path in ("/answer/", "/answer%2F", "/nothing"):
            assert client.post(path, json=BODY).status_code == 401
        assert client.post("/rerank", json=BODY, headers=bearer(KEY)).status_code == 200
        assert client.post("/rerank", json=BODY, headers=bearer(OTHER)).status_code == 200
        assert client.post("/rerank", json=BODY, headers={"X-API-Key": OTHER}).status_code == 200


def test_a_websocket_is_a_request_like_any_other(serve: Serve) -> None:
    handshake = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    with serve(api_keys=KEY) as client:
        refused = client.get("/answer?text", headers=handshake)
        assert (refused.status_code, error(refused)["code"]) == (401, "unauthorized")
        assert client.get("/answer", headers={**handshake, **bearer(KEY)}).status_code == 405


def test_a_key_may_hold_any_character(serve: Serve) -> None:
    key = "schlüssel-日本-0123456789"
    with serve(api_keys=key) as client:
        assert client.post("/rerank", json=BODY, headers={b"X-API-Key": key.encode()}).status_code == 200
        assert client.post("/rerank", json=BODY, headers={b"X-API-Key": key[:-1].encode()}).status_code == 403


def test_admin_is_absent_without_its_key_and_closed_to_others(serve: Serve) -> None:
    with serve(api_keys=KEY) as client:
        assert client.get("/admin/checkpoints", headers=bearer(KEY)).status_code == 404
    with serve(api_keys=KEY, admin_key=ADMIN) as client:
        assert client.get("/admin/checkpoints").status_code == 401
        assert client.get("/admin/checkpoints", headers=bearer(KEY)).status_code == 403
        assert client.get("/admin/checkpoints", headers=bearer(ADMIN)).status_code == 200
        assert client.post("/rerank", json=BODY, headers=bearer(ADMIN)).status_code == 403


def test_keys_are_asked_for_under_a_root_path_too(serve: Serve) -> None:
    with serve(api_keys=KEY) as client:
        client.app.root_path = "/rag"  # type: ignore[attr-defined]  # as a proxy that serves the application below it
        assert client.get("/rag/admin/checkpoints", headers=bearer(KEY)).status_code == 404
    with serve(api_keys=KEY, admin_key=ADMIN) as client:
        client.app.root_path = "/rag"  # type: ignore[attr-defined]
        for path in ("/livez", "/readyz", "/health", "/metrics", "/openapi.json", "/", "/page/page.js"):
            assert client.get(f"/rag{path}").status_code == 200
        for path in ("/rag/admin/checkpoints", "/admin/checkpoints", "/rag/admin", "/rag/admin/x"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers=bearer(KEY)).status_code == 403
        assert client.get("/rag/admin/checkpoints", headers=bearer(ADMIN)).status_code == 200
        assert client.post("/rag/rerank", json=BODY).status_code == 401
        assert client.post("/rag/rerank", json=BODY, headers=bearer(KEY)).status_code == 200
        refused = client.post("/rag/v2/rerank", json={}, headers=bearer(KEY))
        assert (refused.status_code, set(refused.json())) == (400, {"message"})
        assert 'scaledown_requests_total{route="/rerank",status="200"} 1.0' in client.get("/rag/metrics").text


def test_headers(client: httpx.Client) -> None:
    response = client.get("/livez", headers={"X-Request-Id": "abc-1.2_3", "Origin": "https://elsewhere.example"})
    assert response.headers["x-request-id"] == "abc-1.2_3"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "access-control-allow-origin" not in response.headers
    for bad in ("a b", "x" * 129, "<script>"):
        assert client.get("/livez", headers={"X-Request-Id": bad}).headers["x-request-id"] != bad


def test_a_body_over_the_limit_is_refused_by_what_it_declares(serve: Serve) -> None:
    with serve(max_body_bytes=1000) as client:
        response = client.post("/rerank", json={**BODY, "query": "x" * 2000})
        assert response.status_code == 413
        assert error(response)["field"] == "body"
        assert error(response)["limit"] == 1000


def test_a_body_over_the_limit_is_refused_while_it_arrives(serve: Serve) -> None:
    with serve(max_body_bytes=1000) as client, connect(client) as connection:
        head = (
            "POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        for _ in range(3):
            connection.sendall(b"190\r\n" + b"x" * 400 + b"\r\n")  # 0x190 = 400; the last chunk never comes
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_trickles_in_is_given_up(serve: Serve) -> None:
    with serve(body_seconds=0.3) as client, connect(client) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        began = time.monotonic()
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 5


def test_a_head_that_trickles_in_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.3)
    with serve() as client:
        for first in (b"", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"):  # on a fresh connection, and after a request
            with connect(client) as connection:
                if first:
                    connection.sendall(first)
                    received = b""
                    while b"alive" not in received:
                        received += connection.recv(4096)
                connection.sendall(b"GET /livez HTTP/1.1\r\nX-Slow: ")
                began = time.monotonic()
                assert connection.recv(4096) == b""
                assert time.monotonic() - began < 5
        assert client.get("/livez").status_code == 200


def test_bodies_in_memory_have_a_common_limit(serve: Serve) -> None:
    with serve(max_buffered_bytes=10_000, body_seconds=5) as client:
        with connect(client) as connection:
            connection.sendall(f"{HEAD}Content-Length: 9995\r\n\r\n{{".encode())
            time.sleep(0.2)
            assert client.post("/rerank", json=BODY).status_code == 200  # what has only been announced takes no room
            connection.sendall(b" " * 9989)
            time.sleep(0.2)
            refused = client.post("/rerank", json=BODY)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
        time.sleep(0.2)
        assert client.post("/rerank", json=BODY).status_code == 200


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10)


def test_logs_hold_no_passages_and_no_keys(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), serve(api_keys=KEY) as client:
        body = {"query": "a very private query", "passages": ["a very private passage"]}
        client.post("/rerank", json=body, headers={**bearer(KEY), "X-Request-Id": "find-me"})
        client.post("/rerank", json={**body, "mode": "private"}, headers=bearer(KEY))
        client.post("/rerank", json={**body, "private": 1}, headers=bearer(KEY))
        client.post("/rerank", json={**body, "passages": ["a private passage"] * 201}, headers=bearer(KEY))
    ours = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("service")]
    lines = [json.loads(line) for line in ours]
    asked = [(line["status"], line.get("error"), line.get("field")) for line in lines if line.get("route") == "/rerank"]
    refused = (422, "invalid_input", None)
    assert asked == [(200, None, None), refused, refused, (413, "too_large", "passages")]
    assert [line["limit"] for line in lines if "limit" in line] == [200]
    assert not any("private" in line or KEY in line for line in ours)


def test_settings_hide_their_secrets() -> None:
    settings = make_settings(api_keys=KEY, admin_key=ADMIN)
    assert KEY not in repr(settings)
    assert ADMIN not in settings.model_dump_json()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"no_such_setting": 1}, "no_such_setting"),
        ({"api_keys": "short"}, "api_keys"),
        ({"admin_key": "sha256:nothex0123456789"}, "admin_key"),
        ({"port": 70000}, "port"),
        ({"max_passages": 0}, "max_passages"),
        ({"overload_status": 500}, "overload_status"),
        ({"device": "tpu"}, "device"),
        ({"earlier_messages": "drop"}, "earlier_messages"),
        ({"served_model_names": "gpt 4"}, "served_model_names"),
        ({"served_model_names": "x" * 129}, "served_model_names"),
        ({"served_model_names": ",".join(f"model-{i}" for i in range(17))}, "served_model_names"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds"),
    ],
)
def test_wrong_settings_are_refused_by_name(values: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_settings(**values)
    assert caught.value.errors()[0]["loc"][0] == field


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEDOWN_PORT", "9000")
    monkeypatch.setenv("SCALEDOWN_API_KEYS", f"{KEY}, {OTHER}")
    monkeypatch.setenv("SCALEDOWN_SERVED_MODEL_NAMES", "gpt-4o-mini, org/name")
    assert Settings().port == 9000
    assert [key.get_secret_value() for key in Settings().api_keys] == [KEY, OTHER]
    assert Settings().served_model_names == ("gpt-4o-mini", "org/name")
    check_environment()
    monkeypatch.setenv("SCALEDOWN_MAX_PASAGES", "3")
    with pytest.raises(ConfigError, match="SCALEDOWN_MAX_PASAGES"):
        check_environment()


def test_a_clients_key_does_not_leave_the_service_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEDOWN_API_KEY", KEY)
    assert read_settings([]).api_keys == ()  # nobody else can reach it
    with pytest.raises(ConfigError, match="SCALEDOWN_API_KEYS"):
        read_settings(["--host", "0.0.0.0"])
    monkeypatch.setenv("SCALEDOWN_API_KEYS", OTHER)
    assert read_settings(["--host", "0.0.0.0"]).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "keys", "said"), [("0.0.0.0", "", True), ("0.0.0.0", KEY, False), ("127.0.0.2", "", False)]
)
def test_the_log_says_that_anyone_may_call(host: str, keys: str, said: bool) -> None:
    with socket.create_server((host, 0)) as taken:  # so that the start ends before any model is loaded
        command = [sys.executable, "-m", "service", "--host", host, "--port", str(taken.getsockname()[1])]
        ended = subprocess.run(
            command, env={**os.environ, "SCALEDOWN_API_KEYS": keys}, capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == REFUSED
    assert ("SCALEDOWN_API_KEYS" in ended.stdout + ended.stderr) == said


def test_a_variable_set_to_nothing_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHECKPOINT", "PORT", "ADMIN_KEY", "API_KEYS"):
        monkeypatch.setenv(f"SCALEDOWN_{name}", "")
    settings = Settings()
    assert settings.checkpoint is None
    assert settings.port == 8000
    assert settings.admin_key is None
    assert settings.api_keys == ()
