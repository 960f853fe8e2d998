"""Lines 8 and 9: a token that ran out costs no record, and a first choice that hangs gives way in time."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.bulkhead.figures import Line
from benchmarks.bulkhead.world import World, WorldError
from benchmarks.messages import EXPORT_FAILED, EXPORTED
from consumer.pipeline.decide import PATIENCE_SECONDS

REVOKED, OTHERS = "alpha", ("beta", "gamma")
RECORDS = 200
PER_SECOND = 25.0
REVOKED_SECONDS = 6.0
MENDED_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Revoked:
    """What became of the records."""

    exported: int
    failed: int
    dead_letters: int
    refused: int


async def measure_token(world: World) -> Revoked:
    """Revoke the token of one destination in mid-run, and restore it."""
    async with world:
        await world.start()
        stream = asyncio.create_task(world.publish(RECORDS, per_second=PER_SECOND))
        await world.until_copied((REVOKED,), RECORDS // 10, MENDED_SECONDS)
        await world.behave(REVOKED, "unauthorised")
        await stream
        await world.until_copied(OTHERS, RECORDS, MENDED_SECONDS)
        await asyncio.sleep(REVOKED_SECONDS)
        await world.behave(REVOKED)
        await world.until_copied((REVOKED,), RECORDS, MENDED_SECONDS)

        async def answered() -> bool:
            return world.outcomes.total() >= RECORDS

        await world.until(answered, MENDED_SECONDS, "the outcomes")
        refused = sum(request.status == 401 for request in await world.ledger(REVOKED))  # noqa: PLR2004 - the status
        return Revoked(world.outcomes[EXPORTED], world.outcomes[EXPORT_FAILED], await world.dead_letters(), refused)


async def token_line(new_world: Callable[..., World], rounds: int) -> Line:
    """Line 8."""
    runs = [await measure_token(new_world((REVOKED, *OTHERS))) for _ in range(rounds)]
    exported, failed = sum(run.exported for run in runs), sum(run.failed for run in runs)
    letters, refused = sum(run.dead_letters for run in runs), sum(run.refused for run in runs)
    figures = (
        f"{exported} of {rounds * RECORDS} exported, {failed} failed, {letters} dead letters, "
        f"{refused} requests refused"
    )
    held = exported == rounds * RECORDS and failed == 0 and letters == 0
    return Line(8, "a token is revoked and restored", figures, held)


# --- first success ---------------------------------------------------------------------------------------------

FIRST, SECOND = "alpha", "beta"
TIMEOUT_SECONDS = 3.0
SETTLE_SECONDS = 2.0
#: Housekeeping looks once a second, and a machine may be busy.
SLACK_SECONDS = 5.0
MANY = 20
FIRST_SUCCESS = {
    "NX_EXPORT_STRATEGY": "first_success",
    "NX_ALPHA_PRIORITY": "90",
    "NX_BETA_PRIORITY": "10",
    "NX_ALPHA_TIMEOUT_SECONDS": f"{TIMEOUT_SECONDS:g}",
    "NX_ALPHA_SETTLE_SECONDS": f"{SETTLE_SECONDS:g}",
    "NX_ALPHA_MAX_ATTEMPTS": "1000",
    "NX_RETRY_MAX_SECONDS": "30",
}
#: The first choice hangs where nothing can have been made yet, and gives up by itself.
BEFORE = {**FIRST_SUCCESS, "NX_ALPHA_LOOKS": "1", "NX_ALPHA_READ_SECONDS": "1"}
LONGEST_SECONDS = PATIENCE_SECONDS + TIMEOUT_SECONDS + SLACK_SECONDS
#: A delay that is longer is not waited for.
GIVE_UP_SECONDS = LONGEST_SECONDS + 30


async def _delay(world: World, count: int, methods: list[str]) -> float:
    """Return the longest time from an event to the request at the second choice while the first one hangs."""
    async with world:
        await world.behave(FIRST, "hang", methods=methods)
        await world.start()
        published = await world.publish(count)
        try:
            await world.until_copied((SECOND,), count, GIVE_UP_SECONDS)
        except WorldError:
            return math.inf
        return max(request.began - published[request.session] for request in await world.ledger(SECOND))


async def first_success_line(new_world: Callable[..., World]) -> Line:
    """Line 9: the three cases run beside each other, since they mostly wait."""
    one, many, create = await asyncio.gather(
        _delay(new_world((FIRST, SECOND), **BEFORE), 1, ["GET", "POST"]),
        _delay(new_world((FIRST, SECOND), **BEFORE), MANY, ["GET", "POST"]),
        _delay(new_world((FIRST, SECOND), **FIRST_SUCCESS), 1, ["POST"]),
    )
    figures = (
        f"one record waits {one:.1f} s, the slowest of {MANY} {many:.1f} s (breaker), "
        f"one whose create hangs {create:.1f} s; patience {PATIENCE_SECONDS} s"
    )
    held = max(one, many, create) <= LONGEST_SECONDS
    return Line(9, "a first choice that hangs gives way", figures, held)
