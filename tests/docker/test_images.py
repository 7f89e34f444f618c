"""The rules of both Dockerfiles and the scripts that run in containers. No image is built here."""

import json
import os
import re
import runpy
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from core.config import Config, GeneratorConfig, dump_config
from service.__main__ import SECRETS
from service.settings import SHIPPED
from tests.docker.dockerfile import DOCKER, ROOT, base_of, build_context, defaults, inherited, stages
from tests.free_port import free_port

FILES = ("Dockerfile", "neuron.Dockerfile")
IMAGES = [(file, target) for file in FILES for target in ("service", "training")]
COMPILERS = re.compile(r"\b(gcc|g\+\+|cc|clang|build-essential|python3?-dev|cargo|nvcc)\b|-devel\b")


def arguments_of(file: str, target: str, instruction: str) -> list[str]:
    return [arguments for name, arguments in inherited(file, target) if name == instruction]


@pytest.mark.parametrize("file", FILES)
def test_hadolint_finds_nothing(file: str) -> None:
    command = [Path(sys.executable).with_name("hadolint"), DOCKER / file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_outside_images_have_an_exact_tag() -> None:
    for file in FILES:
        for stage in stages(file):
            image = base_of(file, stage)
            assert image in stages(file) or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", image), image


def test_each_accelerator_has_its_environment() -> None:
    assert {"environment-cpu", "environment-cuda"} <= set(stages("Dockerfile"))


@pytest.mark.parametrize(("file", "target"), IMAGES)
def test_the_process_is_not_root_and_owns_no_code(file: str, target: str) -> None:
    assert arguments_of(file, target, "USER") == ["10001:10001"]
    after_user = [name for name, _ in inherited(file, target)]
    after_user = after_user[after_user.index("USER") :]
    assert not {"RUN", "COPY", "ADD"} & set(after_user)
    assert "ENTRYPOINT" in after_user  # AWS's images start TorchServe
    assert not any("--chown" in arguments for arguments in arguments_of(file, target, "COPY"))


@pytest.mark.parametrize(("file", "target"), IMAGES)
def test_nothing_is_compiled_or_installed_in_the_final_stage(file: str, target: str) -> None:
    assert not any(COMPILERS.search(arguments) for _, arguments in inherited(file, target))
    assert not any(re.search(r"\b(pip|apt-get|apt)\b", arguments) for arguments in arguments_of(file, target, "RUN"))
    environment = f"{target}-environment"
    assert f"--from={environment} /opt/scaledown /opt/scaledown" in arguments_of(file, target, "COPY")
    assert "PIP_ONLY_BINARY=:all:" in " ".join(arguments_of(file, environment, "ENV")).split()
    assert not any(COMPILERS.search(arguments) for _, arguments in inherited(file, environment))


@pytest.mark.parametrize("target", ["service", "training"])
def test_the_versions_of_an_image_are_pinned(target: str) -> None:
    """All of them: tests/docker/test_scratch_root.py looks at what was installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line for line in (ROOT / "requirements" / "images.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins)
    pinned = {pin.split("==")[0]: pin.split("==")[1] for pin in pins}
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(line for extra in ("service", "otel", "redis", target) for line in extras[extra]),
    ]
    for requirement in map(Requirement, lines):
        if requirement.name not in {"scaledown", "torch"}:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    installs = [text for text in arguments_of("Dockerfile", f"{target}-environment", "RUN") if "pip install" in text]
    assert installs
    for install in installs:
        assert "--constraint constraints.txt" in install
        assert "--no-deps" in install or "--constraint images.txt" in install


@pytest.mark.parametrize(("file", "target"), IMAGES)
def test_everything_written_goes_where_a_mount_can_be(file: str, target: str) -> None:
    environment = " ".join(arguments_of(file, target, "ENV"))
    for setting in ("HOME=/tmp", "XDG_CACHE_HOME=/cache", "HF_HOME=/cache/huggingface", "PYTHONDONTWRITEBYTECODE=1"):
        assert setting in environment.split()
    [folders] = re.findall(r"install -d -o 10001 -g 10001 ([^&]+)", " ".join(arguments_of(file, target, "RUN")))
    assert {"/cache", "/documents" if target == "service" else "/runs"} <= set(folders.split())


@pytest.mark.parametrize(("file", "target"), IMAGES)
def test_labels_say_what_it_is(file: str, target: str) -> None:
    labels = " ".join(arguments_of(file, target, "LABEL"))
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert defaults(file)["VERSION"] == project["version"]


@pytest.mark.parametrize("file", FILES)
def test_a_service_without_a_checkpoint_would_not_start(file: str) -> None:
    """One that is named has to be there, the shipped one need not be: it would be an untrained model then."""
    shipped = SHIPPED.relative_to(ROOT)
    assert f"SCALEDOWN_CHECKPOINT={shipped}" in " ".join(arguments_of(file, "service", "ENV")).split()
    assert not any(shipped in path.parents for path in build_context())


@pytest.mark.parametrize("file", FILES)
def test_health_is_asked_of_the_service_only(file: str) -> None:
    assert arguments_of(file, "training", "HEALTHCHECK") == ["NONE"]
    [check] = arguments_of(file, "service", "HEALTHCHECK")
    assert check.endswith('CMD ["python", "docker/check_health.py"]')


@pytest.mark.parametrize(("file", "target"), IMAGES)
def test_what_is_copied_reaches_the_build(file: str, target: str) -> None:
    """.dockerignore keeps everything out that it does not name."""
    context = build_context()
    copies = [*arguments_of(file, target, "COPY"), *arguments_of(file, f"{target}-environment", "COPY")]
    for arguments in copies:
        if not arguments.startswith("--from="):
            for source in arguments.split()[:-1]:
                found = {path.relative_to(ROOT) for path in ROOT.glob(source)}
                assert any(found & {path, *path.parents} for path in context), source


def test_no_weights_and_no_secrets_reach_a_build() -> None:
    tops = {path.parts[0] for path in build_context()}
    assert tops == {
        "LICENSE",
        "constraints.txt",
        "core",
        "docker",
        "pyproject.toml",
        "requirements",
        "service",
        "training",
    }
    assert {path.suffix for path in build_context() if path.parts[0] == "docker"} == {".py"}


@pytest.fixture
def health_server() -> Iterator[tuple[int, list[str], list[int]]]:
    """A server that notes the paths it is asked for and answers with the status in the second list."""
    paths: list[str] = []
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test's output quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, paths, status
        server.shutdown()
        thread.join()


def run_script(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the containers' scripts as they do: from the application's folder, nothing of ours in the way."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SCALEDOWN_")}
    command = [sys.executable, f"docker/{name}.py"]
    variables = {**clean, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)


def test_check_health_asks_livez_past_any_proxy(health_server: tuple[int, list[str], list[int]]) -> None:
    port, paths, status = health_server
    proxy = "http://127.0.0.1:9"  # nothing listens there
    assert run_script("check_health", SCALEDOWN_PORT=str(port), http_proxy=proxy).returncode == 0
    assert paths == ["/livez"]
    status[0] = 503
    assert run_script("check_health", SCALEDOWN_PORT=str(port)).returncode == 1


def test_check_health_of_nothing_fails() -> None:
    port = free_port()
    assert run_script("check_health", SCALEDOWN_PORT=str(port)).returncode == 1


def test_check_health_takes_a_port_that_is_set_to_nothing_for_the_default() -> None:
    assert "Traceback" not in run_script("check_health", SCALEDOWN_PORT="").stderr


@pytest.fixture
def started_with(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run start_service where `python -m service` only reports its arguments and our variables."""
    (tmp_path / "service.py").write_text(
        "import json, os, sys\n"
        "ours = {name: value for name, value in os.environ.items() if name.startswith('SCALEDOWN_')}\n"
        "print(json.dumps({'arguments': sys.argv[1:], 'environment': ours}))\n"
    )

    def start(*arguments: str, **environment: str) -> dict[str, Any]:
        command = [sys.executable, str(DOCKER / "start_service.py"), *arguments]
        variables = {"SECRETS_DIR": str(tmp_path), **environment}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, check=True, timeout=120)
        return dict(json.loads(done.stdout))

    return start


