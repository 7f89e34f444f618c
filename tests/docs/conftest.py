"""One service for all pages of the docs, and what runs their commands: see `fork_server.py` and `shortening.py`."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from core.checkpoint import save_checkpoint
from core.model import build_model
from tests.docs.fork_server import install_shims
from tests.docs.shortening import SERVE
from tests.free_port import free_port
from tests.tiny_checkpoints import make_config

ROOT = Path(__file__).parents[2]
ADMIN_KEY = "admin-key-of-the-docs"
START_SECONDS = 180
COPIED = ("checkpoints", "core", "examples", "service", "training")


@dataclass(frozen=True)
class Workshop:
    """Where the docs' commands are run: a fork server at `address`, and the environment of a shell that uses it."""

    address: Path
    environment: dict[str, str]

    def make_copy(self, folder: Path) -> None:
        """A copy of the repository's files in a new folder, with the commands in its .venv/bin."""
        for name in COPIED:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        install_shims(folder / ".venv" / "bin", self.address)

    def run(self, script: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a shell script in a copy."""
        path = f"{folder / '.venv' / 'bin'}:{self.environment['PATH']}"
        return subprocess.run(
            ["sh", "-euc", script],
            cwd=folder,
            env={**self.environment, **variables, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )


@pytest.fixture(scope="session")
def workshop(tiny_llama: Path, tiny_bert: Path, smollm2: Path, minilm: Path) -> Iterator[Workshop]:
    """A fork server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SCALEDOWN_", "OTEL_"))}
    environment = {
        **kept,
        "SCALEDOWN_DTYPE": "float32",
        "SCALEDOWN_ADMIN_KEY": ADMIN_KEY,
        # Costs are given, because measuring them takes a while.
        "SCALEDOWN_COMPRESSOR_TOKEN_US": "10",
        "SCALEDOWN_PREFILL_TOKEN_US": "100",
        "OMP_NUM_THREADS": "1",
        "TINY_GENERATOR": str(tiny_llama),
        "TINY_ENCODER": str(tiny_bert),
    }
    with tempfile.TemporaryDirectory(prefix="docs-") as folder:  # a socket's address has to be short
        address = Path(folder) / "socket"
        command = [sys.executable, "-m", "tests.docs.fork_server", str(address)]
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not address.exists():
                assert server.poll() is None, "the fork server has ended"
                assert time.monotonic() < deadline, "the fork server took too long to start"
                time.sleep(0.05)
            yield Workshop(address, environment)
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="session")
def service(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address (host and port) of a service with the demo checkpoint, and a tiny one, `mine`, to change to."""
    folder = tmp_path_factory.mktemp("service")
    workshop.make_copy(folder)
    generator, encoder = (Path(workshop.environment[f"TINY_{name}"]) for name in ("GENERATOR", "ENCODER"))
    save_checkpoint(build_model(make_config(generator, encoder)), folder / "checkpoints" / "mine")
    address = f"127.0.0.1:{free_port()}"
    flags = f"--checkpoint checkpoints/demo --port {address.split(':')[1]} --batch-wait-ms 0 --log-level error"
    command = f"exec .venv/bin/python -m service {flags}"
    process = subprocess.Popen(["sh", "-c", command], cwd=folder, env={**workshop.environment, SERVE: "1"})
    try:
        _wait_until_ready(process, address)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def _wait_until_ready(process: "subprocess.Popen[bytes]", address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, "the service has ended"
        assert time.monotonic() < deadline, "the service took too long to start"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://{address}/readyz", trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
