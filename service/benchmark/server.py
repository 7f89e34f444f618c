"""A service of its own to load: a process on a free port of this machine that does not outlive the block."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import httpx

from core.errors import EngineError
from service.settings import PREFIX, Settings

START_SECONDS = 600
STOP_SECONDS = 60
GIVEN = (
    "checkpoint",
    "base_model",
    "dtype",
    "quantize",
    "device",
    "threads",
)  # what the command line says, the rest is default


@contextlib.contextmanager
def running_service(settings: Settings) -> Iterator[str]:
    """The URL of a service with the model of `settings`, once it is ready. Raises EngineError where it never is."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    values = {name: getattr(settings, name) for name in GIVEN}
    environment |= {f"{PREFIX}{name.upper()}": str(value) for name, value in values.items() if value is not None}
    for cache in ("EMBEDDING_CACHE_BYTES", "DOCUMENT_CACHE_BYTES"):
        environment[PREFIX + cache] = "0"  # the same requests come again: they are to be computed
    command = [sys.executable, "-m", "service", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            if not _wait_until_ready(process, url):
                log.seek(0)
                raise EngineError(f"the service did not start; its log: {log.read()[-2000:].decode(errors='replace')}")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str) -> bool:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200:
                return True
        time.sleep(0.2)
    return False
