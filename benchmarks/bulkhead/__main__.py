"""Nine promises about destinations that are in trouble, each measured at a real service.

Real RabbitMQ, real PostgreSQL, and a repository server in a process of its own, whose ledger is what counts. What
is compared runs in interleaved rounds, so that a busy machine is busy for both.
"""

import argparse
import asyncio
import functools
import logging
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.bulkhead import crowd, endings, faults, pacing
from benchmarks.bulkhead.figures import Line
from benchmarks.bulkhead.world import World, WorldError
from tools.servers.postgresql import PostgresServer
from tools.servers.rabbitmq import RabbitServer

ALL = tuple(range(1, 10))


def main() -> int:
    """Measure, print a line for each promise and the last line; 1 unless all were measured and held."""
    options = _options()
    logging.disable(logging.CRITICAL)  # libraries tell of connections that end with a virtual host
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nexus-bulkhead-") as name:
        folder = Path(name)
        with RabbitServer(folder / "rabbitmq", management=True) as rabbit:
            lines = asyncio.run(_measure(options, rabbit, folder))
    for line in lines:
        print(line)
    print(f"{time.monotonic() - began:.0f} s")
    held = sum(line.held for line in lines)
    print(f"bulkhead: {held} of {len(ALL)} held")
    return 0 if held == len(ALL) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulkhead", description=__doc__)
    parser.add_argument("--only", type=_numbers, default=list(ALL), help="lines, as in 1,4")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a measurement after its warm-up")
    parser.add_argument("--records", type=int, default=pacing.RECORDS, help="records of line 7")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds < 1 or options.records < 1:
        parser.error("--rounds, --seconds and --records: at least 1")
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if not set(numbers) <= set(ALL):
        raise argparse.ArgumentTypeError(f"there are lines 1 to {ALL[-1]}")
    return numbers


async def _measure(options: argparse.Namespace, rabbit: RabbitServer, folder: Path) -> list[Line]:
    """Measure the wanted lines one after the other; the last one waits most of the time, and does so beside them."""
    new_world = functools.partial(World, rabbit, folder)
    rounds, seconds = options.rounds, options.seconds
    waiting = None
    if 9 in options.only:  # noqa: PLR2004 - the number of the line
        waiting = asyncio.create_task(_tried([9], lambda: _one(endings.first_success_line(new_world))))
    found: list[Line] = []
    together = [number for number in faults.FAULTS if number in options.only]
    if together:
        found += await _tried(together, lambda: faults.lines(together, new_world, rounds, seconds))

    async def pace() -> Line:
        with PostgresServer(folder / "postgresql") as postgres:
            return await pacing.pace_line(new_world, postgres, rounds, seconds)

    singles: dict[int, Callable[[], Awaitable[Line]]] = {
        4: lambda: crowd.capacity_line(new_world, rounds, seconds),
        5: lambda: crowd.retry_after_line(new_world, rounds),
        6: pace,
        7: lambda: pacing.many_line(new_world, rounds, options.records),
        8: lambda: endings.token_line(new_world, rounds),
    }
    for number, measure in singles.items():
        if number in options.only:
            found += await _tried([number], functools.partial(_of, measure))
    return found + (await waiting if waiting else [])


async def _of(measure: Callable[[], Awaitable[Line]]) -> list[Line]:
    return [await measure()]


async def _one(work: Awaitable[Line]) -> list[Line]:
    return [await work]


async def _tried(numbers: list[int], measure: Callable[[], Awaitable[list[Line]]]) -> list[Line]:
    """Measure; what could not be measured did not hold."""
    print(f"measuring {', '.join(map(str, numbers))}", flush=True)
    try:
        return await measure()
    except WorldError as error:
        return [Line(number, "not measured", str(error), held=False) for number in numbers]


if __name__ == "__main__":
    sys.exit(main())
