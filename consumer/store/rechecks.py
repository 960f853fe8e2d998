"""Copies that are looked at once more, H after a success that followed an unknown outcome."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import and_, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store.jobs import job_row, step_row
from consumer.store.rows import AttemptEnd, Claim, StepState
from consumer.store.steps import copy_row
from consumer.store.tables import copies, jobs, steps, upload_log


@dataclass(frozen=True, slots=True)
class Finding:
    """What the last look-up found wrong."""

    code: str
    message: str


async def due(connection: AsyncConnection, now: datetime, limit: int, names: Sequence[str]) -> list[Claim]:
    """Return copies whose last look-up is due and that nobody works on, with the step that made them."""
    # a step that is still to be tried again keeps its last look-up for its own end
    is_made = (
        select(steps.c.job_id)
        .join(jobs, jobs.c.id == steps.c.job_id)
        .where(
            jobs.c.session == copies.c.session,
            steps.c.destination == copies.c.destination,
            steps.c.state == StepState.DONE,
        )
        .exists()
    )
    query = select(copies).where(
        copies.c.recheck_at <= now, copies.c.holder.is_(None), copies.c.destination.in_(names), is_made
    )
    found = []
    for copy in (await connection.execute(query.limit(limit))).all():
        made = (
            select(steps)
            .join(jobs, jobs.c.id == steps.c.job_id)
            .where(
                jobs.c.session == copy.session,
                steps.c.destination == copy.destination,
                steps.c.state == StepState.DONE,
            )
            .order_by(jobs.c.build_time.desc(), jobs.c.received_at.desc())
            .limit(1)
        )
        step = (await connection.execute(made)).one()
        job = (await connection.execute(select(jobs).where(jobs.c.id == step.job_id))).one()
        found.append(Claim(step_row(step), job_row(job), copy_row(copy), copy.fence, now, ()))
    return found


async def ask_for(connection: AsyncConnection, refused: Sequence[AttemptEnd]) -> None:
    """Have copies looked at once more where a result was refused: that process may have made one too."""
    for end in refused:
        step = end.claim.step
        where = and_(copies.c.session == step.session, copies.c.destination == step.destination)
        if end.recheck_at is not None:
            await connection.execute(update(copies).where(where).values(recheck_at=end.recheck_at))


async def finish(
    connection: AsyncConnection, session: str, destination: str, fence: int, again_at: datetime | None
) -> bool:
    """Note that a copy was looked at (or when to look again); False when somebody has worked on it meanwhile."""
    where = and_(copies.c.session == session, copies.c.destination == destination, copies.c.fence == fence)
    changed = await connection.execute(update(copies).where(where).values(recheck_at=again_at))
    return bool(changed.rowcount)


async def report(connection: AsyncConnection, claim: Claim, finding: Finding, now: datetime) -> None:
    """Write what the last look-up found into upload_log."""
    await connection.execute(
        insert(upload_log).values(
            session_identifier=claim.step.session, destination_name=claim.step.destination,
            success=finding.code == "surplus_copy", timestamp=now, record_id=claim.copy.record_id,
            record_url=claim.copy.record_url, error_message=finding.message, error_code=finding.code,
            event_id=claim.job.event_id, source=claim.job.source, attempt=claim.step.attempts, purpose="verify",
        )
    )  # fmt: skip
