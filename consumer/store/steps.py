"""Steps and copies: claiming work (T2), remembering facts (T3), writing results (T4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic_core import from_json, to_json
from sqlalchemy import (
    Boolean,
    Integer,
    Row,
    Text,
    and_,
    bindparam,
    case,
    func,
    insert,
    not_,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store.jobs import step_row
from consumer.store.rows import (
    LINK,
    AttemptEnd,
    Claim,
    CopyRow,
    JobRow,
    LogEntry,
    StepChange,
    StepRow,
    StepState,
    text_of,
)
from consumer.store.tables import Utc, copies, jobs, steps, upload_log


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much work to claim for one destination, and how long its lease lasts."""

    destination: str
    limit: int
    lease_seconds: float
    can_verify: bool = False
    #: since when the lane is open, if one step may find out whether that is over
    probe_of: datetime | None = None


async def due_steps(connection: AsyncConnection, wanted: Wanted, now: datetime, *, lock: bool) -> list[StepRow]:
    """Find due steps (and look-ups) that nobody else holds: one for each session, oldest wait first.

    With ``lock`` their jobs are locked too, so that two consumers never claim from one job at once.
    """
    same_copy = and_(copies.c.session == steps.c.session, copies.c.destination == steps.c.destination)
    other = steps.alias()
    flying = select(other.c.job_id).where(
        other.c.job_id == steps.c.job_id, other.c.destination != steps.c.destination,
        other.c.state.in_((StepState.RUNNING, StepState.UNSETTLED)), other.c.purpose != LINK,
    )  # fmt: skip
    query = (
        select(steps)
        .join(jobs, jobs.c.id == steps.c.job_id)
        .outerjoin(copies, same_copy)
        .where(
            steps.c.destination == wanted.destination,
            steps.c.state.in_((StepState.DUE, StepState.UNSETTLED)),
            steps.c.next_attempt_at <= now,
            or_(copies.c.holder.is_(None), copies.c.holder == steps.c.job_id),
            # what may not start yet must not stand in the way of what may
            or_(jobs.c.strategy != "first_success", not_(flying.exists())),
        )
        .order_by(steps.c.next_attempt_at)
    )
    if lock:
        query = query.with_for_update(of=[steps, jobs], skip_locked=True)
    rows = list(await connection.execute(query.limit(wanted.limit)))
    if len(rows) == wanted.limit and all(row.attempts > 0 for row in rows):
        # many retries are due: half of the slots are for records that were never tried (one slot takes turns)
        share = (wanted.limit + int(now.timestamp()) % 2) // 2
        rows = [*await connection.execute(query.where(steps.c.attempts == 0).limit(share)), *rows]
    first: dict[str, StepRow] = {}
    for row in rows:
        first.setdefault(row.session, step_row(row))
    return list(first.values())[: wanted.limit]


def unclaimed(step: StepRow, job: JobRow, until: datetime) -> Claim:
    """Pair a due step with its job; ``claim`` adds copy and fence."""
    return Claim(step, job, CopyRow(), 0, until, ())


async def claim(
    connection: AsyncConnection,
    found: Sequence[Claim],
    owner: str,
    now: datetime,
    *,
    can_verify: bool,
    is_sqlite: bool,
) -> list[Claim]:
    """Take the given steps: fence + 1, a lease, state running (T2). Returns those that could be taken.

    A look-up keeps its state: it sends nothing, so its last request stays where it was. A step whose copy has an
    unresolved request of another job looks up first too.
    """
    if not found:
        return []
    held = await _hold_copies(connection, found, owner, is_sqlite=is_sqlite)
    taken = []
    for item in found:
        row = held.get((item.step.session, item.step.destination))
        if row is not None:
            claimed = replace(_with_copy(item, row), claimed_at=now)
            taken.append(_looking_first(claimed) if can_verify else claimed)
    running = [item for item in taken if not item.looks_up]
    if running:
        await connection.execute(_run, [_run_values(item, now) for item in running])
    looking = [item for item in taken if item.looks_up]
    if looking:
        await connection.execute(_look, [_look_values(item) for item in looking])
    return taken


_run = (
    update(steps)
    .where(steps.c.job_id == bindparam("job"), steps.c.destination == bindparam("name"))
    .values(
        state=StepState.RUNNING, next_attempt_at=None, last_request_at=bindparam("until"),
        first_attempt_at=func.coalesce(steps.c.first_attempt_at, bindparam("at", type_=Utc())),
    )
)  # fmt: skip
_look = (
    update(steps)
    .where(steps.c.job_id == bindparam("job"), steps.c.destination == bindparam("name"))
    .values(
        state=StepState.UNSETTLED, next_attempt_at=bindparam("until"),
        last_request_at=func.coalesce(steps.c.last_request_at, bindparam("requested", type_=Utc())),
    )
)  # fmt: skip


