"""Chunks on disk and in Redis: shared, bounded, and never believed when damaged."""

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.compressors.prefixes import Prefix
from core.document_cache import PrefixKey
from core.errors import ConfigError
from core.model import Model
from service.caches import documents
from service.caches.blobs import HEADER_BYTES, decode_prefix, encode_prefix
from service.caches.documents import BlobStores
from service.caches.folder import FolderStore
from service.caches.redis_store import RedisStore
from tests.free_port import free_port
from tests.service.conftest import Serve
from tests.service.test_caches import answer, assert_like, document_first, usage
from tests.waiting import wait_for

__all__ = ["document_first"]  # a fixture
KEY = ("a" * 64, "b" * 64)
PREFIX = Prefix(torch.arange(240.0).view(2, 2, 2, 5, 6), torch.arange(20.0).view(5, 4))
BLOB = encode_prefix(KEY, PREFIX)


def key(number: int) -> tuple[str, str]:
    return "a" * 64, f"{number:064x}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_hidden", [True, False])
def test_a_prefix_comes_back_as_it_was(dtype: torch.dtype, with_hidden: bool) -> None:
    assert PREFIX.hidden is not None
    prefix = Prefix(PREFIX.keys_values.to(dtype), PREFIX.hidden.to(dtype) if with_hidden else None)
    blob = encode_prefix(KEY, prefix)
    assert len(blob) <= prefix.nbytes + HEADER_BYTES
    got = decode_prefix(KEY, blob, prefix)
    assert got is not None
    assert torch.equal(got.keys_values, prefix.keys_values)
    assert (got.hidden is None) == (prefix.hidden is None)
    assert decode_prefix(key(1), blob, prefix) is None
    assert decode_prefix(KEY, blob, Prefix(prefix.keys_values[:, :, :, :4], prefix.hidden)) is None
    assert decode_prefix(KEY, blob, Prefix(prefix.keys_values, None if with_hidden else PREFIX.hidden)) is None
    assert decode_prefix(KEY, blob, Prefix(prefix.keys_values.half(), prefix.hidden)) is None


@given(place=st.integers(0, len(BLOB) - 1), value=st.integers(0, 255), end=st.integers(0, len(BLOB)))
def test_a_damaged_blob_is_never_believed(place: int, value: int, end: int) -> None:
    changed = BLOB[:place] + bytes([value]) + BLOB[place + 1 :]
    for damaged in (changed, BLOB[:end], BLOB[:end] + bytes(len(BLOB) - end), changed + b"more"):
        got = decode_prefix(KEY, damaged, PREFIX)
        if got is not None:  # where nothing was changed but the spaces that end a header
            assert torch.equal(got.keys_values, PREFIX.keys_values)


@given(blob=st.binary(max_size=200))
def test_noise_is_no_prefix(blob: bytes) -> None:
    assert decode_prefix(KEY, blob, PREFIX) is None
    assert decode_prefix(KEY, len(blob).to_bytes(8, "little") + blob, PREFIX) is None


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_folder_keeps_its_limit_and_what_was_used_last(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "new", 1000)
    for number in range(40):
        store.write(key(number), bytes([number]) * 100)
        assert size_of(tmp_path) <= 1000
        time.sleep(0.002)  # times of files are what says which came first
    assert store.read(key(39), 100) == bytes([39]) * 100
    assert store.read(key(0), 100) is None
    store.write(key(41), b"x" * 1001)
    assert store.read(key(41), 2000) is None
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}


def test_reading_is_a_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.caches.folder.TOUCH_SECONDS", 0.0)
    store = FolderStore(tmp_path, 1000)
    for number in range(9):
        store.write(key(number), bytes(100))
        time.sleep(0.002)
    assert store.read(key(0), 100) is not None
    time.sleep(0.002)
    for number in range(9, 14):
        store.write(key(number), bytes(100))
    assert store.read(key(0), 100) is not None
    assert store.read(key(1), 100) is None


def test_a_file_that_is_larger_than_it_can_be_is_removed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, 10_000)
    store.write(KEY, bytes(500))
    assert store.read(KEY, 499) is None
    assert size_of(tmp_path) == 0


