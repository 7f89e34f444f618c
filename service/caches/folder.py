"""Blobs as files of one folder that many processes may share: never torn, the least recently used leave first.

A file appears whole under its name or not at all. Every process counts what it writes and looks at the whole folder
from time to time, so that together they may pass the limit by what is written between two looks. Knows no tensors.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.document_cache import PrefixKey

LOOKS = 16  # at the whole folder, while as much is written as it may hold
KEPT_SHARE = 0.9  # of the limit, after files were removed: so that not every write has to remove some
STALE_SECONDS = 3600.0  # after which a file that was never finished is removed
TOUCH_SECONDS = 60.0  # how exact it is known when a file was used


@dataclass(frozen=True, slots=True)
class _File:
    used: float
    size: int
    path: Path


class FolderStore:
    """A `BlobStore`: `<folder>/<version>/<first two digits>/<sha256>.safetensors`. Safe to use from any thread."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._bytes = 0  # in the folder, as far as is known
        self._until_look = 0  # bytes that may be written before the next look
        self._lock = threading.Lock()

    def read(self, key: PrefixKey, max_bytes: int) -> bytes | None:
        """The file of `key`, now the most recently used."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size <= max_bytes:
                    if time.time() - status.st_mtime > TOUCH_SECONDS:
                        os.utime(path)
                    return file.read(max_bytes)
        except OSError:
            return None
        self.discard(key)
        return None

    def write(self, key: PrefixKey, blob: bytes) -> None:
        """Write a file beside its place and move it there. Raises OSError, and leaves nothing then."""
        path = self._path(key)
        part = path.with_name(f".{secrets.token_hex(8)}.part")
        with self._lock:
            if not self._make_room(len(blob)):
                return
            self._bytes += len(blob)
            self._until_look -= len(blob)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part.write_bytes(blob)
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise

    def discard(self, key: PrefixKey) -> None:
        """Remove a file."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: PrefixKey) -> Path:
        version, digest = key
        return self._folder / version / digest[:2] / f"{digest}.safetensors"

    def _make_room(self, nbytes: int) -> bool:
        """Remove files until `nbytes` more are within the limit; False where they never can be."""
        if nbytes > self._max_bytes:
            return False
        if self._until_look < nbytes or self._bytes + nbytes > self._max_bytes:
            files = sorted(self._files(), key=lambda file: file.used)
            self._bytes = sum(file.size for file in files)
            self._until_look = max(nbytes, self._max_bytes // LOOKS)
            if self._bytes + nbytes > self._max_bytes:
                self._remove(files, max(0, int(KEPT_SHARE * self._max_bytes) - nbytes))
        return True

    def _remove(self, files: list[_File], kept_bytes: int) -> None:
        for file in files:
            if self._bytes <= kept_bytes:
                return
            with contextlib.suppress(OSError):  # another process may have removed it
                file.path.unlink(missing_ok=True)
            self._bytes -= file.size

    def _files(self) -> Iterator[_File]:
        """What is in the folder, but for what is being written; what a dead process left unfinished is removed."""
        now = time.time()
        for root, _, names in os.walk(self._folder):
            for name in names:
                path = Path(root, name)
                with contextlib.suppress(OSError):
                    status = path.stat()
                    if name.endswith(".part") and now - status.st_mtime > STALE_SECONDS:
                        path.unlink()
                    elif name.endswith(".safetensors"):
                        yield _File(status.st_mtime, status.st_size, path)