def test_start_service_takes_keys_from_files(tmp_path: Path, started_with: Callable[..., dict[str, Any]]) -> None:
    (tmp_path / "scaledown_api_keys").write_text("first-key-of-sixteen\nsecond-key-of-sixteen\n")
    (tmp_path / "scaledown_admin_key").write_text("the-admins-own-key\n")
    started = started_with("--port", "8001")
    assert started["arguments"] == ["--port", "8001"]
    assert started["environment"] == {
        "SCALEDOWN_API_KEYS": "first-key-of-sixteen,second-key-of-sixteen",
        "SCALEDOWN_ADMIN_KEY": "the-admins-own-key",
    }


def test_start_service_prefers_the_environment_and_skips_empty_files(
    tmp_path: Path, started_with: Callable[..., dict[str, Any]]
) -> None:
    (tmp_path / "scaledown_api_keys").write_text("key-in-the-file")
    (tmp_path / "scaledown_admin_key").write_text("\n")
    started = started_with(SCALEDOWN_API_KEYS="key-in-the-environment")
    assert started["environment"] == {"SCALEDOWN_API_KEYS": "key-in-the-environment"}


def test_start_service_becomes_the_service(tmp_path: Path) -> None:
    """The real one reads the key, and refuses it without showing it."""
    (tmp_path / "scaledown_admin_key").write_text("short-key")
    done = run_script("start_service", SECRETS_DIR=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("admin_key: ")
    assert "short-key" not in done.stderr


def test_secret_files_are_named_after_settings() -> None:
    names = runpy.run_path(str(DOCKER / "start_service.py"))["SECRETS"]
    settings = {name.removeprefix("SCALEDOWN_").lower() for name in names}
    assert settings == SECRETS


def fetch(monkeypatch: pytest.MonkeyPatch, **environment: str) -> int:
    """Run fetch_base_model in this process, which has imported torch already; its exit status."""
    for name in [name for name in os.environ if name.startswith("SCALEDOWN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("service.settings.SHIPPED", Path("no-shipped-checkpoint"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return int(runpy.run_path(str(DOCKER / "fetch_base_model.py"))["main"]())


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO")
    return caplog


def test_fetch_finds_what_the_settings_name(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    assert fetch(monkeypatch, SCALEDOWN_BASE_MODEL=str(tiny_llama)) == 0
    assert log.messages == [f"base model {tiny_llama}: {tiny_llama}"]


@pytest.mark.parametrize("merged", [False, True])
def test_fetch_reads_the_checkpoints_config(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, merged: bool
) -> None:
    config = Config(generator=GeneratorConfig(base_model=str(tiny_llama), merged=merged))
    (tmp_path / "config.json").write_text(dump_config(config))
    assert fetch(monkeypatch, SCALEDOWN_CHECKPOINT=str(tmp_path), SCALEDOWN_BASE_MODEL="not this one") == 0
    [message] = log.messages
    assert message.endswith("no base model is needed" if merged else str(tiny_llama))


def test_fetch_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    assert fetch(monkeypatch, SCALEDOWN_BASE_MODEL="no such model") == 1
    assert "'no such model' was not found" in log.text
    assert fetch(monkeypatch, SCALEDOWN_CHECKPOINT="checkpoints/none") == 1
    assert "there is no checkpoints/none" in log.text
