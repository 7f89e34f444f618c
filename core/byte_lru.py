"""A dictionary under a limit in bytes: the least recently used entries leave first. Knows no models."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class CacheCounts:
    """What a cache has done since it was made."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


class ByteLRU(Generic[K, V]):
    """Entries of known sizes under a limit of `max_bytes`. Safe to use from any thread.

    Room is made before an entry is: `put` takes a function that makes the value, and calls it only once the limit
    allows for its bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.counts = CacheCounts()
        self._entries: OrderedDict[K, tuple[int, V]] = OrderedDict()
        self._bytes = 0  # of the entries, and of those that are being made
        self._making = 0  # of those alone
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        """Whether there is an entry; this is no use of it, and counts as neither hit nor miss."""
        return key in self._entries

    @property
    def bytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def get(self, key: K) -> V | None:
        """The entry of `key`, now the most recently used, if it is still here."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.counts.misses += 1
                return None
            self.counts.hits += 1
            self._entries.move_to_end(key)
            return entry[1]

    def put(self, key: K, nbytes: int, make: Callable[[], V]) -> V | None:
        """Keep what `make()` returns, `nbytes` large, unless `key` is here already or others being made leave no room.

        Returns what was kept. What `make` raises passes through, and leaves the cache without the entry.
        """
        with self._lock:
            # What other threads are making cannot be dropped for this: where both do not fit, nothing is.
            if key in self._entries or self._making + nbytes > self.max_bytes:
                return None
            while self._bytes + nbytes > self.max_bytes:
                _, (freed, _) = self._entries.popitem(last=False)
                self._bytes -= freed
                self.counts.evictions += 1
            self._bytes += nbytes
            self._making += nbytes
        kept = False
        try:
            value = make()
            with self._lock:
                if key not in self._entries:  # another thread may have made the same in the meantime
                    self._entries[key] = (nbytes, value)
                    self._making -= nbytes
                    kept = True
        finally:
            if not kept:
                with self._lock:
                    self._bytes -= nbytes
                    self._making -= nbytes
        return value if kept else None

    def discard(self, is_old: Callable[[K], bool]) -> None:
        """Drop every entry whose key `is_old`; they do not count as evicted."""
        with self._lock:
            for key in [key for key in self._entries if is_old(key)]:
                self._bytes -= self._entries.pop(key)[0]
