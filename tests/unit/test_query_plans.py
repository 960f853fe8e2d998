"""The queries that run again and again use an index, so they stay quick beside a million finished records."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store import jobs, outbox, rechecks, recovery, schema, steps
from consumer.store.connection import Database
from consumer.store.steps import Wanted

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
Query = Callable[[AsyncConnection], Awaitable[Any]]

QUERIES: dict[str, Query] = {
    "due_steps": lambda c: steps.due_steps(c, Wanted("cdcs", 8, 60), NOW, lock=False),
    "abandoned_steps": lambda c: recovery.abandoned_steps(c, NOW, everything=True),
    "waited_too_long": lambda c: recovery.waited_too_long(c, NOW),
    "any_snapshot_due": lambda c: jobs.any_snapshot_due(c, NOW),
    "due_decisions": lambda c: jobs.due_decisions(c, NOW, 10),
    "known_digests": lambda c: jobs.known_digests(c, [uuid4()]),
    "newest_builds": lambda c: jobs.newest_builds(c, ["session"]),
    "superseded_jobs": lambda c: jobs.superseded_jobs(c, [uuid4()]),
    "sent_hashes": lambda c: jobs.sent_hashes(c, "session"),
    "unsent": lambda c: outbox.unsent(c, NOW, 10),
    "has_letter": lambda c: outbox.has_letter(c, "0" * 64),
    "rechecks": lambda c: rechecks.due(c, NOW, 10, ["cdcs"]),
}


@pytest.mark.parametrize("name", QUERIES)
async def test_query_uses_an_index(name: str, tmp_path: Path) -> None:
    seen: list[tuple[str, Any]] = []

    def collect(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        seen.append((statement, parameters))

    async with Database(f"sqlite+aiosqlite:///{tmp_path / 'plans.db'}") as database:
        await schema.upgrade(database)
        event.listen(Engine, "before_cursor_execute", collect)
        try:
            async with database.write() as connection:
                await QUERIES[name](connection)
        finally:
            event.remove(Engine, "before_cursor_execute", collect)
        selects = [item for item in seen if item[0].lstrip().startswith("SELECT")]
        assert selects
        async with database.read() as connection:
            for statement, parameters in selects:
                plan = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                details = [str(row.detail) for row in plan]
                scans = [detail for detail in details if detail.startswith("SCAN") and "USING" not in detail]
                assert not scans, statement
