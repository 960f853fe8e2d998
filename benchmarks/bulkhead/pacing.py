"""Lines 6 and 7: a pace is kept by all processes together, and holds up nobody else."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.bulkhead.figures import Line, Met
from benchmarks.bulkhead.world import World
from tools.servers.postgresql import PostgresServer

PACED = "paced"
INTERVAL_SECONDS = 1.0
LEAST_SPACING_SECONDS, LEAST_UTILISATION = 1.00, 0.90
LOOKS = 2
ANSWER_SECONDS = 0.1


async def measure_pace(world: World, seconds: float) -> tuple[float, float]:
    """Let two services work off more than they can; returns the smallest spacing and the utilisation."""
    async with world:
        await world.behave(PACED, seconds=ANSWER_SECONDS)
        for _ in range(2):
            await world.start()
        await world.publish(int(seconds) + 10)
        await world.until_copied((PACED,), 1, 60)
        await asyncio.sleep(seconds)
        ledger = await world.ledger(PACED)
    times = [request.began for request in ledger]
    spacing = min(later - earlier for earlier, later in itertools.pairwise(times))
    return spacing, INTERVAL_SECONDS * (len(times) - 1) / (times[-1] - times[0])


async def pace_line(new_world: Callable[..., World], postgres: PostgresServer, rounds: int, seconds: float) -> Line:
    """Line 6."""
    spacings, utilisations = [], []
    for number in range(rounds):
        url = postgres.create_database(f"pace{number}")
        spacing, used = await measure_pace(new_world((PACED,), database_url=url, NX_PACED_LOOKS=str(LOOKS)), seconds)
        print(f"   smallest spacing {spacing:.3f} s, utilisation {used:.2f}", flush=True)
        spacings.append(spacing)
        utilisations.append(used)
    smallest, utilisation = min(spacings), statistics.median(utilisations)
    figures = f"smallest spacing {smallest:.3f} s, utilisation {utilisation:.2f}"
    held = smallest >= LEAST_SPACING_SECONDS and utilisation >= LEAST_UTILISATION
    return Line(6, "two services keep one pace", figures, held)


# --- many records beside a slow destination --------------------------------------------------------------------

OTHERS = ("beta", "gamma")
RECORDS = 5_000
PATIENCE_SECONDS = 400.0
LEAST_SPEED, MOST_GROWTH = 0.9, 0.10
#: Memory counts from here on: this share of the records is exported by then.
WARM_SHARE = 0.2
QUICK_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Run:
    """Exports a second at the two others, and by how much memory grew after the warm-up."""

    per_second: float
    growth: float
    mb: float


async def measure_many(world: World, records: int) -> Run:
    """Publish all records at once; ends when the two others have them."""
    samples: list[tuple[float, float]] = []
    async with world:
        for name in (PACED, *OTHERS):
            await world.behave(name, seconds=QUICK_SECONDS)
        await world.start()
        began = time.monotonic()
        sampling = asyncio.create_task(world.sample_memory(samples))
        await world.publish(records)
        await world.until_copied(OTHERS, records, PATIENCE_SECONDS)
        sampling.cancel()
        ledgers = [await world.ledger(name) for name in OTHERS]
    return _run(began, samples, ledgers, records)


def _run(began: float, samples: Sequence[tuple[float, float]], ledgers: Sequence[Sequence[Met]], records: int) -> Run:
    times = sorted(request.began for ledger in ledgers for request in ledger)
    warm_at = times[int(len(times) * WARM_SHARE)]
    warm = [mb for at, mb in samples if at >= warm_at]
    first = statistics.median(warm[:5])
    return Run(len(OTHERS) * records / (times[-1] - began), max(warm) / first - 1, first)


async def many_line(new_world: Callable[..., World], rounds: int, records: int) -> Line:
    """Line 7."""
    alone: list[Run] = []
    beside: list[Run] = []
    for _ in range(rounds):
        for runs, destinations in ((alone, OTHERS), (beside, (PACED, *OTHERS))):
            run = await measure_many(new_world(destinations), records)
            runs.append(run)
            print(f"   {len(destinations)}: {run.per_second:.0f}/s, memory {run.growth:+.1%} of {run.mb:.0f} MB",
                  flush=True)  # fmt: skip
    speed = statistics.median(run.per_second for run in alone)
    ratio = statistics.median(run.per_second for run in beside) / speed
    growth = statistics.median(run.growth for run in beside)
    figures = (
        f"{records} records, the others at {ratio:.2f} of {speed:.0f}/s without it, memory {growth:+.1%} "
        f"of {statistics.median(run.mb for run in beside):.0f} MB"
    )
    what = "one request a second holds up nobody"
    return Line(7, what, figures, ratio >= LEAST_SPEED and abs(growth) <= MOST_GROWTH)
