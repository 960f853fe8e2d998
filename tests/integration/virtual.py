"""A consumer in virtual time, beside servers that do whatever a test says; nothing here waits for a real clock.

The stages are the real ones on a real SQLite file. Their loops do not run: a test takes one turn after the other.
"""

import asyncio
import random
import shutil
import sqlite3
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import SecretStr
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.config import Settings
from consumer.destinations.contract import Absent, Answer, ExportContext, ExportResult, Partial, Present, Unsure
from consumer.destinations.registry import Registry
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome
from consumer.events import RecordInline, restore_built
from consumer.pipeline.intake import Accepted, arrive
from consumer.pipeline.reader import Read, RecordReader
from consumer.pipeline.service import Pipeline, build_pipeline
from consumer.store import schema
from consumer.store.connection import Database
from tests.integration.harness import STRUCTURED
from tests.unit.builders import registered

T = TypeVar("T")

START = datetime(2026, 1, 2, tzinfo=UTC)
#: H: a server may commit so long after the client is gone.
SETTLE_SECONDS = 120.0
TIMEOUT_SECONDS = 60.0
MAX_WAIT_SECONDS = 6 * 3600.0
#: Real time after which a turn hangs.
SECONDS = 20.0


class Clock:
    """The only clock."""

    def __init__(self) -> None:
        self.now = START


class VirtualDatabase(Database):
    """An SQLite file whose time is virtual; a power cut is no part of these tests, so nothing is synced."""

    def __init__(self, path: Path, clock: Clock) -> None:
        super().__init__(f"sqlite+aiosqlite:///{path}")
        self._virtual = clock
        for engine in (self._writer, self._reader):
            event.listen(engine.sync_engine, "connect", lambda connection, _: _do_not_sync(connection))

    async def now(self, connection: AsyncConnection) -> datetime:  # noqa: ARG002 - the signature of the real one
        """Return the virtual time."""
        return self._virtual.now

    def clock(self) -> datetime:
        """Return the virtual time."""
        return self._virtual.now


