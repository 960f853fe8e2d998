"""What happened to the service as a whole and a person should know of later: one moment for each kind."""

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store.tables import notices

#: The work queue was deleted, or was missing when the broker came back.
WORK_QUEUE_GONE = "work_queue_gone"


async def note(connection: AsyncConnection, code: str, now: datetime, *, is_sqlite: bool) -> None:
    """Write down that it happened now (again)."""
    insert = (sqlite.insert if is_sqlite else postgresql.insert)(notices)
    values = {"code": code, "at": now}
    await connection.execute(insert.values(values).on_conflict_do_update(index_elements=["code"], set_={"at": now}))


async def since(connection: AsyncConnection, moment: datetime) -> Mapping[str, datetime]:
    """Return what happened since a moment, and when it did so last."""
    query = select(notices).where(notices.c.at >= moment)
    return {row.code: row.at for row in await connection.execute(query)}
