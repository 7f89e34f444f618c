"""Blobs in a Redis server, which many machines may share. Needs the extra `redis`; knows no tensors.

Redis bounds its own memory: give it `maxmemory` and `maxmemory-policy allkeys-lru`. Entries also end by themselves, so
that those of versions nobody serves any more do not stay.
"""

import logging
import time

from core.document_cache import PrefixKey
from core.errors import ConfigError

log = logging.getLogger(__name__)
PREFIX = "scaledown:document"
DAYS_KEPT = 7
TIMEOUT_SECONDS = 0.5
PAUSE_SECONDS = 5.0  # a server that fails is left alone for so long


class RedisStore:
    """A `BlobStore`. A server that is away costs one time-out, then nothing for a while."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that is none, and where the extra `redis` is not installed."""
        try:
            import redis
        except ImportError:
            raise ConfigError("document_cache_redis: needs the extra `redis`: pip install '.[redis]'") from None
        self._error = redis.RedisError
        try:
            self._client = redis.Redis.from_url(
                url, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS
            )
        except ValueError as error:
            raise ConfigError(f"document_cache_redis: {error}") from None
        self._away_until = 0.0

    def read(self, key: PrefixKey, max_bytes: int) -> bytes | None:
        """The value of `key`; never more than `max_bytes` of it are transferred."""
        if time.monotonic() < self._away_until:
            return None
        try:
            blob = self._client.getrange(_name(key), 0, max_bytes)  # both ends included: one byte too many shows
        except self._error as error:
            self._pause(error)
            return None
        if not isinstance(blob, bytes) or len(blob) > max_bytes:
            self.discard(key)
            return None
        return blob or None

    def write(self, key: PrefixKey, blob: bytes) -> None:
        """Keep a value for some days."""
        if time.monotonic() >= self._away_until:
            try:
                self._client.set(_name(key), blob, ex=DAYS_KEPT * 86_400)
            except self._error as error:
                self._pause(error)

    def discard(self, key: PrefixKey) -> None:
        """Remove a value."""
        if time.monotonic() >= self._away_until:
            try:
                self._client.delete(_name(key))
            except self._error as error:
                self._pause(error)

    def _pause(self, error: Exception) -> None:
        # Not the message: it can hold the address.
        log.warning("Redis does not answer: chunks are not shared for now", extra={"error": type(error).__name__})
        self._away_until = time.monotonic() + PAUSE_SECONDS


def _name(key: PrefixKey) -> str:
    return ":".join((PREFIX, *key))
