"""Messages that must go out: written with what they tell of, marked when the broker has confirmed (T5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic_core import from_json, to_json
from sqlalchemy import bindparam, case, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store.rows import Message, text_of, uuid_of
from consumer.store.tables import jobs, outbox


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which outcomes to send again: written from ``since`` on and before ``until``; no ``sessions``: of all."""

    since: datetime | None = None
    until: datetime | None = None
    sessions: tuple[str, ...] = ()
    unrouted: bool = False


async def add(connection: AsyncConnection, messages: Sequence[Message], now: datetime, *, is_sqlite: bool) -> None:
    """Add messages; one that is already there (same kind and id) stays as it is."""
    if not messages:
        return
    statement = (sqlite.insert if is_sqlite else postgresql.insert)(outbox).on_conflict_do_nothing(
        index_elements=[outbox.c.kind, outbox.c.message_id]
    )
    await connection.execute(statement, [_values(message, now) for message in messages])


def _values(message: Message, now: datetime) -> dict[str, object]:
    return {
        "kind": message.kind,
        "message_id": message.message_id,
        "job_id": text_of(message.job_id) if message.job_id else None,
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "content_type": message.content_type,
        "headers": to_json(message.headers).decode(),
        "body": message.body,
        "created_at": now,
    }


async def unsent(connection: AsyncConnection, cutoff: datetime, limit: int, *, lock: bool = False) -> list[Message]:
    """Return the oldest messages without a confirm, written before ``cutoff``; ``lock``: other relays skip them."""
    query = (
        select(outbox)
        .where(outbox.c.sent_at.is_(None), outbox.c.created_at <= cutoff)
        .order_by(outbox.c.seq)
        .limit(limit)
    )
    if lock:
        query = query.with_for_update(skip_locked=True)
    return [
        Message(
            kind=row.kind,
            message_id=row.message_id,
            exchange=row.exchange,
            routing_key=row.routing_key,
            body=bytes(row.body),
            headers=from_json(row.headers),
            content_type=row.content_type,
            job_id=uuid_of(row.job_id) if row.job_id else None,
        )
        for row in await connection.execute(query)
    ]


_sent = (
    update(outbox)
    .where(outbox.c.kind == bindparam("what"), outbox.c.message_id == bindparam("identity"))
    .values(sent_at=bindparam("at"), unrouted=bindparam("returned"))
)


async def mark_sent(connection: AsyncConnection, sent: Sequence[tuple[Message, bool]], now: datetime) -> None:
    """Mark confirmed messages; the flag says that no queue took it."""
    if sent:
        values = [
            {"what": message.kind, "identity": message.message_id, "at": now, "returned": unrouted}
            for message, unrouted in sent
        ]
        await connection.execute(_sent, values)


async def has_letter(connection: AsyncConnection, digest: str) -> bool:
    """Tell whether a poison letter with this content is already written."""
    query = select(func.count()).where(
        outbox.c.kind == "poison", outbox.c.message_id >= digest, outbox.c.message_id < digest + "~"
    )
    return bool((await connection.execute(query)).scalar())


async def sent_outcomes(connection: AsyncConnection, chosen: Chosen) -> list[int]:
    """Return the ``seq`` of chosen outcomes that were sent; only each job's newest, since listeners drop others."""
    # the outcome of a poison event has no job: it stands for itself, and only its body names the session
    newest = (
        select(func.max(outbox.c.seq))
        .where(outbox.c.kind == "outcome")
        .group_by(func.coalesce(outbox.c.job_id, outbox.c.message_id))
    )
    query = (
        select(outbox.c.seq, case((jobs.c.id.is_(None), outbox.c.body)).label("body"))
        .outerjoin(jobs, jobs.c.id == outbox.c.job_id)
        .where(outbox.c.seq.in_(newest), outbox.c.sent_at.is_not(None))
        .order_by(outbox.c.seq)
    )
    if chosen.since is not None:
        query = query.where(outbox.c.created_at >= chosen.since)
    if chosen.until is not None:
        query = query.where(outbox.c.created_at < chosen.until)
    if chosen.unrouted:
        query = query.where(outbox.c.unrouted)
    if chosen.sessions:
        query = query.where(or_(jobs.c.session.in_(chosen.sessions), jobs.c.id.is_(None)))
    rows = await connection.execute(query)
    if not chosen.sessions:
        return [row.seq for row in rows]
    return [row.seq for row in rows if row.body is None or _session_in(row.body) in chosen.sessions]


def _session_in(body: bytes) -> str:
    return str(from_json(bytes(body))["data"]["session_identifier"])


_send_again = (
    update(outbox).where(outbox.c.seq == bindparam("number"), outbox.c.sent_at.is_not(None)).values(sent_at=None)
)


async def send_again(connection: AsyncConnection, found: Sequence[int]) -> None:
    """Mark sent messages as unsent: the relay sends them once more, byte for byte, with the same id."""
    if found:
        await connection.execute(_send_again, [{"number": seq} for seq in found])
