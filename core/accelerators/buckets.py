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
SHORTEST_PROMPT = 128
GOLDEN_TOKENS = 4  # of the answer in a generator's golden vectors; every prefill bucket has room for them

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


@dataclass(frozen=True, config=STRICT)
class GeneratorBuckets:
    """Shapes of a generator's graphs.

    prefill  one prompt, of so many positions
    decode   slots x capacity: sequences that write at one time, and positions of each, prompt and answer
    """

    prefill: Annotated[tuple[Bucket, ...], Field(min_length=1, max_length=64)]
    decode: Annotated[tuple[Bucket, ...], Field(min_length=1, max_length=64)]

    @property
    def slots(self) -> int:
        """Sequences at one time."""
        return self.decode[0].rows

    @property
    def capacity(self) -> int:
        """Positions of the longest sequence."""
        return max(bucket.length for bucket in self.decode)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all graphs, as their files are called."""
        return (*map(prefill_name, self.prefill), *map(decode_name, self.decode))


def prefill_name(bucket: Bucket) -> str:
    """The name of a prefill graph."""
    return f"prefill-{bucket}"


def decode_name(bucket: Bucket) -> str:
    """The name of a decode graph."""
    return f"decode-{bucket}"


def default_buckets(longest: int) -> tuple[Bucket, ...]:
    """One row or eight, of 64, 128, ... and `longest` positions: the longest row there can be."""
    return tuple(Bucket(rows, length) for rows in ROWS for length in _lengths(SHORTEST, longest))


def default_prefill(capacity: int) -> tuple[Bucket, ...]:
    """One prompt of 128, 256, ... and `capacity` positions."""
    return tuple(Bucket(1, length) for length in _lengths(SHORTEST_PROMPT, capacity))


def _lengths(shortest: int, longest: int) -> list[int]:
    lengths = [longest]
    while 4 * shortest <= 3 * longest:  # one just below the longest would save next to nothing
        lengths.insert(-1, shortest)
        shortest *= 2
    return lengths


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
    _check_once(buckets)


def check_generator_buckets(buckets: GeneratorBuckets, max_tokens: int) -> None:
    """Raises ConfigError unless every prompt that a slot has room for has a graph; `max_tokens`: the model's own."""
    _check_once(buckets.prefill)
    _check_once(buckets.decode)
    lengths = [bucket.length for bucket in buckets.prefill]
    if {bucket.rows for bucket in buckets.prefill} != {1}:
        raise ConfigError("prefill buckets: a prefill is of one prompt, so each must be of 1 row, such as 1x256")
    if len({bucket.rows for bucket in buckets.decode}) != 1:
        raise ConfigError("generator buckets: all must have the same number of slots")
    if max(lengths) != buckets.capacity:
        raise ConfigError(f"prefill buckets: the longest must be of {buckets.capacity} positions, as the slots are")
    if min(lengths) < 4 * GOLDEN_TOKENS:
        raise ConfigError(f"prefill buckets: the shortest must be of {4 * GOLDEN_TOKENS} positions or more")
    if buckets.capacity > max_tokens:
        raise ConfigError(f"generator buckets: the model has {max_tokens} positions, and not {buckets.capacity}")


def _check_once(buckets: Sequence[Bucket]) -> None:
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

    Longest first, so that rows of like length share a pass; of all such plans, one with the fewest positions and, of
    those, the fewest passes. Raises ValueError for a row that no bucket holds.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    total = len(order)
    plans: dict[int, tuple[int, int, Bucket | None]] = {total: (0, 0, None)}  # by first row: positions, passes, bucket
    for first in reversed(range(total)):
        fitting = [bucket for bucket in buckets if bucket.length >= lengths[order[first]]]
        if not fitting:
            raise ValueError(f"no bucket holds a row of {lengths[order[first]]} positions")
        rest = {bucket: plans[min(first + bucket.rows, total)] for bucket in fitting}
        best = min(fitting, key=lambda bucket: (bucket.positions + rest[bucket][0], rest[bucket][1]))
        plans[first] = (best.positions + rest[best][0], rest[best][1] + 1, best)
    passes, first = [], 0
    while (bucket := plans[first][2]) is not None:
        passes.append((bucket, order[first : first + bucket.rows]))
        first = min(first + bucket.rows, total)
    return passes
