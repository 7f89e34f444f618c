"""The steps of the service's image, run as far as they can be without Docker, and the service started from the result.

Installs torch and all it needs (about 2 GB, minutes): `pytest -m long tests/docker/test_scratch_root.py`, as root.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig
from core.model import build_model
from tests.docker.dockerfile import ROOT, inherited
from tests.docker.scratch_root import Image, build
from tests.free_port import free_port
from tests.tiny_checkpoints import edit_json, sign

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting an overlay takes root and Linux"
    ),
]
SECONDS = 120


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("images")
    yield build("Dockerfile", "service", folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def mounts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model and a checkpoint on it, where docker-compose.yml mounts them."""
    folder = tmp_path_factory.mktemp("mounts")
    shutil.copytree(tiny_llama, folder / "cache" / "tiny")
    config = Config(
        compressor=CompressorConfig(n_layers=1, chunk_tokens=64), generator=GeneratorConfig(base_model=str(tiny_llama))
    )
    checkpoint = folder / "checkpoints" / "tiny"
    save_checkpoint(build_model(config, seed=1), checkpoint)
    edit_json(checkpoint / "config.json", lambda given: given["generator"].update(base_model="/cache/tiny"))
    sign(checkpoint)
    for path in (folder / "cache").rglob("*.safetensors"):
        path.chmod(0o644)  # transformers writes them for their owner only
    return {"/cache": folder / "cache", "/app/checkpoints": folder / "checkpoints"}


def exec_form(instruction: str) -> list[str]:
    """The command of the service's ENTRYPOINT or HEALTHCHECK."""
    [text] = [arguments for name, arguments in inherited("Dockerfile", "service") if name == instruction]
    return list(json.loads(text[text.index("[") :]))


def settings(port: int) -> dict[str, str]:
    given = {"SCALEDOWN_CHECKPOINT": "checkpoints/tiny", "SCALEDOWN_PORT": str(port), "SCALEDOWN_THREADS": "1"}
    return {**given, "HF_HUB_OFFLINE": "1"}


def test_nothing_is_installed_but_what_is_pinned(image: Image, mounts: dict[str, Path]) -> None:
    command = image.command(["python", "-m", "pip", "list", "--format=json"], {}, mounts)
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    installed = {f"{one['name'].lower().replace('_', '-')}=={one['version']}" for one in listed}
    pins = (ROOT / "requirements" / "images.txt").read_text().split("\n")
    free = {pin.split("==")[0] for pin in installed - set(pins)}
    assert free - {"pip", "setuptools"} == {"scaledown", "torch"}


def test_no_service_without_a_checkpoint(image: Image, mounts: dict[str, Path]) -> None:
    start = image.command(exec_form("ENTRYPOINT"), {}, {"/cache": mounts["/cache"]})
    refused = subprocess.run(start, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert refused.returncode not in {0, None}
    assert "checkpoint" in refused.stdout + refused.stderr


def test_the_service_starts_answers_and_ends(image: Image, mounts: dict[str, Path]) -> None:
    """As user 10001 without capabilities, on a root file system that is read-only."""
    port = free_port()
    fetch = image.command(["python", "docker/fetch_base_model.py"], settings(port), mounts)
    fetched = subprocess.run(fetch, capture_output=True, text=True, check=False)
    assert "base model /cache/tiny: /cache/tiny" in fetched.stderr, fetched.stderr
    start = image.command(exec_form("ENTRYPOINT"), settings(port), mounts)
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=SECONDS) as client:
                ready = wait_until_ready(client, process)
                body = {"query": "When does iron melt?", "passages": ["Iron melts at 1538 °C."], "max_new_tokens": 4}
                assert client.post("/answer", json=body).status_code == 200
            assert ready["checkpoint"].startswith("tiny@")
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert "Uid:\t10001\t10001" in status
            assert "CapEff:\t0000000000000000" in status
            inside = ["nsenter", f"--target={process.pid}", "--mount", "--root", "--wd", "env"]
            inside += [f"{name}={value}" for name, value in {**image.environment, **settings(port)}.items()]
            assert subprocess.run([*inside, *exec_form("HEALTHCHECK")], check=False).returncode == 0
        finally:
            process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[str]) -> dict[str, str]:
    """What /readyz says at last."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            response = client.get("/readyz")
        except httpx.TransportError:
            time.sleep(0.5)
            continue
        if response.status_code == 200:
            return dict(response.json())
    process.terminate()
    raise AssertionError(f"the service did not get ready: {process.communicate()[0]}")
