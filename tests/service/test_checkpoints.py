"""Changing the checkpoint under load: no request fails, a broken one changes nothing, versions are named truly."""

import asyncio
import contextlib
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from core.checkpoint import load_checkpoint
from core.errors import CheckpointError
from core.model import Model
from service import admin, checkpoints, versions
from service.app import create_app
from service.loading import load_model
from service.versions import model_bytes, version_of
from tests.service.calls import PASSAGES, QUERY, answer, error
from tests.service.conftest import make_settings, serve_app
from tests.waiting import wait_for

KEY = "admin-0123456789abcdef"
ADMIN = {"Authorization": f"Bearer {KEY}"}


@contextlib.contextmanager
def serve_checkpoint(checkpoint: Path, **values: object) -> Iterator[httpx.Client]:
    app = create_app(make_settings(checkpoint=checkpoint, admin_key=KEY, **values))
    with serve_app(app) as client:
        client.app = app  # type: ignore[attr-defined]  # tests reach the link watcher behind the socket
        yield client


def change(client: httpx.Client, action: str, name: str | None = None) -> httpx.Response:
    body = {"action": action} | ({"name": name} if name else {})
    return client.post("/admin/checkpoints", json=body, headers=ADMIN)


def test_a_checkpoint_serves_as_its_folder_says(root: Path) -> None:
    with serve_checkpoint(root / "first") as client:
        assert answer(client)["checkpoint"] == version_of(root / "first") == load_checkpoint(root / "first").name
        listed = client.get("/admin/checkpoints", headers=ADMIN).json()
        assert listed == {
            "active": version_of(root / "first"),
            "kept": [],
            "available": ["first", "second"],
            "loaded": None,
            "changing": None,
        }


def test_activate_and_roll_back(root: Path) -> None:
    first, second = version_of(root / "first"), version_of(root / "second")
    with serve_checkpoint(root / "first") as client:
        before = answer(client)
        changed = change(client, "activate", "second").json()
        assert (changed["version"], changed["active"], changed["kept"]) == (second, second, [first])
        assert client.get("/readyz").json()["checkpoint"] == second
        assert answer(client)["checkpoint"] == second
        assert [p["relevance"] for p in answer(client)["passages"]] != [p["relevance"] for p in before["passages"]]
        assert change(client, "rollback").json()["active"] == first
        again = answer(client)
        assert {**again, "timings_ms": None} == {**before, "timings_ms": None}
        assert change(client, "activate", second).json()["active"] == second  # by version, from memory
        assert f'scaledown_checkpoint_info{{checkpoint="{second}"}} 1.0' in client.get("/metrics").text


def test_a_request_may_name_a_version_that_is_in_memory(root: Path) -> None:
    first, second = version_of(root / "first"), version_of(root / "second")
    with serve_checkpoint(root / "first") as client:
        body = {"query": QUERY, "passages": PASSAGES}
        before = client.post("/rerank", json=body).json()
        refused = client.post("/rerank", json=body, headers={"X-Checkpoint": second})  # on disk only: nothing is loaded
        assert (refused.status_code, error(refused)["code"], error(refused)["field"]) == (
            404,
            "model_not_found",
            "X-Checkpoint",
        )
        assert change(client, "activate", "second").status_code == 200
        named = client.post("/rerank", json=body, headers={"X-Checkpoint": first}).json()
        assert (named["checkpoint"], named["results"]) == (first, before["results"])
        assert client.post("/rerank", json=body).json()["checkpoint"] == second


