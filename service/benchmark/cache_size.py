"""What a look-up and an insertion cost in a full document cache of ever more chunks, in memory and on disk."""

import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.byte_lru import ByteLRU
from core.document_cache import PrefixKey
from service.benchmark.scaling import Notify, summarise
from service.caches.folder import FolderStore

CHUNK_BYTES = 4096  # of one chunk here; a real one's are more, and cost time to copy and none to find
STAGES = ("look-up in memory", "insertion in memory", "look-up on disk", "insertion on disk")


def run_cache_curve(sizes: Sequence[int], repeats: int, notify: Notify) -> dict[str, Any]:
    """The entry of the JSON: mean seconds of one operation on a cache that holds `size` chunks and is full.

    An insertion pushes out what was used least recently. On disk that is done for many at a time, so as many are made
    as it takes to do that more than once.
    """
    points = []
    for size in sizes:
        notify(f"cached chunks: {size}")
        runs = [_run(size) for _ in range(repeats)]
        held = size * CHUNK_BYTES
        points.append({"peak_bytes": held, "working_bytes": held, "runs": runs})
    return summarise("cached chunks", sizes, "cache", points, STAGES)


def _run(size: int) -> dict[str, float]:
    blob, count = bytes(CHUNK_BYTES), max(200, size // 4)
    known, new = _keys(size), _keys(count)
    asked = [known[i * size // count] for i in range(count)]
    memory: ByteLRU[PrefixKey, bytes] = ByteLRU(size * CHUNK_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        disk = FolderStore(Path(folder), size * CHUNK_BYTES)
        for key in known:
            memory.put(key, CHUNK_BYTES, lambda: blob)
            disk.write(key, blob)
        operations: tuple[tuple[Callable[[PrefixKey], object], Sequence[PrefixKey]], ...] = (
            (memory.get, asked),
            (lambda key: memory.put(key, CHUNK_BYTES, lambda: blob), new),
            (lambda key: disk.read(key, CHUNK_BYTES), asked),
            (lambda key: disk.write(key, blob), new),
        )
        return {stage: _mean_seconds(*each) for stage, each in zip(STAGES, operations, strict=True)}


def _keys(count: int) -> list[PrefixKey]:
    return [("benchmark", secrets.token_hex(32)) for _ in range(count)]


def _mean_seconds(operation: Callable[[PrefixKey], object], keys: Sequence[PrefixKey]) -> float:
    began = time.perf_counter()
    for key in keys:
        operation(key)
    return (time.perf_counter() - began) / len(keys)
