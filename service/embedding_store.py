"""A bounded store of compressed passages, found by the id that `/compress` returned. Knows no HTTP.

It is one process's memory, not a database: an entry is gone after a restart or when newer ones need its place.
"""

import hashlib
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from service.metrics import Metrics


@dataclass(frozen=True, slots=True)
class StoredPassage:
    """A compressed passage: `memory` (l, d), raw relevance score, tokens as text, and the checkpoint that made it.

    query_sha256    of the query it was compressed for, as `query_sha256` makes it; None: the caller does not say
    """

    memory: Tensor
    score: float
    tokens: int
    title: str
    text: str
    checkpoint: str
    query_sha256: str | None

    @property
    def size(self) -> int:
        """Bytes of its embeddings and text, near enough for a limit."""
        return self.memory.nbytes + 4 * (len(self.text) + len(self.title)) + 512


def query_sha256(query: str) -> str:
    """What tells embeddings made for one query from those for another: 64 hexadecimal digits."""
    return hashlib.sha256(query.encode()).hexdigest()


class EmbeddingStore:
    """Least recently used entries leave first when `max_bytes` is passed. Safe to use from any thread."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, StoredPassage] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes held now."""
        return self._bytes

    def put(self, entry: StoredPassage) -> str | None:
        """Keep `entry` and return its id, or None where it is larger than the whole store."""
        if entry.size > self._max_bytes:
            return None
        # Unguessable, as one caller's ids must not lead to another's passages.
        embedding_id = secrets.token_urlsafe(18)
        with self._lock:
            self._entries[embedding_id] = entry
            self._bytes += entry.size
            while self._bytes > self._max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= oldest.size
        return embedding_id

    def get(self, embedding_id: str) -> StoredPassage | None:
        """The entry of that id, if it is still here."""
        with self._lock:
            entry = self._entries.get(embedding_id)
            if entry is not None:
                self._entries.move_to_end(embedding_id)
        self._metrics.store_lookups.labels("hit" if entry else "miss").inc()
        return entry
