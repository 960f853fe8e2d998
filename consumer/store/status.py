"""What the database says of the service as a whole, for ``status`` and health checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store import consumers, lanes
from consumer.store.rows import LINK_FAILED, JobState, LaneRow, StepState
from consumer.store.tables import jobs, outbox, steps

#: A consumer that wrote no sign of life for this long counts as gone.
ALIVE_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that ended without reaching all it should."""

    session: str
    finished_at: datetime | None
    destination: str
    error_code: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Status:
    """A snapshot of the database's view; counts are of rows."""

    now: datetime
    jobs: Mapping[str, int]
    steps: Mapping[str, Mapping[str, int]]
    lanes: Mapping[str, LaneRow]
    oldest_due: Mapping[str, datetime]
    waiting_records: int
    unsent: int
    oldest_unsent: datetime | None
    unrouted: int
    consumers: tuple[tuple[str, datetime, bool], ...]
    failed: tuple[Failed, ...]


async def load(connection: AsyncConnection, now: datetime) -> Status:
    """Read the state of everything in one transaction."""
    by_state = await connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state))
    by_step = await connection.execute(
        select(steps.c.destination, steps.c.state, func.count()).group_by(steps.c.destination, steps.c.state)
    )
    step_counts: dict[str, dict[str, int]] = {}
    for destination, state, count in by_step:
        step_counts.setdefault(destination, {})[state] = count
    waiting = select(func.count()).where(jobs.c.snapshot_due_at.is_not(None), jobs.c.state == JobState.OPEN)
    unsent = (
        await connection.execute(
            select(func.count(), func.min(outbox.c.created_at)).where(outbox.c.sent_at.is_(None))
        )
    ).one()
    unrouted = await connection.execute(select(func.count()).where(outbox.c.unrouted))
    return Status(
        now=now,
        jobs={row[0]: row[1] for row in by_state},
        steps=step_counts,
        lanes=await lanes.load(connection),
        oldest_due=await _oldest_due(connection),
        waiting_records=(await connection.execute(waiting)).scalar_one(),
        unsent=unsent[0],
        oldest_unsent=unsent[1],
        unrouted=unrouted.scalar_one(),
        consumers=tuple(await consumers.alive(connection, now - timedelta(seconds=ALIVE_SECONDS))),
        failed=await _last_failed(connection),
    )


async def _oldest_due(connection: AsyncConnection) -> dict[str, datetime]:
    query = (
        select(steps.c.destination, func.min(steps.c.due_since))
        .where(steps.c.state.in_((StepState.DUE, StepState.UNSETTLED)))
        .group_by(steps.c.destination)
    )
    return {row[0]: row[1] for row in await connection.execute(query) if row[1] is not None}


async def _last_failed(connection: AsyncConnection, limit: int = 10) -> tuple[Failed, ...]:
    query = (
        select(jobs.c.session, jobs.c.finished_at, steps.c.destination, steps.c.error_code, steps.c.reason)
        .join(steps, steps.c.job_id == jobs.c.id)
        .where(or_(jobs.c.state == JobState.FAILED, steps.c.error_code == LINK_FAILED))
        .where(or_(steps.c.state.in_((StepState.FAILED, StepState.UNCERTAIN)), steps.c.error_code == LINK_FAILED))
        .order_by(jobs.c.finished_at.desc())
        .limit(limit)
    )
    return tuple(Failed(*row) for row in await connection.execute(query))
