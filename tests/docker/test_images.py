"""The Dockerfile's rules and the scripts that run in containers. No image is built here."""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from core.config import Config, GeneratorConfig, dump_config
from service.settings import Settings

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"
TARGETS = ("service", "training")
COMPILERS = re.compile(r"\b(gcc|g\+\+|cc|clang|build-essential|python3?-dev|cargo|nvcc)\b|-devel\b")


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage by its name; the first one of each is its FROM."""
    found: dict[str, list[tuple[str, str]]] = {}
    for instruction, arguments in instructions():
        if instruction == "FROM":
            name = arguments.split(" AS ")[1]
            found[name] = []
        if found:
            found[name].append((instruction, arguments))
    return found


def inherited(target: str) -> list[tuple[str, str]]:
    """Instructions of a stage and of those it is built on, in order."""
    named = stages()
    base = named[target][0][1].split(" AS ")[0]
    return (inherited(base) if base in named else []) + named[target]


def arguments_of(target: str, instruction: str) -> list[str]:
    return [arguments for name, arguments in inherited(target) if name == instruction]


def test_outside_images_have_an_exact_tag() -> None:
    defaults = {a.split("=")[0]: a.split("=")[1] for name, a in instructions() if name == "ARG" and "=" in a}
    for lines in stages().values():
        image = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], lines[0][1].split(" AS ")[0])
        assert image in stages() or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", image), image


def test_each_accelerator_has_its_environment() -> None:
    assert {"environment-cpu", "environment-cuda"} <= set(stages())


@pytest.mark.parametrize("target", TARGETS)
def test_the_process_is_not_root_and_owns_no_code(target: str) -> None:
    assert arguments_of(target, "USER") == ["10001:10001"]
    after_user = [name for name, _ in inherited(target)]
    assert not {"RUN", "COPY", "ADD"} & set(after_user[after_user.index("USER") :])
    assert not any("--chown" in arguments for arguments in arguments_of(target, "COPY"))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_compiled_or_installed_in_the_final_stage(target: str) -> None:
    assert not any(COMPILERS.search(arguments) for _, arguments in inherited(target))
    assert not any(re.search(r"\b(pip|apt-get|apt)\b", arguments) for arguments in arguments_of(target, "RUN"))
    assert "PIP_ONLY_BINARY=:all:" in " ".join(arguments_of("environment", "ENV")).split()


@pytest.mark.parametrize("target", TARGETS)
def test_everything_written_goes_where_a_mount_can_be(target: str) -> None:
    environment = " ".join(arguments_of(target, "ENV"))
    for setting in ("HOME=/tmp", "XDG_CACHE_HOME=/cache", "HF_HOME=/cache/huggingface", "PYTHONDONTWRITEBYTECODE=1"):
        assert setting in environment.split()


@pytest.mark.parametrize("target", TARGETS)
def test_labels_say_what_it_is(target: str) -> None:
    labels = " ".join(arguments_of(target, "LABEL"))
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels


def test_health_is_asked_of_the_service_only() -> None:
    assert arguments_of("training", "HEALTHCHECK") == ["NONE"]
    [check] = arguments_of("service", "HEALTHCHECK")
    assert check.endswith('CMD ["python", "docker/check_health.py"]')


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_copied_is_there_and_reaches_the_build(target: str) -> None:
    """.dockerignore keeps everything out that it does not name."""
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    for arguments in (*arguments_of(target, "COPY"), *(a for n, a in inherited("environment") if n == "COPY")):
        if not arguments.startswith("--from="):
            for source in arguments.split()[:-1]:
                assert list(ROOT.glob(source)), source
                assert f"!{source}" in ignore, source


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
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert run_script("check_health", SCALEDOWN_PORT=str(port)).returncode == 1


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
    names = re.search(r"SECRETS = \((.*)\)", (DOCKER / "start_service.py").read_text())
    assert names is not None
    settings = {name.removeprefix("SCALEDOWN_").lower() for name in re.findall(r'"(\w+)"', names[1])}
    assert settings == {"api_keys", "admin_key"}
    assert settings <= set(Settings.model_fields)


def fetch(monkeypatch: pytest.MonkeyPatch, **environment: str) -> int:
    """Run fetch_base_model in this process, which has imported torch already; its exit status."""
    for name in [name for name in os.environ if name.startswith("SCALEDOWN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("service.loading.SHIPPED", Path("no-shipped-checkpoint"))
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
