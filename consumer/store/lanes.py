"""Lanes: whether work for a destination goes on, and when it may."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store.rows import LaneChange, LaneRow, LaneState
from consumer.store.tables import lanes

#: So many turns at most are booked ahead, by all processes together.
LONGEST_QUEUE = 1000


async def load(connection: AsyncConnection) -> dict[str, LaneRow]:
    """Return all lanes that were ever written; a destination without one has an active lane."""
    return {
        row.destination: LaneRow(
            destination=row.destination,
            state=LaneState(row.state),
            reason=row.reason,
            since=row.since,
            not_before=row.not_before,
            probe_at=row.probe_at,
            next_slot_at=row.next_slot_at,
        )
        for row in await connection.execute(select(lanes))
    }


async def change(
    connection: AsyncConnection, changes: Sequence[LaneChange], now: datetime, *, is_sqlite: bool
) -> bool:
    """Write lane changes one after the other; returns whether a lane has another state now.

    ``since`` stays when the state does, ``not_before`` only moves later.
    """
    before = await load(connection) if changes else {}
    known = dict(before)
    for item in changes:
        old = known.get(item.destination)
        # a wish to wait does not wake a paused lane, and a breaker does not hide that a person has to act
        keeps = item.not_before is not None or (item.state is LaneState.OPEN and old is not None
                                                and old.state is LaneState.PAUSED)  # fmt: skip
        state = old.state if old and keeps else item.state
        since = old.since if old and old.state is state else now
        kept = old.not_before if old and old.not_before else None
        not_before = max(filter(None, (kept, item.not_before)), default=None)
        values: dict[str, Any] = {
            "state": state,
            "reason": old.reason if old and keeps and old.state is not LaneState.ACTIVE else item.reason,
            "since": since,
            "not_before": not_before,
            "probe_at": item.probe_at or (old.probe_at if old and keeps else None),
        }
        await _upsert(connection, item.destination, values, is_sqlite=is_sqlite)
        slot = old.next_slot_at if old else None
        known[item.destination] = LaneRow(destination=item.destination, next_slot_at=slot, **values)
    was = {name: lane.state for name, lane in before.items()}
    return any(lane.state is not was.get(name, LaneState.ACTIVE) for name, lane in known.items())


async def book_slot(connection: AsyncConnection, destination: str, at: datetime, *, is_sqlite: bool) -> None:
    """Note when the next attempt of a paced destination may start, for all processes."""
    await _upsert(connection, destination, {"next_slot_at": at}, is_sqlite=is_sqlite)


async def book_probe(connection: AsyncConnection, destination: str, at: datetime, *, is_sqlite: bool) -> None:
    """Note when an open lane may be probed again, should this probe never end."""
    await _upsert(connection, destination, {"state": LaneState.OPEN, "probe_at": at}, is_sqlite=is_sqlite)


async def take_turn(
    connection: AsyncConnection, destination: str, now: datetime, interval_seconds: float, *, is_sqlite: bool
) -> datetime:
    """Return the next free turn of a paced destination, and book it for all processes."""
    interval = timedelta(seconds=interval_seconds)
    # the insert locks the row; its turn is in the past, so that the first one is now
    await _upsert(connection, destination, {"destination": destination}, is_sqlite=is_sqlite)
    query = select(lanes.c.next_slot_at).where(lanes.c.destination == destination).with_for_update()
    booked = (await connection.execute(query)).scalar_one()
    # a clock that was set back must not make anybody wait for longer than some turns
    at = now if booked is None else max(now, min(booked, now + LONGEST_QUEUE * interval))
    await book_slot(connection, destination, at + interval, is_sqlite=is_sqlite)
    return at


async def _upsert(
    connection: AsyncConnection, destination: str, values: Mapping[str, object], *, is_sqlite: bool
) -> None:
    insert = (sqlite.insert if is_sqlite else postgresql.insert)(lanes)
    new = {"destination": destination, "state": LaneState.ACTIVE, **values}
    await connection.execute(insert.values(new).on_conflict_do_update(index_elements=["destination"], set_=values))
