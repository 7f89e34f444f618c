"""What the tests of the Ray Serve application do on its cluster: deploy, find processes, ask under load, compare."""

import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx

from core.answer import answer as lone_answer
from core.checkpoint import load_checkpoint
from core.config import Mode
from core.passages import Passage
from core.policy import Policy
from core.sampling import GenerationOptions
from tests.service.calls import PASSAGES
from tests.waiting import wait_for

KEY = "admin-0123456789abcdef"
ADMIN = {"Authorization": f"Bearer {KEY}"}
START_SECONDS = 1200  # on a machine that is busy with other work
MODES: tuple[Mode, ...] = ("compressed", "hybrid", "text")
QUERIES = tuple(f"{question} ({number})" for number in range(8) for question in ("Who found it?", "What is bread?"))
NEW_TOKENS = 24


class Lone:
    """What one process answers, by checkpoint version."""

    def __init__(self, root: Path) -> None:
        self.models = {model.name: model for model in (load_checkpoint(root / name) for name in ("first", "second"))}
        self._known: dict[tuple[str, str, Mode, int], str] = {}

    def answer(self, version: str, query: str, mode: Mode, hops: int = 1) -> str:
        """The text."""
        key = (version, query, mode, hops)
        if key not in self._known:
            passages = [Passage(each) if isinstance(each, str) else Passage(**each) for each in PASSAGES]
            policy, options = Policy(mode, hops=hops), GenerationOptions(max_new_tokens=NEW_TOKENS)
            self._known[key] = lone_answer(self.models[version], query, passages, policy, options=options).text
        return self._known[key]


def deploy(folder: Path, **values: object) -> None:
    """Put the application in the place of what is deployed."""
    from ray import serve

    from service.ray_app import build_app

    costs = {"compressor_token_us": 10, "prefill_token_us": 100}  # not to be measured by every process
    shown = {"checkpoint": folder / "first", "admin_key": KEY, "dtype": "float32", "threads": 1, **costs, **values}
    serve.run(build_app({name: str(value) for name, value in shown.items()}))


def processes(deployment: str) -> list[int]:
    """The replicas of a deployment that are up, by the name that Ray gives a process once it has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::ServeReplica:default:" + deployment.encode()):
                found.append(int(path.parent.name))
    return sorted(found)


def ask(client: httpx.Client, number: int, **headers: str) -> tuple[str, Mode, httpx.Response]:
    """One of the questions in one of the modes, and the response."""
    query, mode = QUERIES[number % len(QUERIES)], MODES[number % len(MODES)]
    body = {"query": query, "passages": PASSAGES, "mode": mode, "max_new_tokens": NEW_TOKENS}
    return query, mode, client.post("/answer", json=body, headers=headers)


class Load:
    """Requests without a pause from several threads, until the block ends."""

    def __init__(self, client: httpx.Client, callers: int = 12) -> None:
        self.done: list[tuple[str, Mode, httpx.Response]] = []
        self._client = client
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self._callers = callers
        self._futures: list[Future[None]] = []

    def __enter__(self) -> "Load":
        self._futures = [self._pool.submit(self._call, number) for number in range(self._callers)]
        self.wait(self._callers)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown()
        for future in self._futures:
            future.result()

    def wait(self, more: int) -> None:
        """Let so many requests more be answered."""
        goal = len(self.done) + more
        wait_for(lambda: len(self.done) >= goal, START_SECONDS)

    def _call(self, number: int) -> None:
        while not self._ended.is_set():
            self.done.append(ask(self._client, number))
            number += self._callers


def check(done: list[tuple[str, Mode, httpx.Response]], lone: Lone) -> set[str]:
    """Every answer is the lone answer of the version it names; returns those versions."""
    versions = set()
    for query, mode, response in done:
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["answer"] == lone.answer(body["checkpoint"], query, mode)
        versions.add(body["checkpoint"])
    return versions


def change(client: httpx.Client, action: str, name: str | None = None) -> httpx.Response:
    """Change the checkpoint."""
    body = {"action": action} | ({"name": name} if name else {})
    return client.post("/admin/checkpoints", json=body, headers=ADMIN)
