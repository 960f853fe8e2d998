"""Takes jobs whose record is not kept yet: reads and checks the record, keeps it, and lets the steps begin."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

from consumer.events import RecordByPath, restore_built
from consumer.pipeline.progress import Advanced, Progress
from consumer.pipeline.reader import Read, RecordReader
from consumer.pipeline.signals import HANDOFF_LIMIT, Signals, wait
from consumer.pipeline.snapshot import Spool
from consumer.store import jobs
from consumer.store.connection import Connection, Database, DatabaseError
from consumer.store.rows import JobRow, JobState
from consumer.telemetry import get_logger

BATCH = 256
IDLE_SECONDS = 1.0
ROOT_RETRY_SECONDS = 5.0
FILE_RETRY_MAX_SECONDS = 30.0

_log = get_logger()

#: What went wrong with the folder of records, or with our own: no fault of a record.
_OF_ALL_RECORDS = frozenset({"root_missing", "spool_failed"})


@dataclass(slots=True)
class Health:
    """Why records cannot be read now, for readiness and ``status``; empty when they can."""

    problem: str = ""
    #: the kind of reading that failed
    kind: str = ""


class Keeper:
    """Has records read in batches.

    ``wait_seconds`` is how long a file may be missing, ``max_wait_seconds`` how long the whole root may.
    """

    def __init__(
        self,
        database: Database,
        progress: Progress,
        signals: Signals,
        reader: RecordReader,
        spool: Spool,
        *,
        wait_seconds: float,
        max_wait_seconds: float,
    ) -> None:
        self._database = database
        self._progress = progress
        self._reader = reader
        self.spool = spool
        self._wait = timedelta(seconds=wait_seconds)
        self._max_wait = timedelta(seconds=max_wait_seconds)
        self.health = Health()
        self._signals = signals
        #: what was read and waits for the engine to write it down
        self.ready: list[tuple[JobRow, Read]] = []
        self._taken = asyncio.Event()
        self._looked_at = 0.0
        self._batch: list[JobRow] = []

    async def run(self) -> None:
        """Keep records until cancelled."""
        self._reader.start()
        try:
            await self._keep_until_cancelled()
        finally:
            self._reader.close()

    async def _keep_until_cancelled(self) -> None:
        while True:
            self._signals.records.event.clear()
            try:
                found = await self.keep_once()
            except DatabaseError as error:
                _log.error("keeper_database_away", reason=str(error).splitlines()[0])
                await asyncio.sleep(IDLE_SECONDS)
                continue
            if not found:
                await wait(self._signals.records.event, IDLE_SECONDS)

    async def keep_once(self) -> int:
        """Read one batch and hand it to the engine; returns how many jobs were due."""
        batch = self._batch = await self._take()
        if not batch:
            return 0
        read = await self._reader.read([job.event for job in batch])
        self.ready = [*self.ready, *zip(batch, read, strict=True)]
        self._signals.steps.set()
        while len(self.ready) > BATCH:  # one batch ahead of the engine, no more
            self._taken.clear()
            await self._taken.wait()
        return len(batch)

    async def give_back(self) -> None:
        """At a stop: let the next process have what this one took and did not finish."""
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            waiting = self._signals.records.take(HANDOFF_LIMIT)
            unwritten = [job for job, _ in self.ready]
            await jobs.give_back(connection, [job.id for job in [*unwritten, *self._batch, *waiting]], now)

    def written(self, kept: Sequence[tuple[JobRow, Read]]) -> None:
        """Hear that the engine has committed what was read."""
        self.ready = self.ready[len(kept) :]
        self._taken.set()

    async def _take(self) -> list[JobRow]:
        """Take what intake has handed on; once a second, and when there is nothing, look into the database."""
        if time.monotonic() - self._looked_at < IDLE_SECONDS and (fresh := self._signals.records.take(BATCH)):
            return fresh
        self._looked_at = time.monotonic()
        stored = await self._take_stored()  # first: what it raises must not lose what waits in memory
        return self._signals.records.take(BATCH) + stored

    async def _take_stored(self) -> list[JobRow]:
        """Lease jobs that wait in the database: from before a crash, postponed, or too many for the memory."""
        async with self._database.read() as connection:
            if not await jobs.any_snapshot_due(connection, await self._database.now(connection)):
                return []
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            return await jobs.take_for_snapshot(connection, now, BATCH, lock=not self._database.is_sqlite)

    async def write_kept(
        self, connection: Connection, kept: Sequence[tuple[JobRow, Read]], now: datetime
    ) -> tuple[Advanced, dict[UUID, JobRow]]:
        """Write down what became of each record, and let the steps of those that were kept begin.

        Returns also the jobs whose steps may begin, so that nobody has to load them again.
        """
        known = [job for job, _ in kept]
        current = await jobs.current_states(connection, known, lock=not self._database.is_sqlite)
        opened = [(current[job.id], item) for job, item in kept if current[job.id].state is JobState.OPEN]
        advanced: list[JobRow] = []
        for job, item in opened:
            if item.kind == "kept":
                advanced.append(replace(job, record_sha256=item.sha256, record_name=item.name, facts=item.facts))
            else:
                await self._refuse(connection, job, item, now)
                advanced.append(replace(job, new_steps=()))  # they may have failed just now
        snapshots = [(job.id, item.sha256, item.name, item.facts) for job, item in opened if item.kind == "kept"]
        await jobs.keep_snapshots(connection, snapshots)
        self._report(opened)
        moved = await self._progress.advance_loaded(connection, advanced, now)
        return moved, {job.id: replace(job, new_steps=()) for job in advanced}

    async def _refuse(self, connection: Connection, job: JobRow, read: Read, now: datetime) -> None:
        """Write down why a record is not kept: for now, or for good."""
        if read.kind in _OF_ALL_RECORDS and now < job.snapshot_since + self._max_wait:
            await jobs.postpone_snapshot(
                connection, job.id, now + timedelta(seconds=ROOT_RETRY_SECONDS), counts=False
            )
            return
        if read.kind == "not_there_yet" and now < job.snapshot_since + self._wait:
            pause = min(FILE_RETRY_MAX_SECONDS, 0.5 * 2 ** min(job.snapshot_tries, 10))
            due_at = min(now + timedelta(seconds=pause), job.snapshot_since + self._wait)
            await jobs.postpone_snapshot(connection, job.id, due_at, counts=True)
            if job.snapshot_tries == 0:
                _log.warning("record_not_there_yet", session=job.session, reason=read.message)
            return
        await jobs.fail_all_steps(connection, job.id, read.code, read.message)

    def _report(self, results: Sequence[tuple[JobRow, Read]]) -> None:
        """Say when no record can be read, and when that is over."""
        found = next((read for _, read in results if read.kind in _OF_ALL_RECORDS), None)
        if found is not None:
            if found.message != self.health.problem:
                _log.error("records_unreadable", reason=found.message)
            self.health.problem, self.health.kind = found.message, found.kind
        elif self.health.problem and any(self._shows_end_of_problem(job, read) for job, read in results):
            _log.info("records_readable_again")
            self.health.problem = self.health.kind = ""

    def _shows_end_of_problem(self, job: JobRow, read: Read) -> bool:
        if read.kind != "kept":
            return False
        # a record inside its event says nothing of the folder of records
        return self.health.kind != "root_missing" or isinstance(restore_built(job.event).data.record, RecordByPath)
