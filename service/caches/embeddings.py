"""Rows that equal one that was compressed before, or that is being compressed: each is computed once.

Keys are of content only: version, query, chunk and rate, in tokens. Single-threaded but for the memory, which many
lanes share. Knows no models and no HTTP.
"""

import hashlib
import itertools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from core.byte_lru import ByteLRU
from core.compressed import CompressedChunk, CompressedPassage
from core.rows import ChunkRow
from service.jobs import Job

EmbeddingMemory = ByteLRU[tuple[int, bytes], CompressedChunk]
OVERHEAD_BYTES = 512  # of an entry, beside its tensors
_versions = itertools.count()


@dataclass(frozen=True, slots=True)
class Place:
    """One row of a job, and where in the job's results its outcome belongs."""

    job: Job
    index: int
    row: ChunkRow


@dataclass(slots=True)
class _InFlight:
    leader: Place  # whose row is queued
    followers: list[Place] = field(default_factory=list)


class SharedRows:
    """The rows that one lane has in flight, and its part of the memory. A limit of 0 turns both off."""

    def __init__(self, memory: EmbeddingMemory) -> None:
        self._memory = memory
        self._version = next(_versions)  # never used again, whatever the model is called
        self._in_flight: dict[bytes, _InFlight] = {}

    def ask(self, place: Place) -> bool:
        """Whether the row has to be computed: it is neither known, in which case it is filled in, nor in flight."""
        if not self._memory.max_bytes:
            return True
        key = row_key(place.row)
        entry = self._in_flight.get(key)
        if entry is not None:
            entry.followers.append(place)
            self._memory.counts.hits += 1
            return False
        known = self._memory.get((self._version, key))
        if known is not None:
            _fill(place, known)
            return False
        self._in_flight[key] = _InFlight(place)
        return True

    def computed(self, row: ChunkRow, chunk: CompressedChunk) -> list[Job]:
        """Keep a row's outcome and fill it in where it was waited for; returns whose jobs those were."""
        if not self._memory.max_bytes:
            return []
        key = row_key(row)
        nbytes = OVERHEAD_BYTES + chunk.memory.nbytes + (0 if chunk.weights is None else chunk.weights.nbytes)
        self._memory.put((self._version, key), nbytes, lambda: chunk)
        entry = self._in_flight.pop(key, None)
        waiting = [place for place in entry.followers if not place.job.done] if entry else []
        for place in waiting:
            _fill(place, chunk)
        return [place.job for place in waiting]

    def leave(self, job: Job) -> list[Place]:
        """Forget a job that is done before its rows are; returns rows of others that it was to compute."""
        orphans = []
        for key, entry in list(self._in_flight.items()):
            entry.followers = [place for place in entry.followers if place.job is not job]
            if entry.leader.job is job:
                if entry.followers:
                    entry.leader = entry.followers.pop(0)
                    orphans.append(entry.leader)
                else:
                    del self._in_flight[key]
        return orphans

    def close(self) -> None:
        """Give back the memory of this lane."""
        self._memory.discard(lambda key: key[0] == self._version)


def row_key(row: ChunkRow) -> bytes:
    """sha256 of everything that decides what becomes of a row, apart from the model."""
    chunk = row.chunk
    parts = (row.query_ids, chunk.generator_ids, chunk.compressor_ids, chunk.compressor_index)
    numbers = array("q", (row.memory_tokens, *map(len, parts), *itertools.chain.from_iterable(parts)))
    return hashlib.sha256(numbers.tobytes()).digest()


def _fill(place: Place, chunk: CompressedChunk) -> None:
    """The same text can stand elsewhere in another passage: where it stands is the asking row's."""
    own = place.row.chunk
    place.job.results[place.index] = replace(chunk, start=own.start, end=own.end, cached="embedding")
    place.job.outstanding -= 1


def count_cached(passages: Iterable[CompressedPassage]) -> dict[str, int]:
    """The fields of `CacheUsage`: chunks whose embeddings were known, and others whose documents were."""
    kinds = [chunk.cached for passage in passages for chunk in passage.chunks]
    return {"cached_chunks": kinds.count("embedding"), "cached_documents": kinds.count("document")}
