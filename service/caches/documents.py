"""The places behind the memory of chunks: filled by a thread of their own, read before a request is queued.

The worker's thread never waits for them. Knows neither files nor servers, only `BlobStore`s.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from core.compressors.prefixes import Prefix
from core.document_cache import DocumentCache, PrefixKey
from core.rows import ChunkRow
from service.caches.blobs import HEADER_BYTES, BlobStore, decode_prefix, encode_prefix

log = logging.getLogger(__name__)
MAX_WAITING_BYTES = 256 * 2**20  # of prefixes that wait to be written; more are not kept there
FETCH_SECONDS = 1.0  # of one request's looking up; a read that has begun is waited for
REST_SECONDS = 15.0  # what failed or was too slow is left alone for so long: who waits for it tokenises nothing
T = TypeVar("T")


class BlobStores:
    """All stores of a service, asked in turn. A `PrefixStore` for the worker's thread."""

    def __init__(self, stores: Sequence[BlobStore]) -> None:
        self._stores = stores
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="document-cache")
        self._waiting = 0
        self._resting: dict[Callable[..., Any], float] = {}  # methods of stores, and until when they are not called
        self._lock = threading.Lock()

    def put(self, key: PrefixKey, prefix: Prefix) -> None:
        """Have a prefix written soon, unless too many wait already."""
        if not self._stores:
            return
        with self._lock:
            if self._waiting + prefix.nbytes > MAX_WAITING_BYTES:
                return
            self._waiting += prefix.nbytes
        try:
            self._writer.submit(self._write, key, prefix)
        except RuntimeError:  # the service is stopping
            return

    def fetch(self, documents: DocumentCache, rows: Sequence[ChunkRow]) -> None:
        """Bring what is known of rows' chunks into the memory, as far as that has room for them all.

        What FETCH_SECONDS did not bring is computed, as if nobody knew it. Never for more than the memory holds: later
        chunks would only push out the first.
        """
        if all(self._rests(store.read) for store in self._stores):
            return
        end = time.monotonic() + FETCH_SECONDS
        room = documents.memory.max_bytes
        for row in rows:
            key, like = documents.key(row), documents.like(row)
            room -= like.nbytes
            if room < 0:
                return
            if key in documents.memory:
                continue
            self._fetch(documents, key, like)
            if time.monotonic() > end:
                log.warning("kept chunks come too slowly: none are looked up for now")
                self._rest(*(store.read for store in self._stores))
                return

    def _fetch(self, documents: DocumentCache, key: PrefixKey, like: Prefix) -> None:
        for store in self._stores:
            blob = self._ask(store.read, key, like.nbytes + HEADER_BYTES)
            if blob is None:
                continue
            prefix = decode_prefix(key, blob, like)
            if prefix is not None:
                documents.memory.put(key, like.nbytes, partial(_same, prefix))
                return
            log.warning("a kept chunk is damaged and dropped")
            self._ask(store.discard, key)

    def _write(self, key: PrefixKey, prefix: Prefix) -> None:
        try:
            blob = encode_prefix(key, prefix)
            for store in self._stores:
                self._ask(store.write, key, blob)
        except Exception:
            log.exception("a chunk could not be kept")
        finally:
            with self._lock:
                self._waiting -= prefix.nbytes

    def _ask(self, method: Callable[..., T], *values: object) -> T | None:
        """What a method of a store gives; None where it fails, and while it rests."""
        if self._rests(method):
            return None
        try:
            return method(*values)
        except Exception as error:  # each kind of store has its own
            # Not the message, which can hold an address. Once, not for every chunk: a log can fill the disk, too.
            reason = getattr(error, "strerror", None) or type(error).__name__
            log.warning("chunks cannot be kept for now", extra={"store": method.__qualname__, "error": reason})
            self._rest(method)
            return None

    def _rest(self, *methods: Callable[..., Any]) -> None:
        self._resting.update(dict.fromkeys(methods, time.monotonic() + REST_SECONDS))

    def _rests(self, method: Callable[..., Any]) -> bool:
        return time.monotonic() < self._resting.get(method, 0.0)

    def close(self) -> None:
        """Write nothing more. What waits is dropped: it was only to save time."""
        self._writer.shutdown(wait=False, cancel_futures=True)


def _same(prefix: Prefix) -> Prefix:
    return prefix
