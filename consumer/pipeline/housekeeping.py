"""What only time brings: abandoned steps, probes of paused lanes, patience that ended, waits that are too long."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from uuid import UUID

from consumer.destinations.registry import Registry
from consumer.pipeline.attempt import Caller
from consumer.pipeline.progress import Progress
from consumer.pipeline.retry import next_probe
from consumer.pipeline.signals import Signals
from consumer.store import consumers, jobs, lanes, notices, recovery
from consumer.store.connection import Connection, Database, DatabaseError
from consumer.store.notices import WORK_QUEUE_GONE
from consumer.store.rows import LaneChange, LaneRow, LaneState
from consumer.telemetry import get_logger

TICK_SECONDS = 1.0
HEARTBEAT_SECONDS = 5.0
CHECK_SECONDS = 2.0
DECISIONS = 500
#: Longer than any transaction that may have overlooked a change of a lane.
JUST_NOW = timedelta(seconds=5)

_log = get_logger()


class Housekeeping:
    """Looks once a second for work that no event announces."""

    def __init__(
        self,
        database: Database,
        registry: Registry,
        progress: Progress,
        signals: Signals,
        callers: Mapping[str, Caller],
        *,
        owner: str,
        max_wait_seconds: float,
    ) -> None:
        self._database = database
        self._registry = registry
        self._progress = progress
        self._callers = callers
        self._owner = owner
        self._max_wait = timedelta(seconds=max_wait_seconds)
        self._beat_at: datetime | None = None
        #: asked for each sign of life; without a broker (``export``) nothing is reported as missing
        self.is_connected: Callable[[], bool] = lambda: True
        self._told_connected: bool | None = None
        #: asked for each sign of life: how often the work queue was found missing
        self.work_queue_losses: Callable[[], int] = lambda: 0
        self._told_losses = 0
        self._checks: set[asyncio.Task[None]] = set()
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._signals = signals

    async def recover(self) -> int:
        """At start: turn every step that a dead engine left running into one whose outcome is unknown."""
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            found = await self._abandon(connection, now, everything=self._database.is_sqlite)
            if self._database.is_sqlite:
                await jobs.release_snapshots(connection, now)
                await recovery.release_look_ups(connection, now)
        if found:
            _log.warning("steps_recovered", count=found)
        return found

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.tick()
            except DatabaseError as error:
                _log.error("housekeeping_database_away", reason=str(error).splitlines()[0])
            await asyncio.sleep(TICK_SECONDS)

    async def tick(self) -> None:
        """Do what is due now; writes only when something is."""
        async with self._database.read() as connection:
            now = await self._database.now(connection)
            decisions = await jobs.due_decisions(connection, now, DECISIONS)
            states = await lanes.load(connection)
            late = await recovery.waited_too_long(connection, now - self._max_wait)
        if decisions or late:
            await self._decide(decisions, late)
        for lane in states.values():
            if lane.state is LaneState.PAUSED and lane.probe_at is not None and lane.probe_at <= now:
                self._begin_probe(lane)
        if not self._database.is_sqlite:
            async with self._database.write() as connection:
                # a job that another process decided about while a lane changed did not see the change
                if any(lane.since and now - lane.since < JUST_NOW for lane in states.values()):
                    await jobs.decide_waiting_jobs(connection, now)
                await self._abandon(connection, await self._database.now(connection), everything=False)
        await self._heartbeat(now)
        self._signals.steps.set()

    async def check_destinations(self) -> None:
        """At start: ask every destination once, let mended lanes go on, and log what cannot work."""
        async with self._database.read() as connection:
            states = await lanes.load(connection)
        tasks = {asyncio.create_task(self._check(name, states.get(name))) for name in self._callers}
        if tasks:
            # a server that hangs must not delay the start: the check goes on beside it
            await asyncio.wait(tasks, timeout=CHECK_SECONDS)
        self._checks = tasks

    async def _check(self, name: str, lane: LaneRow | None) -> None:
        if lane is not None and lane.state is LaneState.PAUSED and lane.probe_at is not None:
            await self._probe(lane)
            return
        problem = await self._callers[name].validate()
        if problem:
            _log.warning("destination_not_ready", destination=name, reason=problem)

    async def _heartbeat(self, now: datetime) -> None:
        due = self._beat_at is None or now - self._beat_at >= timedelta(seconds=HEARTBEAT_SECONDS)
        connected = self.is_connected()
        if due or self._told_connected is not connected:
            self._told_connected = connected
            losses = self.work_queue_losses()
            async with self._database.write() as connection:
                await consumers.beat(
                    connection, self._owner, now, connected=connected,
                    is_sqlite=self._database.is_sqlite,
                )  # fmt: skip
                if losses != self._told_losses:
                    await notices.note(connection, WORK_QUEUE_GONE, now, is_sqlite=self._database.is_sqlite)
            self._beat_at, self._told_losses = now, losses

    async def _decide(self, decisions: list[UUID], late: list[tuple[UUID, str]]) -> None:
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            await recovery.give_up(connection, late)
            await jobs.decide_later(connection, [(job, None) for job in decisions])
            moved = await self._progress.advance(connection, {*decisions, *(job for job, _ in late)}, now)
        self._progress.announce(moved)

    def _begin_probe(self, lane: LaneRow) -> None:
        """Probe beside everything else: a server that hangs must not stop the housekeeping."""
        if lane.destination not in self._probes:
            task = asyncio.create_task(self._probe(lane))
            self._probes[lane.destination] = task
            task.add_done_callback(lambda _: self._probes.pop(lane.destination, None))

    async def _probe(self, lane: LaneRow) -> None:
        """Ask a paused destination again, so that a mended token needs no command."""
        caller = self._callers.get(lane.destination)
        if caller is None:
            return
        problem = await caller.validate()
        with suppress(*DatabaseError):  # it is probed again
            await self._write_probe(lane, problem)

    async def _write_probe(self, lane: LaneRow, problem: str | None) -> None:
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            if problem is None:
                change = LaneChange(lane.destination, LaneState.ACTIVE)
                _log.info("lane_resumed", destination=lane.destination)
            else:
                probe_at = next_probe(lane.since or now, now)
                change = LaneChange(lane.destination, LaneState.PAUSED, problem, None, probe_at)
            await lanes.change(connection, [change], now, is_sqlite=self._database.is_sqlite)

    async def _abandon(self, connection: Connection, now: datetime, *, everything: bool) -> int:
        found = await recovery.abandoned_steps(connection, now, everything=everything)
        for job, destination in found:
            known = self._registry.known.get(destination)
            await recovery.abandon(
                connection, job, destination, now,
                can_verify=known.can_verify if known else False, dead=everything,
            )  # fmt: skip
        if found:
            await self._progress.advance(connection, {job for job, _ in found}, now)
        return len(found)