def _looking_first(item: Claim) -> Claim:
    at = item.copy.unresolved_at
    if at is None or item.looks_up or item.step.links:
        return item
    latest = max(at, item.step.last_request_at or at)
    return replace(item, step=replace(item.step, state=StepState.UNSETTLED, last_request_at=latest))


def _look_values(item: Claim) -> dict[str, Any]:
    return {**_step_values(item), "requested": item.step.last_request_at}


def _run_values(item: Claim, now: datetime) -> dict[str, Any]:
    return {**_step_values(item), "at": now}


def _step_values(item: Claim) -> dict[str, Any]:
    return {"job": text_of(item.step.job_id), "name": item.step.destination, "until": item.lease_until}


async def _hold_copies(
    connection: AsyncConnection, found: Sequence[Claim], owner: str, *, is_sqlite: bool
) -> dict[tuple[str, str], Row[Any]]:
    statement: Any = (sqlite.insert if is_sqlite else postgresql.insert)(copies)
    new = statement.excluded
    statement = statement.on_conflict_do_update(
        index_elements=[copies.c.session, copies.c.destination],
        set_={
            "fence": copies.c.fence + 1,
            "holder": new.holder,
            "owner": new.owner,
            "lease_until": new.lease_until,
        },
        where=or_(copies.c.holder.is_(None), copies.c.holder == new.holder),
    ).returning(copies)
    values = [
        {
            "session": item.step.session,
            "destination": item.step.destination,
            "fence": 1,
            "holder": text_of(item.step.job_id),
            "owner": owner,
            "lease_until": item.lease_until,
        }
        for item in found
    ]
    rows = await connection.execute(statement, values)
    return {(row.session, row.destination): row for row in rows}


def _with_copy(item: Claim, row: Row[Any]) -> Claim:
    return replace(item, copy=copy_row(row), fence=row.fence)


def copy_row(row: Row[Any]) -> CopyRow:
    """Build a frozen copy from a result row."""
    return CopyRow(
        record_id=row.record_id,
        record_url=row.record_url,
        sent_sha256=row.sent_sha256,
        stored_sha256=row.stored_sha256,
        build_time=row.build_time,
        remembered=from_json(row.remembered) if row.remembered else {},
        fence=row.fence,
        links_sha256=row.links_sha256,
        unresolved_at=row.unresolved_at,
    )


async def remember(connection: AsyncConnection, claimed: Claim, facts: Mapping[str, Any]) -> bool:
    """Keep a destination's facts (T3); False when the fence is not ours any more."""
    result = await connection.execute(
        update(copies)
        .where(_same_copy(claimed), copies.c.fence == claimed.fence)
        .values(remembered=to_json(dict(facts)).decode())
    )
    return result.rowcount == 1


def _same_copy(claimed: Claim) -> Any:
    return and_(copies.c.session == claimed.step.session, copies.c.destination == claimed.step.destination)


async def lock_copies(
    connection: AsyncConnection, ends: Sequence[AttemptEnd], linked: frozenset[str] = frozenset()
) -> list[AttemptEnd]:
    """Return the ends whose fence still holds; on PostgreSQL their copies stay locked until the commit.

    Copies that link to each other (``linked``) are locked together, so that of two results that are written at
    once the later one sees the earlier.
    """
    keys = {(end.claim.step.session, end.claim.step.destination) for end in ends}
    keys |= {(session, other) for session, name in keys if name in linked for other in linked}
    ordered = sorted(keys)
    fences: dict[tuple[str, str], int] = {}
    for start in range(0, len(ordered), 200):
        query = (
            select(copies.c.session, copies.c.destination, copies.c.fence)
            .where(tuple_(copies.c.session, copies.c.destination).in_(ordered[start : start + 200]))
            .order_by(copies.c.session, copies.c.destination)
            .with_for_update()
        )
        fences.update({(row.session, row.destination): row.fence for row in await connection.execute(query)})
    return [
        end for end in ends if fences.get((end.claim.step.session, end.claim.step.destination)) == end.claim.fence
    ]


_change = (
    update(steps)
    .where(steps.c.job_id == bindparam("job"), steps.c.destination == bindparam("name"))
    .values(
        state=bindparam("new_state"), error_code=bindparam("code"), reason=bindparam("why"),
        next_attempt_at=bindparam("at"), result=bindparam("outcome"),
        attempts=steps.c.attempts + bindparam("counted", type_=Integer()), lookups=bindparam("looked"),
        last_request_at=func.coalesce(bindparam("requested", type_=Utc()), steps.c.last_request_at),
    )
)  # fmt: skip