@pytest.fixture(scope="module")
def four(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with checkpoints a to d; c and d are copies of the first two, and versions of their own."""
    folder = tmp_path_factory.mktemp("four")
    for name, source in zip("abcd", ("first", "second") * 2, strict=True):
        shutil.copytree(root / source, folder / name)
    return folder


@pytest.mark.parametrize("keep", [1, 2])
def test_a_version_that_was_only_loaded_is_not_rolled_back_to(four: Path, keep: int) -> None:
    a, b, c, d = (version_of(four / name) for name in "abcd")
    with serve_checkpoint(four / "a", keep_checkpoints=keep) as client:
        change(client, "activate", "b")
        for name, version in (("c", c), ("d", d)):  # one is held: the second takes the first one's place
            loaded = change(client, "load", name).json()
            assert (loaded["active"], loaded["kept"], loaded["loaded"]) == (b, [a], version)
        assert f'checkpoint="{c}"' not in client.get("/metrics").text
        back = change(client, "rollback").json()
        assert (back["active"], back["kept"], back["loaded"]) == (a, [b], d)
        served = change(client, "activate", d).json()  # by version: it is in memory
        assert (served["active"], served["kept"], served["loaded"]) == (d, [b, a][-keep:], None)
        assert change(client, "rollback").json()["active"] == a


def test_the_model_that_a_chat_asks_for_is_that_of_its_header(root: Path) -> None:
    first, second = version_of(root / "first"), version_of(root / "second")
    with serve_checkpoint(root / "first") as client:
        assert change(client, "load", "second").json()["loaded"] == second

        def chat(model: str, **headers: str) -> httpx.Response:
            body = {"model": model, "messages": [{"role": "user", "content": QUERY}], "documents": PASSAGES}
            return client.post("/v1/chat/completions", json=body, headers=headers)

        for model in (second, "second", "scaledown"):
            assert chat(model, **{"X-Checkpoint": second}).json()["model"] == second
        for refused in (chat(first, **{"X-Checkpoint": second}), chat(second)):
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_what_was_loaded_is_there_though_nothing_is_kept(root: Path) -> None:
    second = version_of(root / "second")
    with serve_checkpoint(root / "first", keep_checkpoints=0) as client:
        assert change(client, "load", "second").json()["loaded"] == second
        body, named = {"query": QUERY, "passages": PASSAGES}, {"X-Checkpoint": second}
        assert client.post("/rerank", json=body, headers=named).json()["checkpoint"] == second
        assert change(client, "rollback").status_code == 409
        assert change(client, "load", "first").json()["loaded"] == second  # what serves is in memory already
        assert change(client, "activate", "second").json()["loaded"] is None


def test_nothing_to_roll_back_to(root: Path) -> None:
    with serve_checkpoint(root / "first", keep_checkpoints=0) as client:
        assert change(client, "rollback").status_code == 409
        assert change(client, "activate", "second").json()["kept"] == []
        assert change(client, "rollback").status_code == 409


@pytest.mark.parametrize("body", [{"action": "load"}, {"action": "activate"}, {"action": "rollback", "name": "first"}])
def test_a_name_is_given_where_there_is_one_to_give(root: Path, body: dict[str, str]) -> None:
    with serve_checkpoint(root / "first") as client:
        response = client.post("/admin/checkpoints", json=body, headers=ADMIN)
        assert response.status_code == 422
        assert error(response)["field"] == "name"


@pytest.mark.parametrize(
    "name",
    ["..", "../first", "/etc", "first/../../x", "a/b", ".hidden", "%2e%2e", "first\\..", "link", "circle", "first\0"],
)
def test_nothing_outside_the_root_can_be_named(root: Path, tmp_path: Path, name: str) -> None:
    inside, outside = tmp_path / "root", tmp_path / "outside"
    inside.mkdir()
    shutil.copytree(root / "first", inside / "first")
    shutil.copytree(root / "second", outside)
    (inside / "link").symlink_to(outside)
    (inside / "circle").symlink_to(inside / "circle")
    with serve_checkpoint(inside / "first") as client:
        response = change(client, "activate", name)
        assert response.status_code in (409, 422)
        assert str(tmp_path) not in response.text
        assert client.get("/readyz").json()["checkpoint"] == version_of(inside / "first")


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _alter(name: str) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return alter


def _edit_manifest(folder: Path, **values: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **values}))


def _pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _other_base(folder: Path) -> None:
    _edit_manifest(folder, generator={"name": "another", "sha256": "0" * 64})


def _other_weights(folder: Path) -> None:
    """Weights that fit and hash well, but are not those of the golden example."""
    tensors = load_file(folder / "compressor.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "compressor.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    record = manifest["files"]["compressor.safetensors"]
    data = (folder / "compressor.safetensors").read_bytes()
    record.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _link(folder: Path) -> None:
    target = folder.parent / "elsewhere.json"
    shutil.move(folder / "golden.json", target)
    (folder / "golden.json").symlink_to(target)


BROKEN = {
    "no manifest": _drop("manifest.json"),
    "no weights": _drop("compressor.safetensors"),
    "no config": _drop("config.json"),
    "altered weights": _alter("compressor.safetensors"),
    "altered config": _alter("config.json"),
    "unknown key": lambda folder: _edit_manifest(folder, extra=1),
    "another base model": _other_base,
    "a pickle": _pickle,
    "a link out": _link,
    "not what was saved": _other_weights,
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_checkpoint_changes_nothing_and_says_why(
    root: Path, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(root / "first", tmp_path / "first")
    shutil.copytree(root / "second", tmp_path / "broken")
    damage(tmp_path / "broken")
    with serve_checkpoint(tmp_path / "first") as client:
        before = answer(client)
        response = change(client, "activate", "broken")
        assert response.status_code == 409
        assert error(response)["code"] == "checkpoint"
        assert len(error(response)["message"]) > 20
        [line] = [record for record in caplog.records if record.message == "the new checkpoint is refused"]
        told = {"checkpoint": "broken", "reason": error(response)["message"]}  # where the alert sends the operator
        assert told.items() <= vars(line).items()
        after = answer(client)
        assert {**after, "timings_ms": None} == {**before, "timings_ms": None}
        assert 'scaledown_checkpoint_swaps_total{result="refused"} 1.0' in client.get("/metrics").text
        assert client.get("/admin/checkpoints", headers=ADMIN).json()["kept"] == []


def test_memory_is_checked_before_loading(root: Path) -> None:
    one = model_bytes(load_model(make_settings(checkpoint=root / "first")))
    with serve_checkpoint(root / "first", max_model_bytes=one) as client:
        response = change(client, "activate", "second")
        assert response.status_code == 409
        assert "MiB" in error(response)["message"]
    # What the base model adds is known once it is loaded, what is in the folder before.
    for limit in (one - 1, 1000):
        with pytest.raises(CheckpointError, match=r"^first: needs about .* MiB are free: see max_model_bytes"):
            asyncio.run(start(checkpoint=root / "first", max_model_bytes=limit))


def test_the_first_checkpoint_is_refused_before_it_is_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.versions.load_to_serve", lambda *_: pytest.fail("it is loaded"))
    with pytest.raises(CheckpointError, match="max_model_bytes"):
        asyncio.run(start(checkpoint=root / "first", max_model_bytes=1000))


async def start(**values: object) -> None:
    app = create_app(make_settings(**values))
    async with app.router.lifespan_context(app):
        pass


def test_embeddings_of_another_version_are_refused(root: Path) -> None:
    with serve_checkpoint(root / "first") as client:
        body = {"query": QUERY, "passages": PASSAGES, "store": True}
        compressed = client.post("/compress", json=body).json()["passages"][0]
        change(client, "activate", "second")
        for passage, field in (
            ({"embeddings": compressed["embeddings"]}, "passages.0.embeddings.checkpoint"),
            ({"embedding_id": compressed["embedding_id"]}, "passages.0.embedding_id"),
        ):
            response = client.post("/answer", json={"query": QUERY, "passages": [passage]})
            assert response.status_code == 422
            assert error(response)["field"] == field


@pytest.mark.parametrize(("swaps", "kept"), [(100, 1), (8, 0)], ids=["100 from memory", "8 loaded anew"])
def test_swaps_under_load_fail_no_request(root: Path, swaps: int, kept: int) -> None:
    with serve_checkpoint(root / "first", max_sequences=4, keep_checkpoints=kept) as client:
        expected = {}
        for name in ("first", "second"):
            change(client, "activate", name)
            got = answer(client)
            expected[got["checkpoint"]] = got["answer"], [p["relevance"] for p in got["passages"]]
        stop, failures, seen = threading.Event(), [], set()

        def ask() -> None:
            while not stop.is_set():
                response = client.post("/answer", json={"query": QUERY, "passages": PASSAGES, "max_new_tokens": 8})
                if response.status_code != 200:
                    failures.append(response.text)
                    return
                got = response.json()
                seen.add(got["checkpoint"])
                text, relevance = expected[got["checkpoint"]]
                if got["answer"] != text or [p["relevance"] for p in got["passages"]] != pytest.approx(
                    relevance, abs=1e-5
                ):
                    failures.append("not the answer of the version it names")

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        done, deadline = 0, time.monotonic() + 60
        # Swaps from memory can be over before an answer of each version is: then a few more.
        while done < swaps or (seen != set(expected) and time.monotonic() < deadline):
            assert change(client, "activate", ("first", "second")[done % 2]).status_code == 200
            done += 1
        stop.set()
        for thread in threads:
            thread.join(30)
        assert not failures
        assert seen == set(expected)


def test_a_link_that_moves_is_followed(root: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(root / "first")
    with serve_checkpoint(link) as client:
        app = client.app  # type: ignore[attr-defined]  # the fixture put it there
        assert client.get("/readyz").json()["checkpoint"] == version_of(root / "first")

        def follow(target: Path) -> str:
            (tmp_path / "next").symlink_to(target)
            (tmp_path / "next").rename(link)
            loop = app.state.engine.outbox._loop
            asyncio.run_coroutine_threadsafe(app.state.checkpoints.follow_link(), loop).result(20)
            return str(client.get("/readyz").json()["checkpoint"])

        assert follow(root / "second") == version_of(root / "second")
        assert follow(tmp_path / "nothing") == version_of(root / "second")
        assert follow(link) == version_of(root / "second")  # a circle
        assert follow(root / "first") == version_of(root / "first")


@pytest.fixture
def hangs() -> Iterator[threading.Event]:
    """Set while files do not answer, as those of a network file system whose server is away."""
    event = threading.Event()
    yield event
    event.clear()  # threads that wait for it end


def test_a_load_that_hangs_is_given_up_and_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, hangs: threading.Event
) -> None:
    first, second = version_of(root / "first"), version_of(root / "second")
    model = load_model(make_settings(checkpoint=root / "second"))

    def load(*_: object) -> Model:
        while hangs.is_set():
            time.sleep(0.01)
        return model

    with serve_checkpoint(root / "first", load_seconds=2) as client:
        monkeypatch.setattr(versions, "load_to_serve", load)

        def state() -> Any:
            return client.get("/admin/checkpoints", headers=ADMIN).json()

        refusals: list[httpx.Response] = []
        changing = threading.Thread(target=lambda: refusals.append(change(client, "activate", "second")))
        hangs.set()
        changing.start()
        wait_for(lambda: state()["changing"] == "second")
        assert error(change(client, "activate", first))["message"].endswith("is under way: second")
        assert answer(client)["checkpoint"] == first
        changing.join()
        assert error(refusals[0])["message"] == "second: its files did not come within 2 seconds, and are given up"
        assert 'scaledown_checkpoint_swaps_total{result="refused"} 1.0' in client.get("/metrics").text
        assert (state()["active"], state()["changing"]) == (first, None)
        assert change(client, "activate", first).status_code == 200  # what needs no file is not held up
        assert "is not over" in error(change(client, "activate", "second"))["message"]  # nor piles up threads
        hangs.clear()
        wait_for(lambda: change(client, "activate", "second").status_code == 200, 30)
        assert answer(client)["checkpoint"] == second


def test_a_folder_that_hangs_holds_up_no_request(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: threading.Event
) -> None:
    def patient(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            while hangs.is_set():
                time.sleep(0.01)
            return call(*arguments)

        return called

    for module, name in ((checkpoints, "followed"), (admin, "available_under")):
        monkeypatch.setattr(module, name, patient(getattr(module, name)))
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.5)
    link = tmp_path / "current"
    link.symlink_to(root / "first")
    with serve_checkpoint(link, checkpoint_root=root, watch_seconds=0.05) as client:
        hangs.set()
        link.unlink()
        link.symlink_to(root / "second")
        client.timeout = httpx.Timeout(10)
        state = client.get("/admin/checkpoints", headers=ADMIN).json()
        assert (state["active"], state["available"]) == (version_of(root / "first"), None)
        assert error(change(client, "activate", "second"))["message"].startswith("second: ")
        hangs.clear()
        wait_for(lambda: answer(client)["checkpoint"] == version_of(root / "second"), 30)  # the link is watched again
