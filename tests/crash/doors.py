"""Points at the doors to the database and the broker; a plugin sets its own at HTTP."""

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer import main
from consumer.broker import Broker, Delivery
from consumer.store import jobs
from consumer.store.connection import Database
from tests.crash import files, points

#: Only for a database with leases: how long a dead consumer's work waits.
LEASE_MARGIN = "NX_LEASE_MARGIN_SECONDS"

_Write = Callable[[Database], AbstractAsyncContextManager[AsyncConnection]]
_CHANGED = "crash-changed"
_READS = ("SELECT", "PRAGMA", "BEGIN")


def watch() -> None:
    """Set every point and shorten the leases, if wished."""
    margin = os.environ.get(LEASE_MARGIN)
    if margin:
        jobs.SNAPSHOT_LEASE_SECONDS = int(float(margin)) + 1
    files.watch_files()
    files.watch_reader()
    event.listen(Engine, "before_cursor_execute", _note_change)
    setattr(Database, "write", _watched_write(Database.write))  # noqa: B010 - for mypy, as below
    setattr(Delivery, "ack", _watched_ack(Delivery.ack))  # noqa: B010
    setattr(Broker, "publish", _watched_publish(Broker.publish))  # noqa: B010


def run() -> None:
    """Run the command line as it is."""
    watch()
    main.cli()


def _note_change(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
    if not statement.lstrip().upper().startswith(_READS):
        connection.info[_CHANGED] = True


def _watched_write(write: _Write) -> _Write:
    @asynccontextmanager
    async def within(database: Database, name: str) -> AsyncIterator[AsyncConnection]:
        async with write(database) as connection:
            memory = connection.sync_connection.info if connection.sync_connection else {}
            memory.pop(_CHANGED, None)
            yield connection
            changed = memory.pop(_CHANGED, False)  # a commit of nothing is no effect
            if changed:
                points.reach(f"write:{name}:before-commit")
        if changed:
            points.reach(f"write:{name}:after-commit")

    def watched(database: Database) -> AbstractAsyncContextManager[AsyncConnection]:
        return within(database, points.caller(sys._getframe(1)) or "?")  # noqa: SLF001 - see files

    return watched


def _watched_ack(ack: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def watched(delivery: Delivery, *, all_before: bool = False) -> None:
        points.reach("ack:before")
        await ack(delivery, all_before=all_before)
        points.reach("ack:after")

    return watched


def _watched_publish(publish: Callable[..., Awaitable[bool]]) -> Callable[..., Awaitable[bool]]:
    async def watched(broker: Broker, **message: Any) -> bool:
        points.reach(f"publish:{message['kind']}:before")
        routed = await publish(broker, **message)
        points.reach(f"publish:{message['kind']}:after-confirm")
        return routed

    return watched
