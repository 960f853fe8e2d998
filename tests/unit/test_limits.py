"""The adaptive limit against a server with a hidden capacity, by a clock that is counted and not waited for."""

import heapq
import random
from dataclasses import dataclass, field

import pytest

from consumer.pipeline.limits import AdaptiveLimit

REFUSAL_SECONDS = 0.003


@dataclass
class Server:
    """Answers in about ``seconds``, and refuses at once what is over its capacity; ``limit`` always has work."""

    capacity: int
    seconds: float
    limit: AdaptiveLimit
    seed: int = 1
    now: float = 0.0
    inside: int = 0
    requests: int = 0
    refusals: int = 0
    _coming: list[tuple[float, int, float, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)  # noqa: S311 - has to be repeatable, not secret

    def run(self, until: float) -> float:
        """Go on until then; returns the mean of what was in flight."""
        began, area = self.now, 0.0
        while self.now < until:
            while self.limit.free:
                self._begin()
            at, _, started, refused = heapq.heappop(self._coming)
            area += (at - self.now) * self.limit.in_flight
            self.now = at
            self.inside -= not refused
            self.limit.end(at, at - started, answered=not refused, refused=refused)
        return area / (self.now - began)

    def _begin(self) -> None:
        self.limit.begin(self.now)
        self.requests += 1
        refused = self.inside >= self.capacity
        self.refusals += refused
        self.inside += not refused
        lasts = REFUSAL_SECONDS if refused else self.seconds * self._draw.uniform(0.8, 1.2)
        heapq.heappush(self._coming, (self.now + lasts, self.requests, self.now, refused))


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("capacity", [2, 3, 5, 10, 16, 33, 64, 100, 128, 199])
def test_it_finds_a_hidden_capacity(capacity: int, seconds: float) -> None:
    server = Server(capacity, seconds, AdaptiveLimit(highest=200), seed=capacity)
    server.run(30)
    assert 0.85 * capacity - 1 <= server.run(40) <= capacity + 1
    assert server.refusals <= 0.02 * server.requests


def test_it_follows_a_capacity_that_changes() -> None:
    server = Server(60, 0.1, AdaptiveLimit(highest=200))
    server.run(30)
    server.capacity = 16
    server.run(60)
    assert 0.85 * 16 - 1 <= server.run(70) <= 17
    server.capacity = 60
    server.run(110)
    assert server.run(120) > 0.85 * 60 - 1


def test_it_never_goes_over_the_limit_that_is_configured() -> None:
    server = Server(100, 0.1, AdaptiveLimit(highest=8))
    server.run(10)
    assert server.limit.limit == 8
    assert server.refusals == 0


def test_it_goes_down_when_answers_take_much_longer() -> None:
    server = Server(200, 0.1, AdaptiveLimit(highest=50))
    server.run(20)
    assert server.limit.limit == 50
    server.seconds = 1.0
    server.run(22)
    assert server.limit.limit < 50


def test_a_limit_that_is_not_reached_is_not_raised() -> None:
    limit = AdaptiveLimit(highest=50, limit=4)
    for number in range(100):
        limit.begin(number)
        limit.end(number + 0.5, 0.5, answered=True, refused=False)
    assert limit.limit == 4