def _do_not_sync(connection: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=OFF")
    cursor.close()


# --- servers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """How a server ends a request.

    ``effect`` says when an export whose outcome is unknown is committed, as a share of H: None is never, 0 before
    the client is gone. ``kind`` of an export: success, refused, transient, permanent, misconfigured or unknown; of a
    look-up: truth, early (what was true when it was asked), unsure, transient, unknown or misconfigured.
    """

    kind: str
    effect: float | None = None
    retry_after: float | None = None


HEALTHY_EXPORT, HEALTHY_LOOK_UP = Reply("success"), Reply("truth")


@dataclass(eq=False, slots=True)
class Copy:
    """A live copy at a server."""

    id: str
    key: str
    content: str


@dataclass(eq=False, slots=True)
class Request:
    """A request that waits for its reply; without a ``target`` an export makes a new copy."""

    key: str
    content: str
    target: str | None
    sent_at: datetime
    looks_up: bool
    early: Answer
    answer: "asyncio.Future[Any]"


class Remote:
    """A server without idempotency keys that cannot be asked: each create that it commits is one more copy."""

    enabled = True

    def __init__(self, name: str, priority: int, clock: Clock) -> None:
        self.name = name
        self.priority = priority
        self.copies: list[Copy] = []
        self.requests: list[Request] = []
        self.valid = True
        self.arrived: asyncio.Event | None = None
        self._clock = clock
        self._late: list[tuple[datetime, Request]] = []

    async def validate_config(self) -> tuple[bool, str | None]:
        """Say whether the token holds."""
        return self.valid, None if self.valid else "the token ran out"

    async def export(self, context: ExportContext) -> ExportResult:
        """Wait for the reply that the test gives."""
        return cast("ExportResult", await self._ask(context, looks_up=False))

    async def _ask(self, context: ExportContext, *, looks_up: bool) -> Any:
        last = context.last_export
        target = last.record_id if last else context.remembered.get("record_id")
        early = self.truth(context.record_key, context.record_sha256, target)
        future = asyncio.get_running_loop().create_future()
        request = Request(
            context.record_key, context.record_sha256, target, self._clock.now, looks_up, early, future
        )  # fmt: skip
        self.requests.append(request)
        if self.arrived is not None:
            self.arrived.set()
        return await future

    def reply(self, request: Request, reply: Reply) -> None:
        """End a request as the test wants."""
        self.requests.remove(request)
        made = self._looked_up(request, reply) if request.looks_up else self._exported(request, reply)
        if isinstance(made, Exception):
            request.answer.set_exception(made)
        else:
            request.answer.set_result(made)

    def lose(self, request: Request, effect: float | None) -> None:
        """Let the client of a request be gone."""
        if request in self.requests:
            self.requests.remove(request)
        if request.looks_up or effect is None:
            return
        if effect == 0:
            self.commit(request)
        else:
            self._late.append((self._clock.now + timedelta(seconds=effect * SETTLE_SECONDS), request))

    def commit(self, request: Request) -> str:
        """Make the copy, or bring it up to date; returns its id."""
        for copy in self.copies:
            if copy.id == request.target:
                copy.content = request.content
                return copy.id
        made = Copy(f"{self.name}-{len(self.copies) + 1}", request.key, request.content)
        self.copies.append(made)
        return made.id

    def commit_late_ones(self) -> None:
        """Commit what is due by now of requests that were given up."""
        due = sorted((item for item in self._late if item[0] <= self._clock.now), key=lambda item: item[0])
        self._late = [item for item in self._late if item[0] > self._clock.now]
        for _, request in due:
            self.commit(request)

    @property
    def next_late(self) -> datetime | None:
        """Return when the next late commit comes."""
        return min((moment for moment, _ in self._late), default=None)

    def truth(self, key: str, content: str, target: str | None) -> Answer:
        """Say what is there."""
        self.commit_late_ones()
        live = [copy for copy in self.copies if copy.key == key]
        whole = [copy.id for copy in live if copy.content == content]
        ids = [copy.id for copy in live]
        if not live:
            return Absent()
        if not whole:
            return Partial(target if target in ids else ids[0])
        ours = target if target in whole else whole[0]
        return Present(ours, None, tuple(found for found in ids if found != ours))

    def _exported(self, request: Request, reply: Reply) -> ExportResult | DestinationError:
        match reply.kind:
            case "success":
                record_id = self.commit(request)
                return ExportResult(True, self.name, record_id, timestamp=self._clock.now)  # noqa: FBT003
            case "refused":
                return ExportResult(False, self.name, error_message="no", timestamp=self._clock.now)  # noqa: FBT003
            case "unknown":
                self.lose(request, reply.effect)
                return UnknownOutcome("the answer was lost", retry_after=reply.retry_after)
        return self._refused(reply)

    def _looked_up(self, request: Request, reply: Reply) -> Answer | DestinationError:
        match reply.kind:
            case "truth":
                return self.truth(request.key, request.content, request.target)
            case "early":
                return request.early
            case "unsure":
                return Unsure("a login page")
            case "unknown":
                return UnknownOutcome("the answer was lost", retry_after=reply.retry_after)
        return self._refused(reply)

    def _refused(self, reply: Reply) -> DestinationError:
        if reply.kind == "transient":
            return Transient("busy", retry_after=reply.retry_after)
        if reply.kind == "misconfigured":
            self.valid = False
            return Misconfigured("the token ran out")
        return Permanent("never")


class AskableRemote(Remote):
    """A server that can be asked what it has; it answers the last look-up at once, as ``recheck`` says."""

    recheck = HEALTHY_LOOK_UP

    async def verify(self, context: ExportContext) -> Answer:
        """Wait for the reply that the test gives."""
        if context.purpose == "recheck":
            if self.recheck.kind == "unsure":
                return Unsure("a login page")
            last = context.last_export
            return self.truth(context.record_key, context.record_sha256, last.record_id if last else None)
        return cast("Answer", await self._ask(context, looks_up=True))


# --- records -----------------------------------------------------------------------------------------------------


class NearReader:
    """Stands in for the process that reads records: no remote here opens the file, only the verdict counts.

    A record named ``refused`` breaks a rule, one named ``late`` is there when it is asked for the second time.
    """

    def __init__(self) -> None:
        self._asked: set[str] = set()

    async def read(self, events: Sequence[str]) -> list[Read]:
        """Say what becomes of each record."""
        return [self._one(text) for text in events]

    def _one(self, text: str) -> Read:
        found = restore_built(text)
        record = found.data.record
        assert isinstance(record, RecordInline)
        if record.name == "refused.xml":
            return Read("refused", "record_malformed", "it is no record")
        if record.name == "late.xml" and found.id not in self._asked:
            self._asked.add(found.id)
            return Read("not_there_yet", "record_missing", "no such file")
        return Read("kept", "", "", record.sha256, record.name)


# --- the consumer ------------------------------------------------------------------------------------------------


@dataclass
class World:
    """One consumer after the other on one file; ``template`` is an SQLite file with all tables."""

    folder: Path
    template: Path
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.path = self.folder / "test.db"
        shutil.copy(self.template, self.path)
        self.remotes: dict[str, Remote] = {}
        for kind, name, priority in (
            (AskableRemote, "alpha", 100), (AskableRemote, "beta", 90), (Remote, "gamma", 10),
        ):  # fmt: skip
            self.remotes[name] = kind(name, priority, self.clock)
        self._reader = NearReader()
        self._loop = asyncio.Runner()
        self._file = sqlite3.connect(self.path, isolation_level=None)
        self._file.row_factory = sqlite3.Row
        self._moved = asyncio.Event()
        for remote in self.remotes.values():
            remote.arrived = self._moved
        self._run(self._start())

    def close(self) -> None:
        """End everything."""
        self._run(self._end(orderly=False, effects=[None]))
        self._loop.close()
        self._file.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(SECONDS):
                return await work

        return self._loop.run(bounded())

    async def _start(self) -> None:
        known = {
            name: replace(
                registered(remote, timeout_seconds=TIMEOUT_SECONDS, settle_seconds=SETTLE_SECONDS),
                priority=remote.priority,
            )
            for name, remote in self.remotes.items()
        }
        settings = Settings(
            database_url=SecretStr(f"sqlite:///{self.path}"), spool_path=self.folder / "spool",
            retry_max_seconds=1800, export_max_wait=MAX_WAIT_SECONDS,
        )  # fmt: skip
        database = VirtualDatabase(self.path, self.clock)
        self.pipeline: Pipeline = build_pipeline(settings, database, Registry(known, (), known))
        # neither another process nor chance, so that a failure can be run again
        self.pipeline.keeper._reader = cast("RecordReader", self._reader)  # noqa: SLF001
        self.pipeline.engine._endings._draw = random.Random(0)  # noqa: S311, SLF001
        await self.pipeline.housekeeping.recover()
        await self.pipeline.housekeeping.check_destinations()

    async def _end(self, *, orderly: bool, effects: Sequence[float | None]) -> None:
        engine = self.pipeline.engine
        chosen = cycle(effects)
        for remote, request in self.open_requests():
            remote.lose(request, next(chosen))
        tasks = list(engine._running)  # noqa: SLF001 - what `stop` does, without its real grace
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if orderly:
            await self._write_results()
            await self.pipeline.keeper.give_back()
        for caller in engine.callers.values():
            caller.close()
        await self.pipeline.database.close()

    # --- one turn of each stage --------------------------------------------------------------------------------

    def restart(self, *, orderly: bool, effects: Sequence[float | None], down_seconds: float) -> None:
        """End the consumer in the middle of everything; another one starts on the same file.

        ``effects``: what becomes of the open requests, in turn. An orderly end writes the cut attempts down.
        """
        self._run(self._end(orderly=orderly, effects=effects))
        self._pass(down_seconds)
        self._run(self._start())

    def deliver(self, *bodies: bytes, headers: Mapping[str, str] | None = None, again: bool = False) -> Accepted:
        """Let intake take a batch (T1)."""
        batch = [arrive(body, STRUCTURED, dict(headers or {}), redelivered=again) for body in bodies]
        return self._run(self.pipeline.intake.accept(batch))

    def keep(self) -> None:
        """Have records read; the engine's next turn writes it down."""
        self._run(self._keep())

    async def _keep(self) -> None:
        self.pipeline.keeper._looked_at = 0.0  # noqa: SLF001 - else real time decides what it looks at
        await self.pipeline.keeper.keep_once()

    def turn(self) -> int:
        """Claim what is due (T2) and start it; every attempt then waits at its remote. Returns how many."""
        return self._run(self._turn())

    async def _turn(self) -> int:
        engine = self.pipeline.engine
        # the body of the engine's loop, once
        claims = await engine._claim()  # noqa: SLF001
        for claim in claims:
            task = asyncio.create_task(engine._run_step(claim))  # noqa: SLF001
            engine._running[task] = claim  # noqa: SLF001
            task.add_done_callback(engine._finished)  # noqa: SLF001
            task.add_done_callback(lambda _: self._moved.set())
        await self._until_all_wait()
        return len(claims)

    async def _until_all_wait(self) -> None:
        """Return when each running attempt waits at a remote, and what has ended is written (T4)."""
        while self.pipeline.engine.busy > len(self.open_requests()):
            self._moved.clear()
            await self._moved.wait()
        await self._write_results()

    async def _write_results(self) -> None:
        engine = self.pipeline.engine
        results = engine._results  # noqa: SLF001 - the body of its writer, once
        if not results.empty():
            assert await engine._try_write([results.get_nowait()])  # noqa: SLF001

    def open_requests(self) -> list[tuple[Remote, Request]]:
        """Return what the remotes have not answered."""
        return [(remote, request) for remote in self.remotes.values() for request in remote.requests]

    def answer(self, remote: Remote, request: Request, reply: Reply) -> None:
        """Let a remote answer; the result is written."""
        remote.reply(request, reply)
        self._run(self._until_all_wait())

    def tick(self) -> None:
        """Let housekeeping look once; probes that it begins come to their end."""
        self._run(self._tick())

    async def _tick(self) -> None:
        housekeeping = self.pipeline.housekeeping
        await housekeeping.tick()
        await asyncio.gather(*housekeeping._probes.values())  # noqa: SLF001 - they run beside it

    def recheck(self) -> int:
        """Let one batch of last look-ups run."""
        return self._run(self.pipeline.rechecks.run_once())

    # --- time --------------------------------------------------------------------------------------------------

    def advance(self, seconds: float, effect: float | None = None) -> None:
        """Let time pass; requests that reach their time limit are given up then, with the given effect."""
        until = self.clock.now + timedelta(seconds=seconds)
        limit = timedelta(seconds=TIMEOUT_SECONDS)
        while True:
            late = [(request.sent_at + limit, remote, request) for remote, request in self.open_requests()]
            late = [item for item in late if item[0] <= until]
            if not late:
                break
            moment, remote, request = min(late, key=lambda item: item[0])
            self._pass_to(moment)
            self.answer(remote, request, Reply("unknown", effect))
        self._pass_to(until)

    def _pass(self, seconds: float) -> None:
        self._pass_to(self.clock.now + timedelta(seconds=seconds))

    def _pass_to(self, moment: datetime) -> None:
        self.clock.now = max(moment, self.clock.now)
        for remote in self.remotes.values():
            remote.commit_late_ones()

    def next_due(self) -> datetime | None:
        """Return the next moment at which something is to be done."""
        moments: list[datetime | None] = [remote.next_late for remote in self.remotes.values()]
        moments += [datetime.fromisoformat(row["at"]) for row in self.rows(_DUE)]
        return min((moment for moment in moments if moment and moment > self.clock.now), default=None)

    # --- what is stored ----------------------------------------------------------------------------------------

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Ask the file itself, as another process would."""
        return list(self._file.execute(query, values))


_DUE = """
    SELECT next_attempt_at AS at FROM steps WHERE next_attempt_at IS NOT NULL UNION ALL
    SELECT decide_at FROM jobs WHERE decide_at IS NOT NULL UNION ALL
    SELECT snapshot_due_at FROM jobs WHERE snapshot_due_at IS NOT NULL UNION ALL
    SELECT not_before FROM lanes WHERE not_before IS NOT NULL UNION ALL
    SELECT probe_at FROM lanes WHERE probe_at IS NOT NULL UNION ALL
    SELECT recheck_at FROM copies WHERE recheck_at IS NOT NULL
"""


def make_template(path: Path) -> None:
    """Make an SQLite file with all tables; to copy it is quicker than to migrate each time."""

    async def make() -> None:
        async with Database(f"sqlite+aiosqlite:///{path}") as database:
            await schema.upgrade(database)

    asyncio.run(make())
