"""How much memory something takes while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from core.costs import current_memory, peak_memory, reset_peak_memory

CPU = torch.device("cpu")
RESET = 16 * 2**20  # bytes between a new peak and what there is; more: this system starts no new one


@contextmanager
def little_memory(most: int = 256 * 2**20) -> Iterator[None]:
    """Fails where the block takes over `most` bytes at any moment, on systems that can tell."""
    reset_peak_memory(CPU)
    before = current_memory(CPU)
    can_tell = before > 0 and peak_memory(CPU) - before < RESET
    yield
    taken = peak_memory(CPU) - before
    assert not can_tell or taken < most, f"took {taken / 2**20:.0f} MiB"
