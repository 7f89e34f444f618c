"""A service inside of this process, for one command: on a socket file that only this user can open."""

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from pydantic import ValidationError
from transformers.utils.logging import disable_progress_bar

from core.errors import ConfigError
from service.app import create_app
from service.client import Client
from service.loading import load_model
from service.server import Server
from service.settings import Settings, check_environment, explain

START_SECONDS = 60


class ThreadServer(Server):
    """The service's server in a thread: only a process's main thread may listen for signals."""

    def settle(self) -> None:
        """Nothing: the process is another's."""


@contextlib.contextmanager
def local_client(checkpoint: Path) -> Iterator[Client]:
    """A client of a service that serves `checkpoint` here until the block ends.

    Everything is as it is with a service elsewhere, limits and SCALEDOWN_* settings included, but no key is asked for.
    Raises CheckpointError, BaseModelError and ConfigError.
    """
    disable_progress_bar()
    try:
        check_environment()
        settings = Settings(checkpoint=checkpoint, api_keys=(), admin_key=None)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    app = create_app(settings, load_model(settings))
    server = ThreadServer(app, settings)
    with tempfile.TemporaryDirectory(prefix="scaledown-") as folder:  # its mode is 0700
        server.config.uds = f"{folder}/socket"
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            _wait(server, thread)
            transport = httpx.HTTPTransport(uds=server.config.uds)
            with Client("http://scaledown", http=httpx.Client(transport=transport, timeout=None)) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(START_SECONDS)


def _wait(server: Server, thread: threading.Thread) -> None:
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the service in this process has ended before it began")
        time.sleep(0.01)
