"""The caches of one service: their memory, which all loaded versions share, and what is told about them.

Knows no requests. Keys carry their version, so that no version is served what another made.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

from core.byte_lru import ByteLRU, CacheCounts
from core.compressors import NLayersCompressor
from core.config import dump_config
from core.document_cache import DocumentCache, PrefixMemory, caches_documents
from core.model import Model
from core.rows import ChunkRow
from service.caches.blobs import FORMAT, BlobStore
from service.caches.documents import BlobStores
from service.caches.embeddings import EmbeddingMemory, SharedRows
from service.caches.folder import FolderStore
from service.caches.redis_store import RedisStore
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)


class EngineCaches:
    """What is kept between requests, within the limits of the settings. Raises ConfigError where they cannot be met."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.documents: PrefixMemory = ByteLRU(settings.document_cache_bytes)
        self.embeddings: EmbeddingMemory = ByteLRU(settings.embedding_cache_bytes)
        self._stores = BlobStores(_blob_stores(settings))
        self._metrics = metrics
        self._memories: dict[str, ByteLRU[Any, Any]] = {"document": self.documents, "embedding": self.embeddings}
        self._published = {name: CacheCounts() for name in self._memories}

    def attach(self, model: Model) -> Model:
        """`model` with its part of the document cache; itself where that does not apply, which is logged."""
        why_not = self.no_documents(model)
        if why_not or not isinstance(model.compressor, NLayersCompressor):
            log.info("no document cache", extra={"checkpoint": model.name, "reason": why_not})
            return model
        documents = DocumentCache(namespace_of(model), model.compressor, self.documents, self._stores)
        return replace(model, documents=documents)

    def no_documents(self, model: Model) -> str | None:
        """Why chunks of this model are not cached, in words for an operator; None where they are."""
        if not self.documents.max_bytes:
            return "off: document_cache_bytes is 0"
        if not caches_documents(model.config):
            kind, order = model.config.compressor.kind, model.config.compressor.order
            return f"does not apply: needs an n_layers compressor with order document_first, this is {kind}, {order}"
        return "does not apply: an accelerator's graphs read whole rows" if model.accelerated is not None else None

    def shared_rows(self) -> SharedRows:
        """The embedding cache of one more lane."""
        return SharedRows(self.embeddings)

    def fetch(self, model: Model, rows: Sequence[ChunkRow]) -> None:
        """Bring chunks from disk or Redis into the memory. Blocks: call it in a pool."""
        if model.documents is not None:
            self._stores.fetch(model.documents, rows)

    def publish(self) -> None:
        """Bring the metrics up to date."""
        for name, memory in self._memories.items():
            now, before = replace(memory.counts), self._published[name]
            hits, misses, evictions = (new - old for new, old in zip(astuple(now), astuple(before), strict=True))
            self._published[name] = now
            self._metrics.cache_lookups.labels(name, "hit").inc(hits)
            self._metrics.cache_lookups.labels(name, "miss").inc(misses)
            self._metrics.cache_evictions.labels(name).inc(evictions)
            self._metrics.cache_bytes.labels(name).set(memory.bytes)

    def close(self) -> None:
        """Let go of the thread that writes."""
        self._stores.close()


def namespace_of(model: Model) -> str:
    """Names everything but the tokens that decides what is made of a chunk, in 64 hexadecimal digits.

    The weights are not read: a checkpoint's name holds the hash of its manifest, and an untrained compressor's layers
    are its base model's.
    """
    dtype = str(model.compressor.slots.dtype)
    parts = (str(FORMAT), model.name, model.base.sha256, dtype, model.number_format, dump_config(model.config))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _blob_stores(settings: Settings) -> list[BlobStore]:
    stores: list[BlobStore] = []
    if settings.document_cache_bytes and settings.document_cache_folder is not None:
        stores.append(FolderStore(settings.document_cache_folder, settings.document_cache_folder_bytes))
    if settings.document_cache_bytes and settings.document_cache_redis is not None:
        stores.append(RedisStore(settings.document_cache_redis.get_secret_value()))
    return stores