async def write_ends(connection: AsyncConnection, ends: Sequence[AttemptEnd], now: datetime) -> None:
    """Write steps, copies and upload_log of finished attempts (part of T4); fences were checked before."""
    if not ends:
        return
    await connection.execute(_change, [_change_values(end, now) for end in ends])
    await connection.execute(_copy, [_copy_values(end) for end in ends])
    logs = [end.log for end in ends if end.log is not None]
    if logs:
        await connection.execute(insert(upload_log), [_log_values(entry) for entry in logs])


def _change_values(end: AttemptEnd, now: datetime) -> dict[str, Any]:
    step = end.step
    return {
        "job": text_of(step.job_id),
        "name": step.destination,
        "new_state": step.state,
        "code": step.error_code,
        "why": step.reason,
        "at": step.next_attempt_at,
        "outcome": to_json(step.result).decode() if step.result is not None else None,
        "counted": 1 if step.counts else 0,
        "looked": end.claim.step.lookups + 1 if step.looked_up else 0,
        # a look-up sends nothing that could commit late: the settle time counts from the request before it
        "requested": None if step.looked_up else now,
    }


_copy = (
    update(copies)
    .where(copies.c.session == bindparam("one_session"), copies.c.destination == bindparam("name"))
    .values(
        holder=bindparam("keeps"),
        owner=None, lease_until=None,
        record_id=func.coalesce(bindparam("id", type_=Text()), copies.c.record_id),
        record_url=func.coalesce(bindparam("url", type_=Text()), copies.c.record_url),
        sent_sha256=func.coalesce(bindparam("sent", type_=Text()), copies.c.sent_sha256),
        stored_sha256=func.coalesce(bindparam("stored", type_=Text()), copies.c.stored_sha256),
        build_time=func.coalesce(bindparam("built", type_=Utc()), copies.c.build_time),
        remembered=func.coalesce(bindparam("facts", type_=Text()), copies.c.remembered),
        links_sha256=func.coalesce(bindparam("linked", type_=Text()), copies.c.links_sha256),
        unresolved_at=case(
            (bindparam("open", type_=Boolean()), copies.c.unresolved_at),
            else_=bindparam("unresolved", type_=Utc()),
        ),
        recheck_at=case(
            (or_(bindparam("unknown", type_=Boolean()), copies.c.recheck_at.is_not(None)),
             func.coalesce(bindparam("recheck", type_=Utc()), copies.c.recheck_at)),
            else_=None,
        ),
    )
)  # fmt: skip


def _copy_values(end: AttemptEnd) -> dict[str, Any]:
    change = end.copy
    unsettled = end.step.state is StepState.UNSETTLED
    return {
        "one_session": end.claim.step.session,
        "name": end.claim.step.destination,
        # while an effect may still be on its way, no other job may touch this copy
        "keeps": text_of(end.step.job_id) if unsettled else None,
        "id": change.record_id if change else None,
        "url": change.record_url if change else None,
        "sent": change.sent_sha256 if change else None,
        "stored": change.stored_sha256 if change else None,
        "built": change.build_time if change else None,
        "facts": to_json(change.remembered).decode() if change and change.remembered else None,
        "linked": change.links_sha256 if change else None,
        "unknown": unsettled,
        "open": unsettled,
        "unresolved": end.unresolved_at,
        "recheck": end.recheck_at,
    }


def _log_values(entry: LogEntry) -> dict[str, Any]:
    return {
        "session_identifier": entry.session,
        "destination_name": entry.destination,
        "success": entry.success,
        "timestamp": entry.timestamp,
        "record_id": entry.record_id,
        "record_url": entry.record_url,
        "error_message": entry.error_message,
        "metadata_json": to_json(entry.metadata, fallback=str).decode() if entry.metadata else None,
        "event_id": entry.event_id,
        "source": entry.source,
        "attempt": entry.attempt,
        "error_code": entry.error_code,
        "duration_s": entry.duration_seconds,
        "purpose": entry.purpose,
    }


_move = (
    update(steps)
    .where(steps.c.job_id == bindparam("job"), steps.c.destination == bindparam("name"))
    .values(
        state=bindparam("new_state"), error_code=bindparam("code"), reason=bindparam("why"),
        next_attempt_at=bindparam("at"), due_since=func.coalesce(steps.c.due_since, bindparam("at", type_=Utc())),
    )
)  # fmt: skip


async def move_steps(connection: AsyncConnection, changes: Sequence[StepChange]) -> None:
    """Write state changes that were decided rather than attempted."""
    if changes:
        values = [
            {
                "job": text_of(change.job_id),
                "name": change.destination,
                "new_state": change.state,
                "code": change.error_code,
                "why": change.reason,
                "at": change.next_attempt_at,
            }
            for change in changes
        ]
        await connection.execute(_move, values)
