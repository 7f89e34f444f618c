"""The Kubernetes manifests: what they promise about settings, shutdown, probes, isolation and scaling. No cluster."""

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.app import create_app
from service.metrics import Metrics
from service.settings import PREFIX, Settings

FOLDER = Path(__file__).parent.parent.parent / "docker" / "kubernetes"
# What the process may take beyond the drain: uvicorn's connections and the worker's thread.
AFTER_DRAIN_SECONDS = 10


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / name).read_text()))


BASE, GPU = read("base/kustomization.yaml"), read("gpu/kustomization.yaml")
MANIFESTS = {name: read(f"base/{name}") for name in BASE["resources"]}
POD: dict[str, Any] = MANIFESTS["deployment.yaml"]["spec"]["template"]
[SERVICE] = POD["spec"]["containers"]
[FETCH] = POD["spec"]["initContainers"]


def settings_of(*kustomizations: dict[str, Any]) -> Settings:
    """The service's settings from config maps, the later over the earlier. Raises where one is unknown or invalid."""
    literals = [line for one in kustomizations for line in one["configMapGenerator"][0]["literals"]]
    given = dict(line.split("=", 1) for line in literals)
    assert all(name.startswith(PREFIX) for name in given)
    return Settings.model_validate({name.removeprefix(PREFIX).lower(): value for name, value in given.items()})


def test_kubernetes_sets_no_variables_of_ours() -> None:
    """A Service called scaledown would otherwise bring SCALEDOWN_PORT=tcp://... into every pod."""
    assert MANIFESTS["service.yaml"]["metadata"]["name"] + "_" == PREFIX.lower()
    assert POD["spec"]["enableServiceLinks"] is False


def test_every_manifest_is_listed() -> None:
    files = {path.name for path in (FOLDER / "base").glob("*.yaml")}
    assert files == {*MANIFESTS, "kustomization.yaml"}


def gpu_deployment() -> dict[str, Any]:
    """The Deployment with the GPU's patches, each of which replaces one value."""
    deployment = copy.deepcopy(MANIFESTS["deployment.yaml"])
    for step in (step for one in GPU["patches"] for step in yaml.safe_load(one["patch"])):
        *parents, last = step["path"].strip("/").split("/")
        place: Any = deployment
        for key in parents:
            place = place[int(key) if isinstance(place, list) else key]
        assert step["op"] == "replace"
        assert last in place
        place[last] = step["value"]
    return deployment


@pytest.mark.parametrize("release", ["1.30", "1.36"])
@pytest.mark.parametrize("name", [*MANIFESTS, "gpu"])
def test_kubernetes_would_accept_it(name: str, release: str) -> None:
    """By the schemas of a release, strictly: an unknown field is an error."""
    manifest = gpu_deployment() if name == "gpu" else MANIFESTS[name]
    kubernetes_validate.validate(manifest, release, strict=True)


def test_a_misspelt_field_would_not_be_accepted() -> None:
    deployment = copy.deepcopy(MANIFESTS["deployment.yaml"])
    deployment["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(deployment, "1.36", strict=True)


def test_settings_are_real_and_valid() -> None:
    assert settings_of(BASE).device == "cpu"
    assert (settings_of(BASE, GPU).device, settings_of(BASE, GPU).dtype) == ("cuda", "bfloat16")
    named = [one["name"] for one in SERVICE["env"] if one["name"].startswith(PREFIX)]
    assert {name.removeprefix(PREFIX).lower() for name in named} <= set(Settings.model_fields)


@pytest.mark.parametrize("settings", [settings_of(BASE), settings_of(BASE, GPU)], ids=["base", "gpu"])
def test_the_pod_drains_before_it_is_killed(settings: Settings) -> None:
    pause = SERVICE["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["spec"]["terminationGracePeriodSeconds"] > pause + settings.drain_seconds + AFTER_DRAIN_SECONDS


def test_probes_ask_paths_that_the_service_has() -> None:
    paths = set(create_app(Settings.model_validate({})).openapi()["paths"])
    probes = {name: SERVICE[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    asked = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert asked == {"startup": "/readyz", "liveness": "/livez", "readiness": "/readyz"}
    assert set(asked.values()) <= paths
    assert {probe["httpGet"]["port"] for probe in probes.values()} <= {port["name"] for port in SERVICE["ports"]}


def test_selectors_find_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    for selector in (
        MANIFESTS["deployment.yaml"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["service.yaml"]["spec"]["selector"],
        MANIFESTS["disruption.yaml"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()


def test_scaling_follows_a_metric_that_exists() -> None:
    [metric] = [one["pods"] for one in MANIFESTS["autoscaler.yaml"]["spec"]["metrics"]]
    gauges = {family.name for family in Metrics().registry.collect() if family.type == "gauge"}
    assert metric["metric"]["name"] in gauges
    # Above this number answers wait for each other.
    assert int(metric["target"]["averageValue"]) < settings_of(BASE).max_sequences
    assert MANIFESTS["autoscaler.yaml"]["spec"]["minReplicas"] > MANIFESTS["disruption.yaml"]["spec"]["maxUnavailable"]


@pytest.mark.parametrize("container", [SERVICE, FETCH], ids=["service", "fetch"])
def test_containers_are_hardened(container: dict[str, Any]) -> None:
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    pod = POD["spec"]["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] == 10001  # the image's
    assert POD["spec"]["automountServiceAccountToken"] is False
    volumes = {volume["name"] for volume in POD["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert "memory" in container["resources"]["limits"]


def test_only_the_fetch_may_write_base_models() -> None:
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in SERVICE["volumeMounts"]}
    assert mounts == {"/cache": True, "/tmp": False, "/run/secrets": True}
    assert "keys" not in {mount["name"] for mount in FETCH["volumeMounts"]}
