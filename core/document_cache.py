"""What a causal compressor made of chunks it read before their query: kept by content, taken up for any query.

For `order: document_first` a row begins with its chunk, and the keys and values of those positions do not depend on the
query: a chunk that is known costs only its query and its slots. Knows no requests and no network; a second, slower
place to keep prefixes is given as a `PrefixStore`.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from core.byte_lru import ByteLRU
from core.compressors import NLayersCompressor
from core.compressors.prefixes import Prefix, Recorder
from core.config import Config
from core.rows import ChunkRow

PrefixKey = tuple[str, str]  # the version's namespace, sha256 of a row's first tokens
PrefixMemory = ByteLRU[PrefixKey, Prefix]


class PrefixStore(Protocol):
    """A place behind the memory: slower, larger, and maybe shared with other processes."""

    def put(self, key: PrefixKey, prefix: Prefix) -> None:
        """Offer a prefix, which never changes, to be kept. Returns at once, and raises nothing."""


def caches_documents(config: Config) -> bool:
    """Whether a chunk's keys and values do not depend on the query: a causal compressor that reads the chunk first."""
    return config.compressor.kind == "n_layers" and config.compressor.order == "document_first"


class DocumentCache:
    """The chunks that one version knows.

    namespace   names the version; nothing is kept under it that another version made
    compressor  reads the chunk first
    memory      may be shared by many versions, which then share its limit
    """

    def __init__(
        self,
        namespace: str,
        compressor: NLayersCompressor,
        memory: PrefixMemory,
        store: PrefixStore | None = None,
    ) -> None:
        self.namespace = namespace
        self.memory = memory
        self._compressor = compressor
        self._store = store

    def key(self, row: ChunkRow) -> PrefixKey:
        """Of what is kept for a row: the version and the tokens, nothing of the caller."""
        ids = np.asarray(self._compressor.row_format.prefix(row), dtype="<i8")
        return self.namespace, hashlib.sha256(ids.tobytes()).hexdigest()

    def like(self, row: ChunkRow) -> Prefix:
        """Shape, type and size of what is kept for a row, without its numbers."""
        return self._compressor.prefix_like(len(self._compressor.row_format.prefix(row)))

    def get(self, row: ChunkRow) -> Prefix | None:
        """What is known of a row's chunk."""
        return self.memory.get(self.key(row))

    def keep(self, rows: Sequence[ChunkRow], recorder: Recorder, hidden: Tensor | None) -> None:
        """Keep the chunks of rows that one pass has computed; `hidden` (B, T, width) if the readout looks at it.

        In the host's memory: a device's is better spent on answers, and copying costs less than computing.
        """
        host = torch.device("cpu")
        for i, row in enumerate(rows):
            key, like = self.key(row), self.like(row)
            kept = self.memory.put(key, like.nbytes, partial(recorder.prefix, i, like.length, hidden, host))
            if kept is not None and self._store is not None:
                self._store.put(key, kept)

    def close(self) -> None:
        """Give back the memory of this version."""
        self.memory.discard(lambda key: key[0] == self.namespace)
