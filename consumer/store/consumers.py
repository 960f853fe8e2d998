"""Which consumers work on this database, and when they were last seen."""

from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store.tables import consumers

#: A consumer that was not seen for this long is forgotten.
FORGET_SECONDS = 3600


async def beat(connection: AsyncConnection, owner: str, now: datetime, *, connected: bool, is_sqlite: bool) -> None:
    """Say that a consumer is alive, and whether it reaches the broker."""
    statement = (sqlite.insert if is_sqlite else postgresql.insert)(consumers)
    values = {"owner": owner, "started_at": now, "seen_at": now, "broker_connected": connected}
    await connection.execute(
        statement.values(values).on_conflict_do_update(
            index_elements=["owner"], set_={"seen_at": now, "broker_connected": connected}
        )
    )
    old = now - timedelta(seconds=FORGET_SECONDS)
    await connection.execute(delete(consumers).where(consumers.c.seen_at < old))


async def leave(connection: AsyncConnection, owner: str) -> None:
    """Take a consumer off the list: it has stopped in order."""
    await connection.execute(delete(consumers).where(consumers.c.owner == owner))


async def alive(connection: AsyncConnection, since: datetime) -> list[tuple[str, datetime, bool]]:
    """Return (owner, last seen, reaches the broker) of consumers seen since a moment."""
    query = select(consumers).where(consumers.c.seen_at >= since).order_by(consumers.c.owner)
    return [(row.owner, row.seen_at, row.broker_connected) for row in await connection.execute(query)]
