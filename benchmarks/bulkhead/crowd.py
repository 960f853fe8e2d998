"""Lines 4 and 5: back-pressure. A hidden limit is found and kept, and ``Retry-After`` is obeyed to the letter."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from benchmarks.bulkhead.figures import Line, Met, mean_in_flight
from benchmarks.bulkhead.world import World, WorldError

CONCURRENCY = 200
LEARNING_SECONDS = 30.0
#: A little more than can be served, so that the queue is never empty and the machine has time for the rest.
SURPLUS = 1.15
LOWEST_SHARE, MOST_REFUSED = 0.85, 0.02


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a server bears without saying so: requests at once, each answered after so many seconds."""

    capacity: int
    answer_seconds: float

    @property
    def per_second(self) -> float:
        """Return how many requests it can answer."""
        return self.capacity / self.answer_seconds


HIDDEN = {"alpha": Hidden(2, 0.5), "beta": Hidden(16, 2.0), "gamma": Hidden(64, 3.0), "delta": Hidden(128, 4.0)}
SETTINGS = {f"NX_{name.upper()}_CONCURRENCY": str(CONCURRENCY) for name in HIDDEN}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the server saw after the learning: mean requests in flight, and the share that it refused."""

    in_flight: float
    refused: float


async def measure_capacity(world: World, seconds: float) -> dict[str, Seen]:
    """Let all four destinations work at their limits, beside each other."""
    total = LEARNING_SECONDS + seconds
    async with world:
        for name, hidden in HIDDEN.items():
            await world.behave(name, seconds=hidden.answer_seconds, capacity=hidden.capacity)
        await world.start()
        began = time.monotonic()
        for name, hidden in HIDDEN.items():
            await world.publish(2 * hidden.capacity + 20, destinations=[name])
        async with asyncio.TaskGroup() as group:
            for name, hidden in HIDDEN.items():
                rate = SURPLUS * hidden.per_second
                group.create_task(world.publish(int(total * rate), per_second=rate, destinations=[name]))
        await asyncio.sleep(began + total - time.monotonic())
        ended = time.monotonic()
        ledgers = {name: await world.ledger(name) for name in HIDDEN}
    return {name: _seen(ledger, began + LEARNING_SECONDS, ended) for name, ledger in ledgers.items()}


def _seen(ledger: Sequence[Met], start: float, end: float) -> Seen:
    asked = [request for request in ledger if start <= request.began < end]
    refused = sum(request.status == HTTPStatus.TOO_MANY_REQUESTS for request in asked)
    borne = [request for request in ledger if request.status != HTTPStatus.TOO_MANY_REQUESTS]
    return Seen(mean_in_flight(borne, start, end), refused / max(1, len(asked)))


async def capacity_line(new_world: Callable[..., World], rounds: int, seconds: float) -> Line:
    """Line 4."""
    runs = []
    for _ in range(rounds):
        run = await measure_capacity(new_world(tuple(HIDDEN), **SETTINGS), seconds)
        runs.append(run)
        parts = (f"{HIDDEN[name].capacity}: {seen.in_flight:.1f}, {seen.refused:.1%}" for name, seen in run.items())
        print("  ", "; ".join(parts), flush=True)
    held, shown = True, []
    for name, hidden in HIDDEN.items():
        in_flight = statistics.median(run[name].in_flight for run in runs)
        refused = statistics.median(run[name].refused for run in runs)
        held &= LOWEST_SHARE * hidden.capacity - 1 <= in_flight <= hidden.capacity + 1 and refused <= MOST_REFUSED
        shown.append(f"{in_flight:.1f} of {hidden.capacity} ({refused:.1%} refused)")
    return Line(4, "hidden limits are found", "in flight " + ", ".join(shown), held)


# --- Retry-After -----------------------------------------------------------------------------------------------

CLOSED = "alpha"
#: A backlog all the time, beside a neighbour: the engine claims and writes without a pause.
BACKLOG, STREAM_PER_SECOND = 300, 15.0
NEIGHBOUR = "beta"
ANSWER_SECONDS = 0.2
#: A request that left before the refusal came back may still arrive so much later.
ON_ITS_WAY_SECONDS = 0.1
SHORT_SECONDS, LONG_SECONDS = 4, 15
#: From the refusal to the kill: by then it stands in the store.
KNOWN_SECONDS = 1.0
REOPENED_SECONDS = 90.0


async def measure_retry_after(world: World) -> list[list[float]]:
    """Close one destination three times, the last time with a kill and a restart in between.

    Returns for each closing how long after the first refusal requests came that met it closed, in seconds.
    """
    closings: list[tuple[float, float]] = []
    async with world:
        await world.behave(CLOSED, seconds=ANSWER_SECONDS)
        await world.behave(NEIGHBOUR, seconds=ANSWER_SECONDS)
        service = await world.start()
        count = int(STREAM_PER_SECOND * (2 * SHORT_SECONDS + LONG_SECONDS + 10))
        await world.publish(BACKLOG)
        stream = asyncio.create_task(world.publish(count, per_second=STREAM_PER_SECOND))
        for seconds, as_date, killed in ((SHORT_SECONDS, False, False), (SHORT_SECONDS, True, False),
                                         (LONG_SECONDS, False, True)):  # fmt: skip
            details = {"seconds": ANSWER_SECONDS, "retry_after": seconds, "as_date": as_date}
            await world.behave(CLOSED, "closed", **details)
            start, end = await _closing(world, len(closings))
            closings.append((start, end))
            if killed:
                await asyncio.sleep(start + KNOWN_SECONDS - time.monotonic())
                world.kill(service)
                await world.start()
                if time.monotonic() > end - 1:
                    raise WorldError("the service needed too long to start again; nothing was proved")
            await asyncio.sleep(end + 1 - time.monotonic())
        await stream
        await world.until_copied((CLOSED,), BACKLOG + count, REOPENED_SECONDS)
        ledger = await world.ledger(CLOSED)
    return [[r.began - start for r in ledger if start < r.began < end] for start, end in closings]


async def _closing(world: World, index: int) -> tuple[float, float]:
    async def closed() -> bool:
        return len(await world.closings(CLOSED)) > index

    await world.until(closed, REOPENED_SECONDS, "a request at the closed destination")
    return (await world.closings(CLOSED))[index]


async def retry_after_line(new_world: Callable[..., World], rounds: int) -> Line:
    """Line 5."""
    met: list[float] = []
    for _ in range(rounds):
        found = await measure_retry_after(new_world((CLOSED, NEIGHBOUR)))
        print("   requests after a refusal, in ms:", [[round(1000 * s) for s in late] for late in found], flush=True)
        met += [seconds for late in found for seconds in late]
    inside = sum(seconds > ON_ITS_WAY_SECONDS for seconds in met)
    figures = (
        f"{inside} requests in {3 * rounds} closed times (seconds, a date, a kill -9 inside), "
        f"{len(met) - inside} were on their way (at most {ON_ITS_WAY_SECONDS * 1000:.0f} ms)"
    )
    return Line(5, "Retry-After is kept", figures, inside == 0)
