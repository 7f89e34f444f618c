"""A real server on a real socket, in a thread of the test process, around a tiny model."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig, RelevanceConfig
from core.model import Model, build_model
from service.app import create_app
from service.server import Server
from service.settings import Settings

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


def make_settings(**values: object) -> Settings:
    """Settings for a test: nothing from the environment, a worker that does not wait, nothing taken from a cache."""
    return Settings.model_validate(
        {"batch_wait_ms": 0, "port": 0, "dtype": "float32", "embedding_cache_bytes": 0, **values}
    )


@pytest.fixture(scope="session")
def model(tiny_llama: Path) -> Model:
    """Two of the tiny Llama's layers as compressor, two rates, and a threshold for answerable."""
    config = Config(
        compressor=CompressorConfig(n_layers=2, chunk_tokens=64, rates=(16, 8)),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
        relevance=RelevanceConfig(threshold=0.5),
    )
    return build_model(config, seed=7)


@pytest.fixture(scope="session")
def root(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints that answer differently."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("first", "second")):
        config = Config(
            compressor=CompressorConfig(n_layers=1 + seed, chunk_tokens=64),
            generator=GeneratorConfig(base_model=str(tiny_llama)),
        )
        save_checkpoint(build_model(config, seed=seed), folder / name)
    return folder


class InThread(Server):
    """The service's server; only a process's main thread may listen for signals."""

    def settle(self) -> None:
        pass


@contextlib.contextmanager
def serve_app(app: FastAPI) -> Iterator[httpx.Client]:
    """Run `app` until the block ends; yields a client of it."""
    server = InThread(app, make_settings())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server took too long to start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def serve(model: Model) -> Serve:
    """Start a server with settings of the test's choice."""

    @contextlib.contextmanager
    def start(
        served: Model | None = None, on_fatal: Callable[[], None] | None = None, **values: object
    ) -> Iterator[httpx.Client]:
        app = create_app(make_settings(**values), served or model, on_fatal)
        with serve_app(app) as client:
            client.app = app  # type: ignore[attr-defined]  # tests look at the engine's counters behind the socket
            yield client

    return start


@pytest.fixture(scope="session")
def client(serve: Serve) -> Iterator[httpx.Client]:
    """One server with default settings for all tests that need no other."""
    with serve() as client:
        yield client
