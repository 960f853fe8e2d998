"""Jobs: accepting them (T1), keeping their snapshot, deciding and ending them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic_core import from_json, to_json
from sqlalchemy import Row, and_, bindparam, case, insert, literal, not_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store.rows import LINK, JobRow, JobState, NewJob, StepRow, StepState, text_of, uuid_of
from consumer.store.tables import Utc, jobs, steps

#: A consumer that took a job for its snapshot and died loses it after this time (PostgreSQL).
SNAPSHOT_LEASE_SECONDS = 30

#: Steps that have nothing to lose; one that only adds links is the work of a record that is exported.
_NOT_BEGUN = (steps.c.state.in_((StepState.BLOCKED, StepState.DUE)), steps.c.purpose != LINK)

_CHUNK = 500  # SQLite takes some thousands of parameters in a statement, so long lists go in parts


async def known_digests(connection: AsyncConnection, ids: Iterable[UUID]) -> dict[UUID, str]:
    """Return the data digest of those jobs that exist."""
    found: dict[UUID, str] = {}
    for part in _chunks([text_of(value) for value in ids]):
        rows = await connection.execute(select(jobs.c.id, jobs.c.data_sha256).where(jobs.c.id.in_(part)))
        found.update({uuid_of(row.id): row.data_sha256 for row in rows})
    return found


async def newest_builds(connection: AsyncConnection, sessions: Iterable[str]) -> dict[str, JobRow]:
    """Return for each session the job that no newer build has superseded.

    One that failed before its record was kept does not count: nothing of it can be anywhere.
    """
    found: dict[str, JobRow] = {}
    for part in _chunks(sorted(set(sessions))):
        never_began = and_(jobs.c.state == JobState.FAILED, jobs.c.record_sha256.is_(None))
        query = select(jobs).where(jobs.c.session.in_(part), jobs.c.state != JobState.SUPERSEDED, not_(never_began))
        for row in await connection.execute(query.order_by(jobs.c.build_time, jobs.c.received_at)):
            found[row.session] = job_row(row)
    return found


async def insert_jobs(
    connection: AsyncConnection, new: Sequence[NewJob], now: datetime, *, handed_on: bool = False
) -> None:
    """Write new jobs with all their steps blocked.

    Their snapshot is due at once, or after the lease when they are ``handed_on`` in memory.
    """
    if not new:
        return
    due_at = now + timedelta(seconds=SNAPSHOT_LEASE_SECONDS) if handed_on else now
    await connection.execute(insert(jobs), [_job_values(job, now, due_at) for job in new])
    values = [
        {
            "job_id": text_of(job.id),
            "destination": step.destination,
            "session": job.session,
            "priority": step.priority,
            "purpose": "create",
            "state": StepState.BLOCKED,
        }
        for job in new
        for step in job.steps
    ]
    if values:
        await connection.execute(insert(steps), values)


def _job_values(job: NewJob, now: datetime, due_at: datetime) -> dict[str, Any]:
    return {
        "id": text_of(job.id),
        "source": job.source,
        "event_id": job.event_id,
        "data_sha256": job.data_sha256,
        "session": job.session,
        "build_time": job.build_time,
        "received_at": now,
        "event": job.event,
        "strategy": job.strategy,
        "state": JobState.OPEN,
        "revision": 1,
        "snapshot_due_at": due_at,
        "snapshot_since": now,
    }


async def supersede(connection: AsyncConnection, old: UUID, new: UUID) -> None:
    """Let a newer build take over: what of the old job has not begun will not begin."""
    await connection.execute(
        update(jobs).where(jobs.c.superseded_by == text_of(old)).values(superseded_by=text_of(new))
    )
    await connection.execute(
        update(jobs)
        .where(jobs.c.id == text_of(old), jobs.c.state == JobState.OPEN)
        .values(state=JobState.SUPERSEDED, superseded_by=text_of(new), snapshot_due_at=None, decide_at=None)
    )
    await connection.execute(
        update(steps)
        .where(steps.c.job_id == text_of(old), *_NOT_BEGUN)
        .values(state=StepState.SUPERSEDED, next_attempt_at=None, reason="a newer build took over")
    )


async def any_snapshot_due(connection: AsyncConnection, now: datetime) -> bool:
    """Tell whether a job waits for its snapshot."""
    query = select(jobs.c.id).where(jobs.c.snapshot_due_at <= now, jobs.c.state == JobState.OPEN).limit(1)
    return (await connection.execute(query)).first() is not None


async def take_for_snapshot(connection: AsyncConnection, now: datetime, limit: int, *, lock: bool) -> list[JobRow]:
    """Take jobs whose snapshot is due: nobody else gets them for the time of a lease."""
    query = (
        select(jobs)
        .where(jobs.c.snapshot_due_at <= now, jobs.c.state == JobState.OPEN)
        .order_by(jobs.c.snapshot_due_at)
        .limit(limit)
    )
    rows = (await connection.execute(query.with_for_update(skip_locked=True) if lock else query)).all()
    until = now + timedelta(seconds=SNAPSHOT_LEASE_SECONDS)
    ids = [row.id for row in rows]
    await connection.execute(update(jobs).where(jobs.c.id.in_(ids)).values(snapshot_due_at=until))
    return [job_row(row) for row in rows]


_keep_snapshot = (
    update(jobs)
    .where(jobs.c.id == bindparam("key"))
    .values(
        record_sha256=bindparam("sha256"), record_name=bindparam("name"), facts=bindparam("known"),
        snapshot_due_at=None,
    )
)  # fmt: skip


async def release_snapshots(connection: AsyncConnection, now: datetime) -> None:
    """At the start of the only engine: what was handed on in the memory of the one before is due now."""
    await connection.execute(
        update(jobs).where(jobs.c.snapshot_due_at > now, jobs.c.snapshot_tries == 0).values(snapshot_due_at=now)
    )


async def give_back(connection: AsyncConnection, ids: Iterable[UUID], now: datetime) -> None:
    """At an orderly stop: what this process took for a snapshot is due for the others (or the next start)."""
    for part in _chunks([text_of(value) for value in ids]):
        await connection.execute(
            update(jobs).where(jobs.c.id.in_(part), jobs.c.snapshot_due_at.is_not(None)).values(snapshot_due_at=now)
        )


async def current_states(
    connection: AsyncConnection, known: Iterable[JobRow], *, lock: bool = False
) -> dict[UUID, JobRow]:
    """Return known jobs with what may have changed since: state, revision and successor."""
    rows = {text_of(job.id): job for job in known}
    found: dict[UUID, JobRow] = {}
    for part in _chunks(sorted(rows)):
        query = select(jobs.c.id, jobs.c.state, jobs.c.revision, jobs.c.superseded_by)
        query = query.where(jobs.c.id.in_(part)).order_by(jobs.c.id)
        for row in await connection.execute(query.with_for_update() if lock else query):
            successor = uuid_of(row.superseded_by) if row.superseded_by else None
            job = rows[row.id]
            found[job.id] = replace(job, state=JobState(row.state), revision=row.revision, superseded_by=successor)
    return found


async def keep_snapshots(
    connection: AsyncConnection, kept: Sequence[tuple[UUID, str, str, Mapping[str, Any]]]
) -> None:
    """Write down (job, sha256, file name, facts) of records that were read and checked."""
    if kept:
        values = [
            {"key": text_of(job), "sha256": sha256, "name": name, "known": to_json(facts).decode()}
            for job, sha256, name, facts in kept
        ]
        await connection.execute(_keep_snapshot, values)


async def postpone_snapshot(connection: AsyncConnection, job: UUID, due_at: datetime, *, counts: bool) -> None:
    """Ask for a record again later; ``counts`` when the file was missing rather than the whole root."""
    await connection.execute(
        update(jobs)
        .where(jobs.c.id == text_of(job), jobs.c.state == JobState.OPEN)
        .values(snapshot_due_at=due_at, snapshot_tries=jobs.c.snapshot_tries + (1 if counts else 0))
    )


async def fail_all_steps(connection: AsyncConnection, job: UUID, code: str, reason: str) -> None:
    """Fail every step that has not ended: the record itself is at fault."""
    await connection.execute(
        update(steps)
        .where(steps.c.job_id == text_of(job), *_NOT_BEGUN)
        .values(state=StepState.FAILED, error_code=code, reason=reason, next_attempt_at=None)
    )
    await connection.execute(update(jobs).where(jobs.c.id == text_of(job)).values(snapshot_due_at=None))


async def load_jobs(connection: AsyncConnection, ids: Iterable[UUID], *, lock: bool = False) -> dict[UUID, JobRow]:
    """Return jobs by id; with ``lock`` no other consumer decides about them meanwhile."""
    found: dict[UUID, JobRow] = {}
    for part in _chunks(sorted(text_of(value) for value in ids)):
        query = select(jobs).where(jobs.c.id.in_(part)).order_by(jobs.c.id)
        rows = await connection.execute(query.with_for_update() if lock else query)
        found.update({uuid_of(row.id): job_row(row) for row in rows})
    return found


async def load_steps(connection: AsyncConnection, ids: Iterable[UUID]) -> dict[UUID, list[StepRow]]:
    """Return all steps of the given jobs."""
    found: dict[UUID, list[StepRow]] = defaultdict(list)
    for part in _chunks([text_of(value) for value in ids]):
        for row in await connection.execute(select(steps).where(steps.c.job_id.in_(part))):
            found[uuid_of(row.job_id)].append(step_row(row))
    return found


async def superseded_jobs(connection: AsyncConnection, successors: Iterable[UUID]) -> list[JobRow]:
    """Return the jobs that wait for the outcome of one of these to repeat it."""
    found: list[JobRow] = []
    for part in _chunks([text_of(value) for value in successors]):
        query = select(jobs).where(
            jobs.c.superseded_by.in_(part), jobs.c.state == JobState.SUPERSEDED, jobs.c.finished_at.is_(None)
        )
        found += [job_row(row) for row in await connection.execute(query)]
    return found


async def sent_hashes(connection: AsyncConnection, session: str) -> frozenset[str]:
    """Return the sha256 of every record content that was ever taken in for a session."""
    query = select(jobs.c.record_sha256).where(jobs.c.session == session, jobs.c.record_sha256.is_not(None))
    return frozenset(row.record_sha256 for row in await connection.execute(query))


_finish = (
    update(jobs)
    .where(jobs.c.id == bindparam("key"))
    .values(state=bindparam("new_state"), finished_at=bindparam("at"), decide_at=None, snapshot_due_at=None)
)


async def finish_jobs(connection: AsyncConnection, ended: Sequence[tuple[UUID, JobState]], now: datetime) -> None:
    """Write down that jobs are over."""
    if ended:
        values = [{"key": text_of(job), "new_state": state, "at": now} for job, state in ended]
        await connection.execute(_finish, values)


async def decide_later(connection: AsyncConnection, again: Sequence[tuple[UUID, datetime | None]]) -> None:
    """Note when only time will move these jobs on; None clears the note."""
    if again:
        statement = update(jobs).where(jobs.c.id == bindparam("key")).values(decide_at=bindparam("at"))
        await connection.execute(statement, [{"key": text_of(job), "at": at} for job, at in again])


async def decide_waiting_jobs(connection: AsyncConnection, now: datetime) -> None:
    """Ask for a new decision for each open job that has a blocked step (a lane has changed)."""
    blocked = select(steps.c.job_id).where(steps.c.state == StepState.BLOCKED, steps.c.job_id == jobs.c.id)
    await connection.execute(
        update(jobs)
        .where(jobs.c.state == JobState.OPEN, jobs.c.record_sha256.is_not(None), blocked.exists())
        .values(decide_at=now)
    )


async def due_decisions(connection: AsyncConnection, now: datetime, limit: int) -> list[UUID]:
    """Return jobs that are to be decided anew now."""
    query = select(jobs.c.id).where(jobs.c.decide_at <= now, jobs.c.state == JobState.OPEN).limit(limit)
    return [uuid_of(row.id) for row in await connection.execute(query)]


async def reopen(connection: AsyncConnection, job: UUID, revision: int, now: datetime) -> bool:
    """Open a failed job again for a replay, if it is failed at that revision; its failed steps become due anew.

    Returns False when the job has moved on since: the replay is stale.
    """
    changed = await connection.execute(
        update(jobs)
        .where(jobs.c.id == text_of(job), jobs.c.state == JobState.FAILED, jobs.c.revision == revision)
        .values(state=JobState.OPEN, revision=revision + 1, finished_at=None, snapshot_tries=0,
                snapshot_since=now, decide_at=now,
                snapshot_due_at=case((jobs.c.record_sha256.is_(None), literal(now, Utc()))))
    )  # fmt: skip
    if changed.rowcount != 1:
        return False
    await connection.execute(
        update(steps)
        .where(
            steps.c.job_id == text_of(job),
            steps.c.state.in_((StepState.FAILED, StepState.SUPERSEDED, StepState.SKIPPED)),
        )
        .values(state=StepState.BLOCKED, attempts=0, lookups=0, due_since=None, next_attempt_at=None,
                error_code=None, reason=None)
    )  # fmt: skip
    return True


def new_job_row(job: NewJob, now: datetime) -> JobRow:
    """Return a job as it was just inserted."""
    return JobRow(
        id=job.id,
        source=job.source,
        event_id=job.event_id,
        session=job.session,
        build_time=job.build_time,
        received_at=now,
        snapshot_since=now,
        event=job.event,
        strategy=job.strategy,
        state=JobState.OPEN,
        revision=1,
        superseded_by=None,
        record_sha256=None,
        record_name=None,
        facts={},
        new_steps=job.steps,
    )


def new_step_rows(job: JobRow) -> list[StepRow]:
    """Return the steps of a job that was just inserted."""
    return [
        StepRow(
            job_id=job.id,
            destination=step.destination,
            session=job.session,
            priority=step.priority,
            purpose="create",
            state=StepState.BLOCKED,
            attempts=0,
            lookups=0,
            due_since=None,
            next_attempt_at=None,
            first_attempt_at=None,
            last_request_at=None,
            error_code=None,
            reason=None,
            result=None,
        )
        for step in job.new_steps
    ]


def job_row(row: Row[Any]) -> JobRow:
    """Build a frozen job from a result row."""
    return JobRow(
        id=uuid_of(row.id),
        source=row.source,
        event_id=row.event_id,
        session=row.session,
        build_time=row.build_time,
        received_at=row.received_at,
        event=row.event,
        strategy=row.strategy,
        state=JobState(row.state),
        revision=row.revision,
        superseded_by=uuid_of(row.superseded_by) if row.superseded_by else None,
        record_sha256=row.record_sha256,
        record_name=row.record_name,
        facts=from_json(row.facts) if row.facts else {},
        snapshot_tries=row.snapshot_tries,
        snapshot_since=row.snapshot_since,
    )


def step_row(row: Row[Any]) -> StepRow:
    """Build a frozen step from a result row."""
    return StepRow(
        job_id=uuid_of(row.job_id),
        destination=row.destination,
        session=row.session,
        priority=row.priority,
        purpose=row.purpose,
        state=StepState(row.state),
        attempts=row.attempts,
        lookups=row.lookups,
        due_since=row.due_since,
        next_attempt_at=row.next_attempt_at,
        first_attempt_at=row.first_attempt_at,
        last_request_at=row.last_request_at,
        error_code=row.error_code,
        reason=row.reason,
        result=from_json(row.result) if row.result else None,
    )


def _chunks(values: list[str]) -> Iterable[list[str]]:
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))
