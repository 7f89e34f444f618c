"""Alert rules and the dashboard ask for metrics and labels that the service has, and the dashboard is whole."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from service.app import create_app
from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parent.parent.parent
MONITORING = ROOT / "docker" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "grafana" / "scaledown.json").read_text())
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
PROMETHEUS = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
NAMES = re.compile(r"\b(?:scaledown|process)_\w+|\bup\b")
SELECTORS = re.compile(r"(\w+)\{([^}]*)\}")
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
SCRAPED = {"job", "instance", "le"}  # labels that Prometheus and histograms add
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def metric_labels() -> dict[str, set[str]]:
    """Every series name of the service with the labels it may have."""
    found: dict[str, set[str]] = {"up": set()}
    metrics = Metrics()
    for family in metrics.registry.collect():
        # prometheus_client shows a metric's label names nowhere before it has samples.
        labels = next((m._labelnames for m in vars(metrics).values() if getattr(m, "_name", "") == family.name), ())
        found |= {name: set(labels) for name in names_of(family)}
    return found


def names_of(family: Metric) -> list[str]:
    """The names of a family's series."""
    return [family.name + suffix for suffix in SUFFIXES[family.type]]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything that Prometheus is asked."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


ASKED = list(expressions())


@pytest.mark.parametrize(("where", "expression"), ASKED, ids=[where for where, _ in ASKED])
def test_metrics_and_labels_exist(where: str, expression: str) -> None:
    known = metric_labels()
    # Values in quotes and names of labels are no metrics.
    names = set(NAMES.findall(re.sub(r'"[^"]*"', "", expression)))
    assert names, where
    assert names <= set(known)
    for name, selector in SELECTORS.findall(expression):
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= known[name] | SCRAPED
    labels = set().union(*(known[name] for name in names)) | SCRAPED
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= labels


def test_requests_are_counted_on_every_route_that_answers() -> None:
    """A new route, say another dialect, must not be missing from error rates."""
    paths = create_app(Settings.model_validate({})).openapi()["paths"]
    answering = {path for path, methods in paths.items() if "post" in methods and not path.startswith("/admin")}
    asked = {value for _, expression in ASKED for value in re.findall(r'route=~"([^"]*)"', expression)}
    assert asked
    for value in asked:
        assert {path for path in paths if re.fullmatch(value, path)} == answering


def test_no_metric_is_left_out() -> None:
    """What nobody looks at is no help: each is on the dashboard or in an alert, whole histograms counted as one."""
    asked = {name for _, expression in ASKED for name in NAMES.findall(expression)}
    known = {name: family for family in Metrics().registry.collect() for name in names_of(family)}
    seen = {known[name].name for name in asked if name in known}
    assert {family.name for family in known.values() if family.name.startswith("scaledown_")} - seen == set()


def test_alerts_say_what_to_do() -> None:
    document = (ROOT / "docs" / "operate.md").read_text()
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert f"\n| `{rule['alert']}` |" in document
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "action"}


def test_legends_use_labels_that_the_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            kept = {"instance"} | {
                label.strip() for group in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for label in group.split(",")
            }
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept


def test_panels_are_unique_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (x, y)
        for box in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24  # Grafana's grid


def test_the_files_fit_each_other() -> None:
    [datasource] = yaml.safe_load((MONITORING / "grafana" / "datasource.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {datasource["uid"]}
    assert datasource["url"] == "http://prometheus:9090"
    job, vllm = PROMETHEUS["scrape_configs"]
    assert job["job_name"] == "scaledown"  # what `up` and the alerts look for
    for service in ("service-cpu", "service-gpu", "service-vllm", "service-neuron"):
        aliases = COMPOSE["services"][service]["networks"]["default"]["aliases"]
        assert job["dns_sd_configs"][0]["names"] == aliases
    [found] = vllm["dns_sd_configs"]
    [name] = found["names"]
    assert f"--port={found['port']}" in COMPOSE["services"][name]["command"]
    [provider] = yaml.safe_load((MONITORING / "grafana" / "dashboards.yml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/scaledown.json" in mounts


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
@pytest.mark.parametrize(
    "check", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts.test.yml"]
)
def test_promtool_agrees(check: str) -> None:
    done = subprocess.run(["promtool", *check.split()], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
