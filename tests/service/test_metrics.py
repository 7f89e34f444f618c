"""What `/metrics` says: every family that was promised, true to what was served, and summed over processes."""

import contextlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.calls import PASSAGES, QUERY, answer
from tests.service.conftest import Serve
from tests.service.test_lifecycle import LONG
from tests.waiting import wait_for

PROMISED = {
    "requests": "scaledown_requests_total",
    "errors by code": "scaledown_errors_total",
    "queue depth": "scaledown_requests_in_stage",
    "queue wait, stage durations": "scaledown_stage_seconds",
    "batch sizes": "scaledown_compress_batch_rows",
    "batch tokens": "scaledown_compress_batch_tokens",
    "padding share": "scaledown_compress_padding_share",
    "answers in a step": "scaledown_decode_sequences",
    "time to first token": "scaledown_time_to_first_token_seconds",
    "tokens in": "scaledown_prompt_tokens_total",
    "tokens out": "scaledown_completion_tokens_total",
    "tokens saved": "scaledown_tokens_saved_total",
    "compression rate": "scaledown_compression_rate",
    "relevance": "scaledown_relevance",
    "caches": "scaledown_cache_lookups_total",
    "swaps": "scaledown_checkpoint_swaps_total",
    "version": "scaledown_checkpoint_info",
    "build": "scaledown_build_info",
    "memory of weights": "scaledown_model_bytes",
    "memory of the process": "process_resident_memory_bytes",
    "workers": "scaledown_worker_exits_total",
}