def test_several_processes_in_one_folder(tmp_path: Path) -> None:
    """Each store counts for itself, as each process does; files vanish under the feet of the others."""
    limit, failures = 20_000, []
    stores = [FolderStore(tmp_path, limit) for _ in range(4)]

    def work(store: FolderStore, seed: int) -> None:
        for step in range(150):
            number = (seed * 7 + step * 3) % 60
            store.write(key(number), bytes([number]) * 500)
            got = store.read(key((number * 5) % 60), 500)
            if got is not None and got != bytes([(number * 5) % 60]) * 500:
                failures.append(got)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(stores, range(4), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert size_of(tmp_path) <= limit + 4 * (limit // 16 + 500)  # each may write so much between two looks
    assert not list(tmp_path.rglob("*.part"))


def test_what_another_process_writes_just_now_makes_no_room(tmp_path: Path) -> None:
    part = tmp_path / KEY[0] / ".0123456789abcdef.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 900)
    store = FolderStore(tmp_path, 1000)
    store.write(KEY, b"y" * 800)
    store.write(key(1), b"z" * 800)
    assert part.read_bytes() == b"x" * 900
    assert [store.read(each, 800) for each in (KEY, key(1))] == [None, b"z" * 800]


def test_a_folder_that_cannot_be_written_is_only_no_help(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    stores = BlobStores([FolderStore(blocked, 100_000), FolderStore(tmp_path / "other", 100_000)])
    for number in range(3):
        stores.put(key(number), PREFIX)
    wait_for(lambda: len(list(tmp_path.rglob("*.safetensors"))) == 3)
    # Once, not for every chunk: on a full disk the log would be what fills it.
    assert [record.message for record in caplog.records] == ["chunks cannot be kept for now"]
    assert str(tmp_path) not in caplog.text
    assert FolderStore(blocked, 1000).read(KEY, 10) is None
    stores.close()


def test_a_folder_is_written_again_after_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "REST_SECONDS", 0.0)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    stores = BlobStores([FolderStore(blocked, 100_000), FolderStore(tmp_path / "other", 100_000)])
    stores.put(key(1), PREFIX)
    wait_for(lambda: list((tmp_path / "other").rglob("*.safetensors")))
    blocked.unlink()
    stores.put(key(2), PREFIX)
    wait_for(lambda: list(blocked.rglob("*.safetensors")))
    stores.close()


def test_without_a_place_nothing_is_made_ready_for_one() -> None:
    before, stores = threading.active_count(), BlobStores([])
    stores.put(KEY, PREFIX)
    assert threading.active_count() == before  # no thread was started to write it
    stores.close()


def test_a_service_that_starts_again_knows_its_chunks(serve: Serve, document_first: Model, tmp_path: Path) -> None:
    with serve(document_first, document_cache_folder=tmp_path) as client:
        expected = answer(client)
        assert usage(expected) == (0, 0)
        chunks = usage(answer(client))[1]
        wait_for(lambda: len(list(tmp_path.rglob("*.safetensors"))) == chunks)
    with serve(document_first, document_cache_folder=tmp_path) as client:
        again = answer(client)
        assert usage(again) == (0, chunks)
        assert_like(again, expected)
    first, second, *_ = sorted(tmp_path.rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(b"\0" * second.stat().st_size)
    with serve(document_first, document_cache_folder=tmp_path) as client:
        again = answer(client)
        assert usage(again) == (0, chunks - 2)
        assert_like(again, expected)
        wait_for(lambda: len(list(tmp_path.rglob("*.safetensors"))) == chunks)
    with serve(document_first, document_cache_folder=tmp_path) as client:
        assert usage(answer(client)) == (0, chunks)


def test_a_store_that_is_slow_is_not_waited_for(
    serve: Serve, document_first: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PrefixKey] = []
    read = FolderStore.read

    def read_slowly(store: FolderStore, key: PrefixKey, max_bytes: int) -> bytes | None:
        asked.append(key)
        time.sleep(0.2)
        return read(store, key, max_bytes)

    with serve(document_first, document_cache_folder=tmp_path) as client:
        expected = answer(client)
        chunks = usage(answer(client))[1]
        wait_for(lambda: len(list(tmp_path.rglob("*.safetensors"))) == chunks)
    monkeypatch.setattr(FolderStore, "read", read_slowly)
    monkeypatch.setattr(documents, "FETCH_SECONDS", 0.3)
    with serve(document_first, document_cache_folder=tmp_path) as client:
        again = answer(client)
        assert usage(again) == (0, len(asked))
        assert 1 <= len(asked) <= 2 < chunks
        assert_like(again, expected)
        asked.clear()
        assert answer(client, passages=["Nobody has asked about this one yet."])["answer"]
        assert not asked  # it is left alone for a while


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The URL of a real server that keeps nothing on disk."""
    pytest.importorskip("redis", reason="the extra `redis` is not installed")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    command = [program, "--port", str(port), "--save", "", "--dir", str(folder), "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: _listens(port), 20)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False


def test_services_share_chunks_through_redis(
    serve: Serve, document_first: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server(tmp_path) as url:
        store = RedisStore(url)
        store.write(KEY, b"x" * 100)
        assert store.read(KEY, 100) == b"x" * 100
        assert store.read(key(1), 100) is None
        assert store.read(KEY, 99) is None  # larger than it can be: not transferred whole, and removed
        assert store.read(KEY, 100) is None
        with serve(document_first, document_cache_redis=url) as client:
            expected = answer(client)
            chunks = usage(answer(client))[1]
            wait_for(lambda: len(store._client.keys("scaledown:document:*")) == chunks)
        with serve(document_first, document_cache_redis=url) as client:
            again = answer(client)
            assert usage(again) == (0, chunks)
            assert_like(again, expected)
            assert all(store._client.ttl(name) > 0 for name in store._client.keys("scaledown:document:*"))
    with serve(document_first, document_cache_redis=url) as client:  # nobody is there any more
        assert_like(answer(client), expected)
    assert "chunks cannot be kept for now" in caplog.text
    assert url not in caplog.text


def test_what_is_no_redis_is_refused() -> None:
    pytest.importorskip("redis", reason="the extra `redis` is not installed")
    with pytest.raises(ConfigError, match="document_cache_redis"):
        RedisStore("http://127.0.0.1")


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(ConfigError, match=r"'\.\[redis\]'"):
        RedisStore("redis://127.0.0.1")
