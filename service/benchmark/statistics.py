"""Medians, spreads, ratios and slopes of measurements. Pure arithmetic; knows nothing of what was measured."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of repeated measurements, and the least and the greatest of them."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    return Spread(statistics.median(values), min(values), max(values))


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Of values that were measured in the same repeats: a drift of the machine is in both, and cancels.

    Ratios are taken within each repeat, and their median is the figure; not the ratio of two medians.
    """
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


@dataclass(frozen=True, slots=True)
class Percentiles:
    """How waiting times are told."""

    p50: float
    p95: float
    p99: float


def percentiles(values: Sequence[float]) -> Percentiles:
    """Of one value or more, with the places between two values interpolated."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return Percentiles(at(0.50), at(0.95), at(0.99))


@dataclass(frozen=True, slots=True)
class Slope:
    """How a cost y grows with a size x.

    per_unit, fixed  least squares of y = fixed + per_unit * x
    exponent         that of y ~ x**exponent over the larger half of the sizes, where fixed costs matter least: 1 is
                     linear, 2 is quadratic. None where there is too little to fit
    """

    per_unit: float
    fixed: float
    exponent: float | None


def fit_slope(sizes: Sequence[float], costs: Sequence[float]) -> Slope:
    """Raises ValueError unless there are at least two sizes, all different."""
    if len(sizes) < 2 or len(set(sizes)) != len(sizes) or len(sizes) != len(costs):
        raise ValueError("a slope needs two sizes or more, all different, and a cost for each")
    line = statistics.linear_regression(sizes, costs)
    pairs = sorted(zip(sizes, costs, strict=True))
    upper = [(math.log(x), math.log(y)) for x, y in pairs[(len(pairs) - 1) // 2 :] if x > 0 and y > 0]
    exponent = statistics.linear_regression(*zip(*upper, strict=True)).slope if len(upper) > 1 else None
    return Slope(line.slope, line.intercept, exponent)
