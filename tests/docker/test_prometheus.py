"""A real Prometheus scrapes what a service container runs: all queries of the dashboard find data, all rules are valid.

Runs where Debian's `prometheus` is installed; nothing else shows that a query finds what the service reports.
"""

import contextlib
import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig
from core.model import build_model
from tests.e2e.test_process import running
from tests.free_port import free_port

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="Debian's prometheus is not installed")
DOCKER = Path(__file__).parent.parent.parent / "docker"
MONITORING = DOCKER / "monitoring"
KEY = "key-of-the-admin"
PASSAGES = ["Iron melts at 1538 degrees Celsius. " * 4, "The moon moves around the earth in 27 days."]
SECONDS = 60


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of `condition`, which may fail to connect until then."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if value := condition():
                return value
        time.sleep(0.1)
    raise AssertionError(f"{what}: still not after {SECONDS} s")


@pytest.fixture(scope="module")
def service(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of the process that a service container starts, with a tiny model and a key from a secret file."""
    config = Config(
        compressor=CompressorConfig(n_layers=2, chunk_tokens=64, rates=(16,), order="document_first"),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
    )
    folder = tmp_path_factory.mktemp("container")
    save_checkpoint(build_model(config), folder / "checkpoint")
    (folder / "scaledown_admin_key").write_text(f"{KEY}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRETS_DIR", str(folder))
        with running(folder / "checkpoint", command=[str(DOCKER / "start_service.py")]) as (_, client, _):
            client.timeout = SECONDS
            yield client


def send_requests(service: httpx.Client) -> None:
    """One of each kind: three routes, a kept embedding found again, and a refused request."""
    body = {"query": "When does iron melt?", "passages": PASSAGES}
    assert service.post("/answer", json={**body, "max_new_tokens": 4}).status_code == 200
    assert service.post("/rerank", json=body).status_code == 200
    compressed = service.post("/compress", json={**body, "store": True}).json()
    kept = [{"embedding_id": passage["embedding_id"]} for passage in compressed["passages"]]
    again = {"query": body["query"], "passages": kept, "max_new_tokens": 4}
    assert service.post("/answer", json=again).status_code == 200
    assert service.post("/answer", json={}).status_code == 422


def refuse_checkpoint(service: httpx.Client) -> None:
    """Have the service refuse a checkpoint, once."""
    swap = {"action": "activate", "name": "not-there"}
    assert service.post("/admin/checkpoints", json=swap, headers={"X-API-Key": KEY}).status_code >= 400


@pytest.fixture(scope="module")
def prometheus(service: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a Prometheus with our configuration and rules that has scraped the service under load.

    Only what a container changes is changed: the target's address, and seconds where production has a quarter minute.
    """
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / "alerts.yml")]
    job = config["scrape_configs"][0]
    config["scrape_configs"] = [job]  # there is no vLLM here
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{service.base_url.port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS, trust_env=False) as client:
            wait_for(lambda: client.get("/-/ready").status_code == 200, "Prometheus is ready")
            wait_for(lambda: query(client, 'up{job="scaledown"} == 1'), "Prometheus scrapes the service")
            refuse_checkpoint(service)
            end = time.monotonic() + 5  # several scrapes, so that rates have something to compare
            while time.monotonic() < end:
                send_requests(service)
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait(SECONDS)


def query(prometheus: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """Series that an instant query returns."""
    body = prometheus.get("/api/v1/query", params={"query": expression}).json()
    assert body["status"] == "success", (expression, body)
    return list(body["data"]["result"])


def test_every_query_of_the_dashboard_returns_data(prometheus: httpx.Client) -> None:
    dashboard = json.loads((MONITORING / "grafana" / "scaledown.json").read_text())
    targets = [(panel["title"], target) for panel in dashboard["panels"] for target in panel.get("targets", ())]
    empty = []
    for title, target in targets:
        # What Grafana puts in for an hour on the screen, here for seconds.
        expression = target["expr"].replace("$__rate_interval", "30s").replace("$__range", "1m")
        series = query(prometheus, expression)
        if not series or not all(math.isfinite(float(one["value"][1])) for one in series):
            empty.append((title, expression, series))
    assert targets
    assert not empty


def test_every_alert_can_be_evaluated(prometheus: httpx.Client) -> None:
    def evaluated() -> list[dict[str, Any]]:
        groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else []

    rules = wait_for(evaluated, "all rules are evaluated")
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    firing = {rule["name"] for rule in rules if rule["state"] == "firing"}
    assert firing <= {"ScaledownCheckpointRefused"}  # which the requests above provoke
    # The generator is in the process: its alert, which takes longer than this test, does not wait to fire either.
    assert [rule["state"] for rule in rules if rule["name"] == "ScaledownGeneratorDown"] == ["inactive"]


def test_the_first_refused_checkpoint_raises_its_alert(prometheus: httpx.Client) -> None:
    alert = 'ALERTS{alertname="ScaledownCheckpointRefused",alertstate="firing"}'
    assert wait_for(lambda: query(prometheus, alert), "the alert fires")
