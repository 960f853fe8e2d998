"""The real stages in virtual time, beside destinations of any make that answer at once.

``virtual.World`` has three servers whose requests stay open; here a test chooses what a destination is.
"""

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from pydantic import SecretStr

from consumer.config import Settings
from consumer.destinations.contract import Answer, ExportContext, ExportResult, Unsure
from consumer.destinations.registry import Lane, Registry
from consumer.errors import DestinationError
from consumer.pipeline.intake import arrive
from consumer.pipeline.reader import RecordReader
from consumer.pipeline.service import build_pipeline
from consumer.store.rows import AttemptEnd
from tests.integration.harness import STRUCTURED, built, inline
from tests.integration.virtual import (
    MAX_WAIT_SECONDS,
    SECONDS,
    START,
    TIMEOUT_SECONDS,
    Clock,
    NearReader,
    VirtualDatabase,
)
from tests.unit.builders import registered

LANE = Lane(
    concurrency=2, min_interval_seconds=0.0, timeout_seconds=TIMEOUT_SECONDS, settle_seconds=120.0, max_attempts=1000
)


class Destination:
    """Cannot be asked; raises ``errors`` in turn, then ``error`` while there is one; ``written`` has the rest."""

    enabled = True

    def __init__(
        self, name: str, *errors: DestinationError, priority: int = 100, links_to: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.priority = priority
        self.links_to = tuple(links_to)
        self.errors = list(errors)
        self.error: DestinationError | None = None
        self.calls: list[ExportContext] = []
        self.written: list[ExportContext] = []

    async def validate_config(self) -> tuple[bool, str | None]:
        """Find nothing wrong."""
        return True, None

    async def export(self, context: ExportContext) -> ExportResult:
        """Write a record down, or fail as the test wants."""
        self.calls.append(context)
        error = self.errors.pop(0) if self.errors else self.error
        if error is not None:
            raise error
        self.written.append(context)
        return self.result(context)

    def result(self, context: ExportContext) -> ExportResult:
        """Name the copy of a session."""
        session = context.session_identifier
        return ExportResult(
            success=True, destination_name=self.name, record_id=session, record_url=self.address(session)
        )

    def address(self, session: str = "one") -> str:
        """Return where the copy of a session is."""
        return f"https://{self.name}.test/{session}"


class AskableDestination(Destination):
    """Can be asked, and gives ``answer``."""

    answer: Answer = Unsure("a login page")

    async def verify(self, context: ExportContext) -> Answer:  # noqa: ARG002 - the signature of the contract
        """Give the answer of the test."""
        return self.answer


class Stages:
    """A consumer on the file ``test.db`` of a folder; a test takes one turn of a stage after the other."""

    def __init__(self, folder: Path, clock: Clock, destinations: Sequence[Any], lane: Lane = LANE) -> None:
        path = folder / "test.db"
        self.clock = clock
        self.database = VirtualDatabase(path, clock)
        known = {
            item.name: replace(registered(item), priority=item.priority, links_to=item.links_to, lane=lane)
            for item in destinations
        }
        settings = Settings(
            database_url=SecretStr(f"sqlite:///{path}"), spool_path=folder / "spool", export_max_wait=MAX_WAIT_SECONDS
        )
        self.pipeline = build_pipeline(settings, self.database, Registry(known, (), known))
        self.pipeline.keeper._reader = cast("RecordReader", NearReader())  # noqa: SLF001 - not another process
        self.engine = self.pipeline.engine
        self.file = sqlite3.connect(path, isolation_level=None)
        self.file.row_factory = sqlite3.Row

    async def close(self) -> None:
        """End everything; no attempt is under way."""
        for caller in self.engine.callers.values():
            caller.close()
        await self.database.close()
        self.file.close()

    async def deliver(self, number: int, text: str = "a", session: str = "one", **data: Any) -> None:
        """Let intake take a build and keep its record; a higher number is a newer build."""
        time = (START - timedelta(days=1) + timedelta(minutes=number)).isoformat()
        record = inline("a.xml", f"<{text}/>".encode())
        event = built(session, record, event_id=f"event-{number}", time=time, **data)
        await self.pipeline.intake.accept([arrive(json.dumps(event).encode(), STRUCTURED, {}, redelivered=False)])
        self.pipeline.keeper._looked_at = 0.0  # noqa: SLF001 - else real time decides what it looks at
        await self.pipeline.keeper.keep_once()

    async def attempt(self) -> int:
        """Claim what is due (T2) and let each attempt come to its end, which is not written yet; returns how many."""
        claims = await self.engine._claim()  # noqa: SLF001 - the body of the engine's loop, once
        async with asyncio.timeout(SECONDS):
            for claim in claims:
                self.engine.lanes[claim.step.destination].begin()
            await asyncio.gather(*(self.engine._run_step(claim) for claim in claims))  # noqa: SLF001
        return len(claims)

    async def write(self) -> None:
        """Write what has ended as one batch (T4)."""
        results: asyncio.Queue[AttemptEnd] = self.engine._results  # noqa: SLF001 - the body of its writer, once
        if not results.empty():
            assert await self.engine._try_write([results.get_nowait()])  # noqa: SLF001

    async def turn(self) -> int:
        """Let what is due be attempted and written; returns how many attempts there were."""
        count = await self.attempt()
        await self.write()
        return count

    async def turns(self, count: int, apart_seconds: float = 0.0) -> int:
        """Take turns, housekeeping before each; returns how many attempts there were."""
        attempts = 0
        for _ in range(count):
            await self.pipeline.housekeeping.tick()
            attempts += await self.turn()
            self.advance(apart_seconds)
        return attempts

    def advance(self, seconds: float) -> None:
        """Let time pass; less than none sets the clock back."""
        self.clock.now += timedelta(seconds=seconds)

    def column(self, query: str, *values: Any) -> list[Any]:
        """Ask the file itself for one column."""
        return [row[0] for row in self.file.execute(query, values)]
