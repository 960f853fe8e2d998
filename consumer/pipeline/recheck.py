"""One more look, H after a success that followed an unknown outcome: late commits are reported, never hidden."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta

from consumer.destinations.contract import Absent, ExportContext, Partial, Present
from consumer.pipeline.attempt import Caller, LeaseLostError
from consumer.pipeline.ending import surplus_message
from consumer.store import rechecks
from consumer.store.connection import Database, DatabaseError
from consumer.store.rechecks import Finding
from consumer.store.rows import Claim
from consumer.telemetry import get_logger

BATCH = 20
AGAIN_SECONDS = 15.0
IDLE_SECONDS = 1.0

_log = get_logger()


class Rechecks:
    """Looks at copies that are due; ``context_of`` builds what a destination needs to know."""

    def __init__(
        self,
        database: Database,
        callers: Mapping[str, Caller],
        context_of: Callable[[Claim], Awaitable[ExportContext]],
        *,
        max_wait_seconds: float,
    ) -> None:
        self._database = database
        self._callers = callers
        self._context_of = context_of
        self._max_wait = timedelta(seconds=2 * max_wait_seconds)  # the step itself may have taken the whole wait

    async def run(self) -> None:
        """Look until cancelled; a slow destination delays only other last look-ups."""
        while True:
            try:
                found = await self.run_once()
            except DatabaseError as error:
                _log.error("recheck_database_away", reason=str(error).splitlines()[0])
                found = 0
            if not found:
                await asyncio.sleep(IDLE_SECONDS)

    async def run_once(self) -> int:
        """Look at one batch; returns how many were due."""
        async with self._database.read() as connection:
            found = await rechecks.due(connection, await self._database.now(connection), BATCH, sorted(self._callers))
        for claim in found:
            with suppress(LeaseLostError):  # a newer attempt has begun; its own last look-up follows
                await self._look(claim)
        return len(found)

    async def _look(self, claim: Claim) -> None:
        context = replace(await self._context_of(claim), purpose="recheck")
        answer = await self._callers[claim.step.destination].verify(context)
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            finding, again = _judge(claim, answer, now - self._max_wait)
            again_at = now + timedelta(seconds=AGAIN_SECONDS) if again else None
            step, fence = claim.step, claim.copy.fence
            if not await rechecks.finish(connection, step.session, step.destination, fence, again_at):
                return  # a newer attempt has begun; its own last look-up follows
            if finding is not None:
                await rechecks.report(connection, claim, finding, now)
        if finding is not None:
            _log.error(
                finding.code, session=claim.step.session, destination=claim.step.destination, reason=finding.message
            )


def _judge(claim: Claim, answer: object, since: datetime) -> tuple[Finding | None, bool]:
    """Say what is wrong, if anything, and whether the question has to be asked again.

    It is not asked again for a step that was due before ``since``: that wait has an end too.
    """
    if isinstance(answer, Present):
        return (Finding("surplus_copy", surplus_message(answer)) if answer.surplus else None), False
    if isinstance(answer, Absent):
        message = f"the copy {claim.copy.record_id} is not there any more; it was when its outcome went out"
        return Finding("copy_missing", message), False
    if isinstance(answer, Partial):
        message = f"the copy {claim.copy.record_id} does not hold what its outcome said: a late request or a person"
        return Finding("copy_differs", message), False
    if (claim.step.due_since or since) <= since:
        reason = getattr(answer, "reason", "") or str(answer)
        return Finding("recheck_failed", f"nobody could tell whether there are further copies: {reason}"), False
    return None, True
