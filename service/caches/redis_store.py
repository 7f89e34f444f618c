"""Blobs in a Redis server, which many machines may share. Needs the extra `redis`; knows no tensors.

Redis bounds its own memory: give it `maxmemory` and `maxmemory-policy allkeys-lru`. Entries also end by themselves, so
that those of versions nobody serves any more do not stay.
"""

from core.document_cache import PrefixKey
from core.errors import ConfigError

PREFIX = "scaledown:document"
DAYS_KEPT = 7
TIMEOUT_SECONDS = 0.5


class RedisStore:
    """A `BlobStore`. Its methods raise redis.RedisError."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that is none, and where the extra `redis` is not installed."""
        try:
            import redis
        except ImportError:
            raise ConfigError("document_cache_redis: needs the extra `redis`: pip install '.[redis]'") from None
        try:
            self._client = redis.Redis.from_url(
                url, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS
            )
        except ValueError as error:
            raise ConfigError(f"document_cache_redis: {error}") from None

    def read(self, key: PrefixKey, max_bytes: int) -> bytes | None:
        """The value of `key`; never more than `max_bytes` of it are transferred."""
        blob = self._client.getrange(_name(key), 0, max_bytes)  # both ends included: one byte too many shows
        if not isinstance(blob, bytes) or len(blob) > max_bytes:
            self.discard(key)
            return None
        return blob or None

    def write(self, key: PrefixKey, blob: bytes) -> None:
        """Keep a value for some days."""
        self._client.set(_name(key), blob, ex=DAYS_KEPT * 86_400)

    def discard(self, key: PrefixKey) -> None:
        """Remove a value."""
        self._client.delete(_name(key))


def _name(key: PrefixKey) -> str:
    return ":".join((PREFIX, *key))
