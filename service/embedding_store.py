"""A bounded store of compressed passages, found by the id that `/compress` returned. Knows no HTTP.

It is one process's memory, not a database: an entry is gone after a restart or when newer ones need its place.
"""

import hashlib
import secrets
from dataclasses import dataclass

from torch import Tensor

from core.byte_lru import ByteLRU
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
        self._entries: ByteLRU[str, StoredPassage] = ByteLRU(max_bytes)

    @property
    def size(self) -> int:
        """Bytes held now."""
        return self._entries.bytes

    def put(self, entry: StoredPassage) -> str | None:
        """Keep `entry` and return its id, or None where it is larger than the whole store."""
        # Unguessable, as one caller's ids must not lead to another's passages.
        embedding_id = secrets.token_urlsafe(18)
        kept = self._entries.put(embedding_id, entry.size, lambda: entry)
        return None if kept is None else embedding_id

    def get(self, embedding_id: str) -> StoredPassage | None:
        """The entry of that id, if it is still here."""
        entry = self._entries.get(embedding_id)
        self._metrics.store_lookups.labels("hit" if entry else "miss").inc()
        return entry
