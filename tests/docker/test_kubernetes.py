"""The Kubernetes manifests as kustomize renders them: settings, shutdown, probes, isolation and scaling. No cluster."""

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.app import create_app
from service.metrics import Metrics
from service.settings import PREFIX, Settings

FOLDER = Path(__file__).parent.parent.parent / "docker" / "kubernetes"
SERVING = ("base", "gpu")
KUSTOMIZATIONS = (*SERVING, "loader")
# What the process may take beyond the drain: uvicorn's connections and the worker's thread.
AFTER_DRAIN_SECONDS = 10
HARDENED = {
    "readOnlyRootFilesystem": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}
pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize, is not here")


def render(name: str) -> dict[str, dict[str, Any]]:
    """The manifests of a kustomization by kind, of which none comes twice; nothing where kubectl is missing."""
    if shutil.which("kubectl") is None:
        return {}
    done = subprocess.run(["kubectl", "kustomize", FOLDER / name], capture_output=True, text=True, check=True)
    manifests = list(yaml.safe_load_all(done.stdout))
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    assert len(by_kind) == len(manifests)
    return by_kind


RENDERED = {name: render(name) for name in KUSTOMIZATIONS}


def pod_of(name: str) -> dict[str, Any]:
    """The specification of the pods that a kustomization starts."""
    manifests = RENDERED[name]
    return dict(manifests["Pod"]["spec"] if "Pod" in manifests else manifests["Deployment"]["spec"]["template"]["spec"])


def settings_of(name: str) -> Settings:
    """The service's settings from its config map. Raises where one is unknown or invalid."""
    given = RENDERED[name]["ConfigMap"]["data"]
    assert all(key.startswith(PREFIX) for key in given)
    return Settings.model_validate({key.removeprefix(PREFIX).lower(): value for key, value in given.items()})


@pytest.mark.parametrize("release", ["1.30", "1.36"])
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_kubernetes_would_accept_it(name: str, release: str) -> None:
    """By the schemas of a release, strictly: an unknown field is an error."""
    for manifest in RENDERED[name].values():
        kubernetes_validate.validate(manifest, release, strict=True)


