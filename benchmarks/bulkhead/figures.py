"""Figures of what was measured, and the line that tells whether a promise held."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """One promise: what was measured, and whether it held."""

    number: int
    what: str
    figures: str
    held: bool

    def __str__(self) -> str:
        return f"{self.number}. {self.what}: {self.figures}: {'held' if self.held else 'broken'}"


@dataclass(frozen=True, slots=True)
class Met:
    """A request as the server met it; times in seconds of the machine's monotonic clock."""

    began: float
    ended: float | None
    method: str
    session: str
    status: int


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that such a share of all does not exceed; infinite when there is none."""
    if not values:
        return math.inf
    ordered = sorted(values)
    return ordered[min(len(ordered), math.ceil(share * len(ordered))) - 1]


def mean_in_flight(requests: Sequence[Met], start: float, end: float) -> float:
    """Return how many requests the server held at once, on average over the time between."""
    held = (min(end, r.ended or end) - max(start, r.began) for r in requests)
    return sum(seconds for seconds in held if seconds > 0) / (end - start)


def growth_per_minute(samples: Sequence[tuple[float, float]]) -> float:
    """Return the growth of (time, MB) samples in MB a minute, between the medians of the first and the last third."""
    third = len(samples) // 3
    if third == 0:
        return math.inf
    first, last = samples[:third], samples[-third:]
    grown = statistics.median(mb for _, mb in last) - statistics.median(mb for _, mb in first)
    seconds = statistics.median(at for at, _ in last) - statistics.median(at for at, _ in first)
    return grown / seconds * 60
