"""Lines 1 to 3: one destination hangs, answers 503 or drips, and the others do not notice.

One service lives through all rounds, since its caches have to be full before memory says anything. In each round
there is one phase without a fault and one with each, in an order that changes.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.bulkhead.figures import Line, growth_per_minute, percentile
from benchmarks.bulkhead.world import World

FAULTS = {1: "hang", 2: "unavailable", 3: "drip"}
WHAT = {
    1: "one destination hangs, the others",
    2: "one destination answers 503, the others",
    3: "one destination drips, the others",
}
WELL = "well"
BROKEN, OTHERS = "alpha", ("beta", "gamma")
SETTINGS = {"NX_ALPHA_TIMEOUT_SECONDS": "3", "NX_ALPHA_SETTLE_SECONDS": "5"}
ANSWER_SECONDS = 0.02
#: Far below what a slow machine bears: the 99th percentile is to tell of the fault and not of a queue.
PER_SECOND = 10.0
#: More records than the service's caches hold events.
WARM_UP = 3_000
#: After it a phase that does not count: a large backlog leaves memory to be sorted out.
SETTLING_SECONDS = 10.0
BURST = 400
PATIENCE_SECONDS = 300.0
#: After a fault: so much of the backlog is done before the next phase; look-ups of the last few come late.
RECOVERED_SHARE = 0.98

LEAST_THROUGHPUT = 0.9
MOST_P99, MOST_P99_SECONDS = 1.3, 0.020
MOST_GROWTH = 1.0


@dataclass(frozen=True, slots=True)
class Phase:
    """What the two others did: exports a second in a burst, seconds from event to request, MB a minute."""

    throughput: float
    p99_seconds: float
    growth: float

    def __str__(self) -> str:
        return f"{self.throughput:.0f}/s, p99 {self.p99_seconds * 1000:.0f} ms, {self.growth:+.1f} MB/min"


class Stage:
    """One service with three destinations, warmed up; phases follow each other."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._published = 0

    async def warm_up(self, records: int) -> None:
        """Start the service and fill its caches."""
        for name in (BROKEN, *OTHERS):
            await self._world.behave(name, seconds=ANSWER_SECONDS)
        await self._world.start()
        await self._publish(records)
        await self._world.until_copied((BROKEN, *OTHERS), self._published, PATIENCE_SECONDS)
        await self.phase(WELL, SETTLING_SECONDS)

    async def phase(self, fault: str, seconds: float) -> Phase:
        """Break one destination, measure a steady stream and a burst at the others, mend it."""
        await self._world.behave(BROKEN, fault, seconds=ANSWER_SECONDS)
        samples: list[tuple[float, float]] = []
        sampling = asyncio.create_task(self._world.sample_memory(samples))
        steady = await self._publish(int(seconds * PER_SECOND), per_second=PER_SECOND)
        sampling.cancel()
        await self._world.until_copied(OTHERS, self._published, PATIENCE_SECONDS)
        began = time.monotonic()
        await self._publish(BURST)
        await self._world.until_copied(OTHERS, self._published, PATIENCE_SECONDS)
        ledgers = [await self._world.ledger(name) for name in OTHERS]
        await self._world.behave(BROKEN, seconds=ANSWER_SECONDS)
        await self._world.until_copied((BROKEN,), int(RECOVERED_SHARE * self._published), PATIENCE_SECONDS)
        ended = max(request.began for ledger in ledgers for request in ledger)
        waits = [r.began - steady[r.session] for ledger in ledgers for r in ledger if r.session in steady]
        return Phase(len(OTHERS) * BURST / (ended - began), percentile(waits, 0.99), growth_per_minute(samples))

    async def _publish(self, count: int, *, per_second: float = 0.0) -> dict[str, float]:
        self._published += count
        return await self._world.publish(count, per_second=per_second)


async def lines(
    numbers: Sequence[int], new_world: Callable[..., World], rounds: int, seconds: float, warm_up: int = WARM_UP
) -> list[Line]:
    """Go through all rounds, and judge the medians."""
    order = [WELL, *(FAULTS[number] for number in numbers)]
    seen: dict[str, list[Phase]] = {kind: [] for kind in order}
    async with new_world((BROKEN, *OTHERS), **SETTINGS) as world:
        stage = Stage(world)
        await stage.warm_up(warm_up)
        for number in range(rounds):
            for kind in order[number % len(order) :] + order[: number % len(order)]:
                found = await stage.phase(kind, seconds)
                seen[kind].append(found)
                print(f"   {kind}: {found}", flush=True)
    medians = {kind: _median(phases) for kind, phases in seen.items()}
    return [_judged(number, medians[WELL], medians[FAULTS[number]]) for number in numbers]


def _judged(number: int, well: Phase, broken: Phase) -> Line:
    ratio = broken.throughput / well.throughput
    allowed = max(MOST_P99 * well.p99_seconds, well.p99_seconds + MOST_P99_SECONDS)
    figures = (
        f"throughput {ratio:.2f} of {well.throughput:.0f}/s without it, p99 {broken.p99_seconds * 1000:.0f} ms "
        f"(without {well.p99_seconds * 1000:.0f}), memory {broken.growth:+.1f} MB/min (without {well.growth:+.1f})"
    )
    held = ratio >= LEAST_THROUGHPUT and broken.p99_seconds <= allowed and broken.growth <= MOST_GROWTH
    return Line(number, WHAT[number], figures, held)


def _median(phases: Sequence[Phase]) -> Phase:
    return Phase(
        statistics.median(phase.throughput for phase in phases),
        statistics.median(phase.p99_seconds for phase in phases),
        statistics.median(phase.growth for phase in phases),
    )
