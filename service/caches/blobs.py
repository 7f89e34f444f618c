"""A chunk's prefix as bytes: safetensors with a checksum, read with suspicion. Knows no files and no network."""

import hashlib
import json
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from core.compressors.prefixes import Prefix
from core.document_cache import PrefixKey

FORMAT = 1  # another number makes everything kept before unknown
HEADER_BYTES = 2048  # at most, of a blob beside its tensors


class BlobStore(Protocol):
    """A slower, larger place for blobs, maybe other processes' too. It loses what it likes.

    A method raises whatever its place does where that cannot be had now; it is then not called for a while.
    """

    def read(self, key: PrefixKey, max_bytes: int) -> bytes | None:
        """The blob of `key`; None where there is none, or one of more than `max_bytes`."""

    def write(self, key: PrefixKey, blob: bytes) -> None:
        """Keep a blob, in the place of an older one."""

    def discard(self, key: PrefixKey) -> None:
        """Drop what is kept for `key`: it could not be read."""


def encode_prefix(key: PrefixKey, prefix: Prefix) -> bytes:
    """A prefix with its key and the sha256 of its tensors."""
    tensors = {"keys_values": prefix.keys_values}
    if prefix.hidden is not None:
        tensors["hidden"] = prefix.hidden
    return save(tensors, {"format": str(FORMAT), "key": "/".join(key), "sha256": _checksum(prefix)})


def decode_prefix(key: PrefixKey, blob: bytes, like: Prefix) -> Prefix | None:
    """The prefix in a blob; None where it is torn, altered, another key's, or not of the shapes and types of `like`.

    `like` may be on the meta device. The checksum finds accidents; whoever can write to the store can also forge it.
    """
    try:
        length = int.from_bytes(blob[:8], "little")
        if length > HEADER_BYTES:
            return None
        metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
        tensors = load(blob)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    prefix = Prefix(tensors.get("keys_values", torch.empty(0, dtype=torch.float32)), tensors.get("hidden"))
    if not isinstance(metadata, dict) or not _fits(prefix, like):
        return None
    expected = {"format": str(FORMAT), "key": "/".join(key), "sha256": _checksum(prefix)}
    return prefix if metadata == expected else None


def _fits(prefix: Prefix, like: Prefix) -> bool:
    pairs = ((prefix.keys_values, like.keys_values), (prefix.hidden, like.hidden))
    return all(
        one is other is None
        or (one is not None and other is not None and (one.shape, one.dtype) == (other.shape, other.dtype))
        for one, other in pairs
    )


def _checksum(prefix: Prefix) -> str:
    digest = hashlib.sha256()
    for tensor in (prefix.keys_values, prefix.hidden):
        if tensor is not None:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
