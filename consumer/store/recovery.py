"""What a dead process or a wait without end left behind."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import and_, case, func, insert, literal_column, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store.rows import LINK, LINK_FAILED, StepState, text_of, uuid_of
from consumer.store.tables import copies, jobs, steps, upload_log


async def release_look_ups(connection: AsyncConnection, now: datetime) -> None:
    """At the start of the only engine: a look-up that a dead one had begun is due now, not when its lease ends."""
    await connection.execute(
        update(steps)
        .where(steps.c.state == StepState.UNSETTLED, steps.c.next_attempt_at > now)
        .values(next_attempt_at=now)
    )
    await connection.execute(
        update(copies)
        .where(copies.c.lease_until.is_not(None))
        .values(owner=None, lease_until=None, fence=copies.c.fence + 1)
    )


async def abandoned_steps(connection: AsyncConnection, now: datetime, *, everything: bool) -> list[tuple[UUID, str]]:
    """Return running steps without a live lease; ``everything``: at the start of the only engine, all of them."""
    same_copy = and_(copies.c.session == steps.c.session, copies.c.destination == steps.c.destination)
    query = select(steps.c.job_id, steps.c.destination)
    query = query.where(steps.c.state == literal_column(f"'{StepState.RUNNING}'"))  # names the partial index
    if not everything:
        query = query.join(jobs, jobs.c.id == steps.c.job_id).join(copies, same_copy)
        query = query.where(or_(copies.c.lease_until.is_(None), copies.c.lease_until < now))
        # whoever writes results locks the same rows: neither may wait for the other
        query = query.with_for_update(of=[jobs, copies, steps], skip_locked=True)
    return [(uuid_of(row.job_id), row.destination) for row in await connection.execute(query)]


async def abandon(
    connection: AsyncConnection, job: UUID, destination: str, now: datetime, *, can_verify: bool, dead: bool
) -> None:
    """Turn an abandoned step into one whose outcome is unknown, and log the attempt as interrupted.

    ``dead``: the old process surely has ended, so its last request left at the latest now; otherwise it may
    send until its lease ends, which the claim has noted.
    """
    row = (
        await connection.execute(
            select(steps, jobs.c.event_id, jobs.c.source)
            .join(jobs, jobs.c.id == steps.c.job_id)
            .where(steps.c.job_id == text_of(job), steps.c.destination == destination)
        )
    ).one()
    state = StepState.UNSETTLED if can_verify else StepState.UNCERTAIN
    values: dict[str, Any] = {"state": state, "next_attempt_at": now, "error_code": "interrupted",
                              "attempts": steps.c.attempts + 1,
                              "reason": "the process ended during the attempt"}  # fmt: skip
    if row.purpose == LINK and not can_verify:
        values |= {"state": StepState.DONE, "next_attempt_at": None, "error_code": LINK_FAILED}
    if dead:
        values["last_request_at"] = now
    where = and_(steps.c.job_id == text_of(job), steps.c.destination == destination)
    await connection.execute(update(steps).where(where).values(**values))
    # the fence rises, so that a process that only slept cannot write its result any more
    await connection.execute(
        update(copies)
        .where(copies.c.session == row.session, copies.c.destination == destination)
        .values(fence=copies.c.fence + 1, owner=None, lease_until=None,
                holder=text_of(job) if can_verify else None, recheck_at=now if can_verify else None,
                unresolved_at=None if can_verify else values.get("last_request_at", row.last_request_at))
    )  # fmt: skip
    await connection.execute(
        insert(upload_log).values(
            session_identifier=row.session, destination_name=destination, success=False, timestamp=now,
            error_message="the process ended during the attempt", error_code="interrupted",
            event_id=row.event_id, source=row.source, attempt=row.attempts + 1, purpose=row.purpose,
        )
    )  # fmt: skip


async def waited_too_long(connection: AsyncConnection, cutoff: datetime) -> list[tuple[UUID, str]]:
    """Return steps that have waited since before ``cutoff``: their lane is paused or gone."""
    query = select(steps.c.job_id, steps.c.destination).where(
        steps.c.next_attempt_at.is_not(None),
        steps.c.state.in_((StepState.DUE, StepState.UNSETTLED)),
        steps.c.due_since < cutoff,
    )
    return [(uuid_of(row.job_id), row.destination) for row in await connection.execute(query.limit(500))]


async def give_up(connection: AsyncConnection, late: Sequence[tuple[UUID, str]]) -> None:
    """End steps whose wait is over: due ones fail, those with an unknown outcome become uncertain."""
    endings = ((StepState.DUE, StepState.FAILED), (StepState.UNSETTLED, StepState.UNCERTAIN))
    links = steps.c.purpose == LINK
    for job, destination in late:
        ended = 0
        for before, after in endings:
            changed = await connection.execute(
                update(steps)
                .where(
                    steps.c.job_id == text_of(job), steps.c.destination == destination, steps.c.state == before
                )
                .values(
                    state=case((links, StepState.DONE), else_=after), next_attempt_at=None,
                    error_code=case((links, LINK_FAILED), else_="waited_too_long"),
                    reason=func.coalesce(steps.c.reason, "nothing took it within NX_EXPORT_MAX_WAIT"),
                )
            )  # fmt: skip
            ended += changed.rowcount
        if not ended:
            continue  # it was claimed meanwhile: the attempt under way keeps its copy
        mine = and_(copies.c.holder == text_of(job), copies.c.destination == destination)
        # a look-up that is still under way must not end the step a second time: its fence is gone
        last_request = (
            select(steps.c.last_request_at)
            .where(steps.c.job_id == text_of(job), steps.c.destination == destination)
            .scalar_subquery()
        )
        await connection.execute(
            update(copies)
            .where(mine)
            .values(holder=None, owner=None, lease_until=None, fence=copies.c.fence + 1,
                    unresolved_at=func.coalesce(last_request, copies.c.unresolved_at))
        )  # fmt: skip