def value(client: httpx.Client, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_every_promised_family_is_there(client: httpx.Client) -> None:
    families = set(re.findall(r"^# TYPE (\S+)", client.get("/metrics").text, re.MULTILINE))
    assert {what for what, name in PROMISED.items() if name not in families} == set()


def test_tokens_are_those_of_the_responses(serve: Serve) -> None:
    with serve() as client:
        usages = [answer(client, mode=mode)["usage"] for mode in ("compressed", "hybrid", "text")]
        label = '{checkpoint="untrained"}'
        for series, field in (
            ("prompt", "prompt_tokens"),
            ("completion", "completion_tokens"),
            ("text", "text_tokens"),
        ):
            assert value(client, f"scaledown_{series}_tokens_total{label}") == sum(usage[field] for usage in usages)
        saved = sum(max(0, usage["tokens_saved"]) for usage in usages)
        assert value(client, f"scaledown_tokens_saved_total{label}") == saved > 0
        assert value(client, "scaledown_model_bytes") > 100_000
        assert value(client, 'scaledown_stage_seconds_count{stage="queue"}') == len(usages)


def test_the_limits_are_beside_what_is_taken_of_them(serve: Serve) -> None:
    with serve(max_requests=7, max_tokens_in_flight=5000) as client:
        assert value(client, "scaledown_requests_limit") == 7
        assert value(client, "scaledown_reserved_tokens_limit") == 5000


def test_the_queue_is_seen_while_it_lasts(serve: Serve) -> None:
    with serve(max_sequences=1) as client:
        bodies = [LONG, LONG]
        asking = [threading.Thread(target=client.post, args=("/answer",), kwargs={"json": body}) for body in bodies]
        for thread in asking:
            thread.start()
        # One writes its answer, the other waits for the only slot.
        wait_for(lambda: value(client, 'scaledown_requests_in_stage{stage="decode"}') == 1)
        wait_for(lambda: value(client, 'scaledown_requests_in_stage{stage="first_token"}') == 1, 30)
        for thread in asking:
            thread.join(60)
        wait_for(lambda: value(client, "scaledown_requests_in_flight") == 0)
        assert value(client, 'scaledown_requests_in_stage{stage="decode"}') == 0


def test_errors_are_counted_by_code(serve: Serve) -> None:
    with serve() as client:
        client.post("/answer", json={"query": QUERY, "passages": PASSAGES, "timeout": 0.001})
        client.post("/rerank", json={"query": QUERY})
        assert value(client, 'scaledown_errors_total{code="deadline"}') == 1
        assert value(client, 'scaledown_errors_total{code="invalid_input"}') == 1


def test_what_never_reaches_a_route_is_counted_once(serve: Serve) -> None:
    with serve(api_keys="alpha-0123456789abcdef", max_body_bytes=1000) as client:
        key = {"X-API-Key": "alpha-0123456789abcdef"}
        client.post("/v1/rerank", json={})
        client.post("/rerank", json={}, headers={"X-API-Key": "another-key-0123456789"})
        client.post("/rerank", json={"query": "x" * 2000}, headers=key)
        client.post("/rerank", content=b"x", headers={**key, "Content-Type": "text/plain"})
        client.get("/admin/checkpoints")
        client.get("/nothing", headers=key)
        client.get("/rerank", headers=key)
        codes = {"unauthorized": 1, "forbidden": 1, "too_large": 1, "unsupported_media_type": 1}
        codes |= {"not_found": 2, "method_not_allowed": 1}
        found = re.findall(r'^scaledown_errors_total{code="(\w+)"} (\S+)$', client.get("/metrics").text, re.MULTILINE)
        assert {code: float(count) for code, count in found} == codes


@pytest.mark.parametrize("whole", [True, False], ids=["whole body", "half a body"])
def test_a_client_that_leaves_is_no_failure_of_the_service(serve: Serve, whole: bool) -> None:
    with serve() as client:
        request = client.build_request("POST", "/answer", json=LONG)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        with socket.create_connection((request.url.host, request.url.port or 80)) as connection:
            body = request.read()
            connection.sendall(f"POST /answer HTTP/1.1\r\n{head}\r\n".encode() + body[: None if whole else -1])
            if whole:
                wait_for(lambda: value(client, "scaledown_requests_in_flight") == 1)
        wait_for(lambda: value(client, 'scaledown_requests_total{route="/answer",status="499"}') == 1)
        assert value(client, 'scaledown_errors_total{code="client_left"}') == 1
        assert 'status="503"' not in client.get("/metrics").text


ENDLESS = {**LONG, "max_new_tokens": 5000, "stream": True}


@contextlib.contextmanager
def being_written(client: httpx.Client) -> Iterator[None]:
    """A stream whose answer has begun, and which is left before its end."""
    with client.stream("POST", "/answer", json=ENDLESS) as response:
        lines = response.iter_lines()  # held: the stream is closed with it
        while next(lines) != "event: token":
            pass
        yield


def test_a_stream_that_is_left_counts_with_what_was_done(serve: Serve) -> None:
    label = '{checkpoint="untrained"}'
    with serve(max_new_tokens=5000) as client:
        with being_written(client):
            assert value(client, "scaledown_time_to_first_token_seconds_count") == 1
            assert value(client, "scaledown_requests_in_flight") == 1
        wait_for(lambda: value(client, 'scaledown_requests_total{route="/answer",status="499"}') == 1)
        assert value(client, 'scaledown_errors_total{code="client_left"}') == 1
        assert value(client, 'scaledown_requests_total{route="/answer",status="200"}') == 0
        assert value(client, "scaledown_time_to_first_token_seconds_count") == 1
        assert value(client, f"scaledown_prompt_tokens_total{label}") > 0
        assert 0 < value(client, f"scaledown_completion_tokens_total{label}") < 5000
        assert value(client, 'scaledown_stage_seconds_count{stage="decode"}') == 1


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_missed_deadline_counts_with_the_stage_it_was_missed_in(serve: Serve, stream: bool) -> None:
    with serve(max_sequences=1, max_new_tokens=5000) as client:
        with being_written(client):
            client.post("/answer", json={**ENDLESS, "stream": stream, "timeout": 0.5})  # waits for the only slot
            # Counted once all is sent: the client may know a moment before.
            wait_for(lambda: value(client, 'scaledown_errors_total{code="deadline"}') == 1)
            assert value(client, 'scaledown_stage_seconds_count{stage="first_token"}') == 1
            assert value(client, 'scaledown_stage_seconds_sum{stage="total"}') >= 0.5
            assert value(client, 'scaledown_prompt_tokens_total{checkpoint="untrained"}') == 0
        wait_for(lambda: value(client, "scaledown_requests_in_flight") == 0)
        assert value(client, "scaledown_time_to_first_token_seconds_count") == 1  # of the answer that had begun
        client.post("/answer", json={**ENDLESS, "stream": stream, "timeout": 1})
        wait_for(lambda: value(client, "scaledown_time_to_first_token_seconds_count") == 2)
        assert value(client, 'scaledown_stage_seconds_count{stage="decode"}') == 2
        assert value(client, 'scaledown_completion_tokens_total{checkpoint="untrained"}') > 1


WORKERS = """
import sys
from pathlib import Path
from service.shared_metrics import share_metrics
folder, number, kept = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
share_metrics(folder, number)
from service.metrics import Metrics
metrics = Metrics()
metrics.requests.labels("/answer", "200").inc(3)
metrics.in_flight.set(2)
metrics.generator_up.set(number == "0")
for version in ("old", *kept):
    metrics.completion_tokens.labels(version).inc(5)
    metrics.checkpoint.labels(version).set(1)
metrics.forget("old")
sys.stdout.buffer.write(metrics.render())
"""


def run_worker(folder: Path, number: str, *kept: str) -> str:
    command = [sys.executable, "-c", WORKERS, str(folder), number, *kept]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_processes_add_up_and_a_successor_goes_on_where_the_dead_one_was(tmp_path: Path) -> None:
    assert "scaledown_generator_up 1.0" in run_worker(tmp_path, "0", "new")
    text = run_worker(tmp_path, "1", "new")
    assert "scaledown_generator_up 0.0" in text  # one of two is not well: no sum
    assert 'scaledown_requests_total{route="/answer",status="200"} 6.0' in text
    assert "scaledown_requests_in_flight 4.0" in text
    assert 'scaledown_checkpoint_info{checkpoint="new"} 1.0' in text
    assert 'scaledown_completion_tokens_total{checkpoint="new"} 10.0' in text
    assert 'checkpoint="old"' not in text  # files keep it, but nobody has that version any more
    text = run_worker(tmp_path, "0", "new")
    assert 'scaledown_requests_total{route="/answer",status="200"} 9.0' in text
    assert len(list(tmp_path.glob("*_0.db"))) == len(list(tmp_path.glob("*_1.db")))