def test_a_misspelt_field_would_not_be_accepted() -> None:
    deployment = copy.deepcopy(RENDERED["base"]["Deployment"])
    deployment["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(deployment, "1.36", strict=True)


def test_every_manifest_is_listed() -> None:
    """Else it would not be applied."""
    for file in FOLDER.glob("*/kustomization.yaml"):
        assert file.parent.name in KUSTOMIZATIONS
        listed = yaml.safe_load(file.read_text())["resources"]
        others = {path.name for path in file.parent.glob("*.yaml")} - {file.name}
        assert others == {name for name in listed if name.endswith(".yaml")}


def test_settings_are_real_and_valid() -> None:
    assert settings_of("base").device == "cpu"
    assert (settings_of("gpu").device, settings_of("gpu").dtype) == ("cuda", "bfloat16")
    [service] = pod_of("base")["containers"]
    named = [one["name"] for one in service["env"] if one["name"].startswith(PREFIX)]
    assert {name.removeprefix(PREFIX).lower() for name in named} <= set(Settings.model_fields)


@pytest.mark.parametrize("name", SERVING)
def test_containers_read_the_settings_that_were_rendered(name: str) -> None:
    """kustomize adds a hash to the config map's name, so that a change rolls out."""
    pod = pod_of(name)
    for container in (*pod["containers"], *pod["initContainers"]):
        assert container["envFrom"] == [{"configMapRef": {"name": RENDERED[name]["ConfigMap"]["metadata"]["name"]}}]


def test_each_overlay_takes_the_image_for_its_device() -> None:
    images = {
        name: {one["image"] for one in (*pod_of(name)["containers"], *pod_of(name).get("initContainers", ()))}
        for name in KUSTOMIZATIONS
    }
    cpu, cuda = {"scaledown-service:cpu"}, {"scaledown-service:cuda"}
    assert images == {"base": cpu, "gpu": cuda, "loader": cpu}
    assert pod_of("gpu")["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("name", SERVING)
def test_pods_serve_a_checkpoint_of_the_claim(name: str) -> None:
    """No image holds one: without it each pod would be ready with an untrained model."""
    claim = RENDERED[name]["PersistentVolumeClaim"]["metadata"]["name"]
    pod = pod_of(name)
    [volume] = [one for one in pod["volumes"] if one.get("persistentVolumeClaim", {}).get("claimName") == claim]
    for container in (*pod["containers"], *pod["initContainers"]):
        [mount] = [one for one in container["volumeMounts"] if one["name"] == volume["name"]]
        checkpoint = settings_of(name).checkpoint
        assert checkpoint is not None
        assert Path("/app") / checkpoint.parent == Path(mount["mountPath"])  # /app is where the image works
        assert mount["readOnly"] is True


def test_the_loader_writes_where_pods_read() -> None:
    claim = RENDERED["base"]["PersistentVolumeClaim"]
    [volume] = pod_of("loader")["volumes"]
    [loader] = pod_of("loader")["containers"]
    assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert loader["volumeMounts"] == [{"name": volume["name"], "mountPath": "/app/checkpoints"}]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # from a pod of its own, and by pods on several nodes


@pytest.mark.parametrize("name", SERVING)
def test_the_pod_drains_before_it_is_killed(name: str) -> None:
    pod = pod_of(name)
    pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + settings_of(name).drain_seconds + AFTER_DRAIN_SECONDS


def test_probes_and_scrapes_ask_what_the_service_has() -> None:
    paths = set(create_app(Settings.model_validate({})).openapi()["paths"])
    [service] = pod_of("base")["containers"]
    probes = {name: service[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    asked = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    # Not /readyz at the start: a vLLM server that is away would have every pod killed and loaded again.
    assert asked == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    assert {*asked.values(), "/metrics"} <= paths
    ports = {port["name"]: port["containerPort"] for port in service["ports"]}
    assert {probe["httpGet"]["port"] for probe in probes.values()} <= set(ports)
    assert ports["http"] == Settings.model_fields["port"].default


def test_the_scrape_finds_the_pods_under_the_name_that_alerts_ask_for(tmp_path: Path) -> None:
    [job] = yaml.safe_load((FOLDER / "prometheus-scrape.yaml").read_text())
    jobs = yaml.safe_load((FOLDER.parent / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == jobs[0]["job_name"]
    template = RENDERED["base"]["Deployment"]["spec"]["template"]
    [port] = template["spec"]["containers"][0]["ports"]
    meta = {
        f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9_]', '_', name)}": value
        for name, value in template["metadata"]["labels"].items()
    } | {"__meta_kubernetes_pod_container_port_name": port["name"]}
    kept = [rule for rule in job["relabel_configs"] if rule.get("action") == "keep"]
    assert kept
    for rule in kept:
        assert re.fullmatch(rule["regex"], ";".join(meta[label] for label in rule["source_labels"]))
    targets = {rule["target_label"] for rule in job["relabel_configs"] if rule not in kept}
    assert targets == {"namespace", "pod", "instance"}
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]  # which Debian's promtool does not know
    if shutil.which("promtool"):
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
        command = ["promtool", "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", SERVING)
def test_selectors_find_the_pods(name: str) -> None:
    manifests = RENDERED[name]
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels.items()


def test_scaling_follows_series_that_exist_and_are_served() -> None:
    """What the autoscaler asks for is a gauge of ours, with those labels, and prometheus-adapter's rule takes it."""
    metrics = [one["pods"] for one in RENDERED["base"]["HorizontalPodAutoscaler"]["spec"]["metrics"]]
    gauges = {family.name: family for family in Metrics().registry.collect() if family.type == "gauge"}
    [rule] = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    served = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert served
    for one in metrics:
        name = one["metric"]["name"]
        assert re.fullmatch(served[1], name)
        for wanted in one["metric"].get("selector", {}).get("matchExpressions", ()):
            known = {sample.labels[wanted["key"]] for sample in gauges[name].samples}
            assert wanted["operator"] == "In"
            assert set(wanted["values"]) <= known
    waiting, in_flight = (int(one["target"]["averageValue"]) for one in metrics)
    assert metrics[0]["metric"]["name"] == "scaledown_requests_in_stage"
    assert metrics[1]["metric"]["name"] == "scaledown_requests_in_flight"
    # Above max_sequences answers wait for each other.
    assert waiting < in_flight < settings_of("base").max_sequences
    # Else every `kubectl apply` would end pods that the autoscaler has started.
    assert "replicas" not in RENDERED["base"]["Deployment"]["spec"]
    budget = RENDERED["base"]["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert RENDERED["base"]["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > budget


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed")
def test_the_adapters_query_counts_what_waits_in_each_pod(tmp_path: Path) -> None:
    """The rule's template filled in as the adapter does it, evaluated by promtool."""
    [rule] = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    [wanted] = RENDERED["base"]["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["selector"][
        "matchExpressions"
    ]
    series = "scaledown_requests_in_stage"
    matchers = f'{wanted["key"]}=~"{"|".join(wanted["values"])}",namespace="n",pod=~"a|b"'
    query = rule["metricsQuery"]
    for field, value in (("Series", series), ("LabelMatchers", matchers), ("GroupBy", "pod")):
        query = query.replace(f"<<.{field}>>", value)
    seen = {"a": {"queue": 3, "first_token": 2, "decode": 9}, "b": {"queue": 0, "first_token": 1, "decode": 4}}
    inputs = [
        {"series": f'{series}{{namespace="n",pod="{pod}",stage="{stage}"}}', "values": str(count)}
        for pod, stages in seen.items()
        for stage, count in stages.items()
    ]
    samples = [{"labels": '{pod="a"}', "value": 5}, {"labels": '{pod="b"}', "value": 1}]
    test = {"input_series": inputs, "promql_expr_test": [{"expr": query, "eval_time": "0m", "exp_samples": samples}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": [test]}))
    command = ["promtool", "test", "rules", str(tmp_path / "test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_pods_are_hardened(name: str) -> None:
    pod = pod_of(name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001  # the image's
    assert pod["automountServiceAccountToken"] is False
    # A Service called scaledown would otherwise bring SCALEDOWN_PORT=tcp://... into every pod, over our settings.
    assert pod["enableServiceLinks"] is False
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        assert container["securityContext"] == HARDENED
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert "memory" in container["resources"]["limits"]


def test_only_the_fetch_may_write_base_models() -> None:
    [service], [fetch] = pod_of("base")["containers"], pod_of("base")["initContainers"]
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in service["volumeMounts"]}
    assert mounts == {"/cache": True, "/app/checkpoints": True, "/tmp": False, "/run/secrets": True}
    assert "keys" not in {mount["name"] for mount in fetch["volumeMounts"]}
