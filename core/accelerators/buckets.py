"""Static shapes: which (rows, positions) there are, and which one a group of rows goes into. Knows no tensors."""

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from core.config import STRICT
from core.errors import ConfigError

ROWS = (1, 8)
SHORTEST = 64

Extent = Annotated[int, Field(ge=1, le=1 << 16)]


@dataclass(frozen=True, config=STRICT)
class Bucket:
    """A shape that a graph is compiled for: so many rows of so many positions, padding included."""

    rows: Extent
    length: Extent

    @property
    def positions(self) -> int:
        """What a pass costs, full or not."""
        return self.rows * self.length

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}"


def default_buckets(longest: int) -> tuple[Bucket, ...]:
    """One row or eight, of 64, 128, ... and `longest` positions: the longest row there can be."""
    lengths = [longest]
    power = SHORTEST
    while 4 * power <= 3 * longest:  # one just below the longest would save next to nothing
        lengths.insert(-1, power)
        power *= 2
    return tuple(Bucket(rows, length) for rows in ROWS for length in lengths)


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """`1x128,8x256` as buckets of rows x positions. Raises ConfigError."""
    buckets = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", part)
        if not match or not int(match[1]) or not int(match[2]):
            raise ConfigError(f"buckets: {part.strip()!r} is not of the form ROWSxPOSITIONS, such as 8x256")
        buckets.append(Bucket(int(match[1]), int(match[2])))
    return tuple(buckets)


def check_buckets(buckets: Sequence[Bucket], longest: int) -> None:
    """Raises ConfigError unless there is room for the longest row, and no shape twice."""
    top = max((bucket.length for bucket in buckets), default=0)
    if top < longest:
        raise ConfigError(f"buckets: the longest row has {longest} positions, and the longest bucket {top}")
    if len(set(buckets)) != len(buckets):
        raise ConfigError("buckets: one is named twice")


def choose_bucket(buckets: Sequence[Bucket], rows: int, length: int) -> Bucket:
    """The cheapest bucket that holds `rows` rows of up to `length` positions. Raises ValueError where none does."""
    fitting = [bucket for bucket in buckets if bucket.rows >= rows and bucket.length >= length]
    if not fitting:
        raise ValueError(f"no bucket holds {rows} rows of {length} positions")
    return min(fitting, key=lambda bucket: (bucket.positions, bucket.length))


def plan_passes(buckets: Sequence[Bucket], lengths: Sequence[int]) -> list[tuple[Bucket, list[int]]]:
    """Passes that take every row once: a bucket, and the indices of its rows in `lengths`.

    Longest first, so that rows of like length share a pass. Raises ValueError for a row that no bucket holds.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    passes = []
    while order:
        length = lengths[order[0]]
        most = max((bucket.rows for bucket in buckets if bucket.length >= length), default=1)
        group, order = order[:most], order[most:]
        passes.append((choose_bucket(buckets, len(group), length), group))
    return passes
