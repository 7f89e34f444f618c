"""docker-compose.yml: what it promises about settings, shutdown, isolation and secrets. No engine runs here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("service-cpu", "service-gpu", "service-vllm", "service-neuron")
FETCHING = ("service-cpu", "service-gpu", "service-neuron")
UNITS = {"s": 1, "m": 60, "h": 3600}
# What uvicorn gives connections beyond the drain, and the worker's thread to end (service/__main__.py, engine.py).
AFTER_DRAIN_SECONDS = 10
# What docs for operators name, and a profile, the image, a mount or a secret sets here.
SET_HERE = {"ACCELERATOR", "DEVICE", "HOST", "PORT", "MAX_MODEL_BYTES", "CHECKPOINT_ROOT"}
SET_HERE |= {"API_KEYS", "ADMIN_KEY", "DOCUMENT_CACHE_REDIS", "GENERATOR_KEY"}  # secrets, as files


def with_defaults(value: str) -> str:
    """A value as Compose reads it where no variable is set."""
    return re.sub(r"\$\{\w+(?::-([^}]*))?\}", lambda match: match[1] or "", value)


def environment_of(service: str) -> dict[str, str | None]:
    given = SERVICES[service].get("environment", {})
    return given if isinstance(given, dict) else dict.fromkeys(given)


def gibibytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)g", with_defaults(text))
    assert match, text
    return int(match[1]) * 2**30


def test_it_is_valid_by_the_compose_specification(tmp_path: Path) -> None:
    def problems(text: str) -> list[str]:
        file = tmp_path / "docker-compose.yml"
        file.write_text(text)
        options = ["--builtin-schema", "vendor.compose-spec", "--output-format", "json"]
        command = [sys.executable, "-m", "check_jsonschema", *options, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return [error["path"] for error in json.loads(done.stdout)["errors"]]

    assert problems(TEXT) == []
    assert problems(TEXT.replace("stop_grace_period: 60s", "stop_grace_perod: 60s")) != []


def test_profiles_are_those_documented() -> None:
    profiles = {profile for service in SERVICES.values() for profile in service["profiles"]}
    assert profiles == {"cpu", "gpu", "vllm", "neuron", "training", "training-neuron", "monitoring"}
    assert all(f"`{profile}`" in (ROOT / "docker/README.md").read_text() for profile in profiles)


def test_every_setting_that_is_named_exists() -> None:
    named = {name.removeprefix(PREFIX).lower() for name in re.findall(rf"{PREFIX}[A-Z_]+", TEXT)}
    assert named
    assert named <= set(Settings.model_fields)


def test_what_the_docs_tell_operators_to_set_is_handed_on() -> None:
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("operate", "hardware", "caches", "faq")]
    told = {name for page in pages for name in re.findall(rf"{PREFIX}([A-Z_]+)", page)}
    assert told - {name.removeprefix(PREFIX) for name in COMPOSE["x-settings"]} <= SET_HERE


def test_a_variable_set_to_nothing_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SCALEDOWN_KV_TOKENS=` in .env is handed on as it is."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    plain = Settings()
    for name, value in COMPOSE["x-settings"].items():
        if value is None:
            monkeypatch.setenv(name, "")
    assert Settings() == plain


@pytest.mark.parametrize("service", OURS)
def test_the_settings_that_are_given_are_valid(service: str) -> None:
    given = {
        name.removeprefix(PREFIX).lower(): with_defaults(value)
        for name, value in environment_of(service).items()
        if name.startswith(PREFIX) and value is not None
    }
    settings = Settings.model_validate(given)
    assert settings.device == ("cuda" if service == "service-gpu" else "cpu")


@pytest.mark.parametrize("service", OURS)
def test_the_service_drains_before_it_is_killed(service: str) -> None:
    match = re.fullmatch(r"(\d+)([smh])", SERVICES[service]["stop_grace_period"])
    assert match
    grace = int(match[1]) * UNITS[match[2]]
    drain = float(environment_of(service)["SCALEDOWN_DRAIN_SECONDS"] or Settings.model_fields["drain_seconds"].default)
    assert grace > drain + AFTER_DRAIN_SECONDS


@pytest.mark.parametrize("service", OURS)
def test_loaded_models_fit_the_memory_limit(service: str) -> None:
    limits = SERVICES[service]["deploy"]["resources"]["limits"]
    models = int(with_defaults(environment_of(service)["SCALEDOWN_MAX_MODEL_BYTES"] or "0"))
    stored = Settings.model_fields["store_bytes"].default + Settings.model_fields["max_buffered_bytes"].default
    if service != "service-gpu":  # on a GPU the models are in its own memory
        assert models + stored < gibibytes(limits["memory"])
    assert int(limits["pids"]) > 0
    assert limits["cpus"]


@pytest.mark.parametrize("service", SERVICES)
def test_containers_are_hardened(service: str) -> None:
    given = SERVICES[service]
    assert given["read_only"] is True
    assert given["cap_drop"] == ["ALL"]
    assert given["security_opt"] == ["no-new-privileges:true"]
    assert given["init"] is True  # else a process with id 1 ignores SIGTERM until it has handlers
    assert not {"privileged", "network_mode", "pid", "ipc"} & set(given)
    assert not any("docker.sock" in volume for volume in given["volumes"])


@pytest.mark.parametrize("service", SERVICES)
def test_images_have_an_exact_tag_or_are_built_here(service: str) -> None:
    given = SERVICES[service]
    if "build" in given:
        assert (ROOT / given["build"]["dockerfile"]).is_file()
        dockerfile = (ROOT / given["build"]["dockerfile"]).read_text()
        assert re.search(rf" AS {given['build']['target']}$", dockerfile, re.MULTILINE)
        accelerator = given["build"].get("args", {}).get("ACCELERATOR")
        assert accelerator is None or f" AS environment-{accelerator}\n" in dockerfile
    else:
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", given["image"])


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_open_to_this_machine_only(service: str) -> None:
    assert all(with_defaults(port).startswith("127.0.0.1:") for port in SERVICES[service].get("ports", []))


@pytest.mark.parametrize("service", SERVICES)
def test_mounted_files_and_volumes_exist(service: str) -> None:
    for mount in SERVICES[service]["volumes"]:
        source = mount.split(":")[0]
        if source.startswith("./docker/"):
            assert (ROOT / source).is_file(), source
            assert mount.endswith(":ro")
        elif not source.startswith("./"):  # checkpoints, data and runs are folders of the user's
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("service", FETCHING)
def test_only_the_fetch_may_write_base_models(service: str) -> None:
    fetch = service.replace("service", "base-model")
    assert SERVICES[service]["depends_on"] == {fetch: {"condition": "service_completed_successfully"}}
    assert SERVICES[service]["image"] == SERVICES[fetch]["image"]
    others = {"documents:/documents", "./checkpoints:/app/checkpoints:ro"}
    assert set(SERVICES[service]["volumes"]) == {"cache:/cache:ro", *others}
    assert "cache:/cache" in SERVICES[fetch]["volumes"]
    named = [environment_of(each)["SCALEDOWN_CHECKPOINT"] for each in (service, fetch)]
    assert named[0] == named[1]  # else the base model of another checkpoint would be fetched
    assert "ports" not in SERVICES[fetch]


@pytest.mark.parametrize("service", OURS)
def test_documents_can_be_kept_on_disk_and_in_redis(service: str) -> None:
    given = environment_of(service)
    named = {name for name in Settings.model_fields if "_cache_" in name}
    secret = {name for name in named if f"{PREFIX}{name}".lower() in SERVICES[service]["secrets"]}
    assert {name for name in named if f"{PREFIX}{name}".upper() in given} == named - secret
    assert secret == {"document_cache_redis"}  # the URL may hold a password
    assert "documents:/documents" in SERVICES[service]["volumes"]  # the image's own, for user 10001
    assert "`SCALEDOWN_DOCUMENT_CACHE_FOLDER=/documents`" in (ROOT / "docker/README.md").read_text()


def test_secrets_are_files_and_settings() -> None:
    for name, given in COMPOSE["secrets"].items():
        assert name.removeprefix(PREFIX.lower()) in Settings.model_fields
        assert (ROOT / with_defaults(given["file"])).read_text() == ""  # unless one is given, there is no key
    for service in OURS:
        assert set(SERVICES[service]["secrets"]) == set(COMPOSE["secrets"])
        assert not {name.upper() for name in COMPOSE["secrets"]} & set(environment_of(service))


@pytest.mark.parametrize("service", ["service-gpu", "training", "vllm"])
def test_gpus_are_reserved(service: str) -> None:
    [device] = SERVICES[service]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert device["count"]


@pytest.mark.parametrize("service", ["service-neuron", "training-neuron"])
def test_neuron_devices_are_mounted(service: str) -> None:
    assert SERVICES[service]["devices"] == ["/dev/neuron0:/dev/neuron0"]
    assert service == "training-neuron" or environment_of(service)["SCALEDOWN_ACCELERATOR"] == "neuron"


def test_graphs_are_compiled_with_the_sdk_they_are_served_with() -> None:
    dockerfile = (ROOT / "docker" / "neuron.Dockerfile").read_text()
    [served] = re.findall(r"^ARG SERVICE_IMAGE=(\S+)$", dockerfile, re.MULTILINE)
    assert SERVICES["export-neuron"]["build"]["args"]["TRAINING_IMAGE"] == served


def test_vllm_serves_the_services_own_checkpoint_to_nobody_else() -> None:
    vllm, service, ours = SERVICES["vllm"], SERVICES["service-vllm"], environment_of("service-vllm")
    options = dict(with_defaults(option).removeprefix("--").partition("=")[::2] for option in vllm["command"])
    assert "enable-prompt-embeds" in options
    assert with_defaults(ours["SCALEDOWN_CHECKPOINT"] or "") == "checkpoints/merged"
    assert options["model"] == "/checkpoints/merged/generator"
    assert vllm["volumes"] == ["./checkpoints:/checkpoints:ro"]
    assert ours["SCALEDOWN_GENERATOR_URL"] == f"http://vllm:{options['port']}/v1"
    assert ours["SCALEDOWN_GENERATOR_MODEL"] == options["served-model-name"]
    assert "ports" not in vllm  # embeddings are read as torch files: only the service may send some
    assert service["depends_on"] == {"vllm": {"condition": "service_healthy"}}
    assert f":{options['port']}/health" in vllm["healthcheck"]["test"][-1]
    assert float(options["shutdown-timeout"]) < 60
    assert vllm["stop_grace_period"] == "60s"
    assert int(options["max-num-seqs"]) >= Settings.model_fields["max_requests"].default
