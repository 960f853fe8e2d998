"""The guarantees by the shortest way through the real parts: SQLite, no broker, destinations in this process.

`make mutants` takes each guarantee out of the code and expects that its test notices.
"""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import aiormq
import pytest
from aio_pika.abc import AbstractChannel
from pamqp.commands import Basic
from pydantic import SecretStr

from consumer.broker import DEAD_QUEUE, WORK_QUEUE, Broker, BrokerAwayError, Delivery, declare_topology
from consumer.config import Settings
from consumer.destinations.contract import Absent, Answer, ExportContext, ExportResult, Present
from consumer.destinations.registry import Registry
from consumer.errors import Misconfigured, Transient, UnknownOutcome
from consumer.pipeline.intake import Accepted, Arrived, arrive
from consumer.pipeline.outbox import OutboxRelay
from consumer.pipeline.service import Pipeline, build_pipeline, export_one
from consumer.pipeline.signals import Signals
from consumer.store import jobs, outbox, schema
from consumer.store.connection import Database, DatabaseLockedError
from consumer.store.rows import JobRow, JobState, Message, StepRow, StepState
from tests.integration.harness import STRUCTURED, built, inline, job_of, small
from tests.unit.builders import registered

SECONDS = 30.0
#: So long nothing may happen before a test believes that nothing will.
QUIET_SECONDS = 1.5
OLD, NEW = "2026-01-01T10:00:00Z", "2026-01-01T11:00:00Z"
MODES = ("journal_mode", "synchronous")
SENT = Message("outcome", "id-1", "exchange", "key", b"body")


class Remote:
    """A server without idempotency keys: each create that it commits is one more copy. Tests change ``act``."""

    name = "remote"
    priority = 100
    enabled = True

    def __init__(self) -> None:
        self.copies: list[str] = []
        self.started = asyncio.Event()
        self.valid: tuple[bool, str | None] = (True, None)
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None

    def validate_config(self) -> tuple[bool, str | None]:
        """Say what the test wants."""
        return self.valid

    async def export(self, context: ExportContext) -> ExportResult:
        """Commit one more copy, then answer, or raise, as the test wants."""
        self.copies.append(context.session_identifier)
        self.started.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return ExportResult(success=True, destination_name=self.name, record_id=str(len(self.copies)))

    async def verify(self, context: ExportContext) -> Answer:
        """Tell whether a copy of the session is there."""
        ids = [str(number) for number, name in enumerate(self.copies, 1) if name == context.session_identifier]
        return Present(ids[0], None, tuple(ids[1:])) if ids else Absent()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    """Give an SQLite file with all tables."""
    async with Database(f"sqlite+aiosqlite:///{tmp_path}/test.db") as found:
        await schema.upgrade(found)
        yield found


@pytest.fixture
def remote() -> Remote:
    """Give a destination."""
    return Remote()


@pytest.fixture
def pipeline(database: Database, remote: Remote, tmp_path: Path) -> Pipeline:
    """Give all stages with one destination that takes one record at a time."""
    known = {remote.name: registered(remote, concurrency=1, timeout_seconds=20.0, settle_seconds=0.0)}
    settings = Settings(
        database_url=SecretStr(f"sqlite:///{database.path}"), spool_path=tmp_path / "spool", retry_base_seconds=0.1
    )
    return build_pipeline(settings, database, Registry(known, (), known))


@asynccontextmanager
async def at_work(pipeline: Pipeline) -> AsyncIterator[None]:
    """Let the stages between the queues run."""
    tasks = [asyncio.create_task(part.run()) for part in (pipeline.keeper, pipeline.housekeeping)]
    engine = asyncio.create_task(pipeline.engine.run())
    try:
        yield
    finally:
        await end(*tasks)
        await pipeline.engine.stop(1)
        await engine


async def end(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def body(event_id: str, session: str = "session", **more: Any) -> bytes:
    """Write an event with its record inside."""
    record = inline("a.xml", small(1).content)
    return json.dumps(built(session, record, event_id=event_id, **more)).encode()


def event(event_id: str, session: str = "session", **more: Any) -> Arrived:
    """Return such an event as it arrived."""
    return arrive(body(event_id, session, **more), STRUCTURED, {}, redelivered=False)


async def take_in(pipeline: Pipeline, *arrived: Arrived) -> Accepted:
    """Accept events as one batch (T1)."""
    return await pipeline.intake.accept(arrived)


async def job(database: Database, event_id: str) -> JobRow:
    async with database.read() as connection:
        return (await jobs.load_jobs(connection, [job_of(event_id)]))[job_of(event_id)]


async def step(database: Database, event_id: str) -> StepRow:
    async with database.read() as connection:
        (found,) = (await jobs.load_steps(connection, [job_of(event_id)]))[job_of(event_id)]
    return found


async def until(is_so: Callable[[], Any]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(SECONDS):
        while not is_so():  # noqa: ASYNC110 - what is watched gives no event
            await asyncio.sleep(0.01)


def stored(database: Database, query: str) -> list[Any]:
    """Ask the file itself, as another process would."""
    with closing(sqlite3.connect(database.path)) as connection:
        return [row[0] for row in connection.execute(query)]


# --- exactly once ----------------------------------------------------------------------------------------------


async def test_after_an_unknown_outcome_it_asks_before_it_creates_again(pipeline: Pipeline, remote: Remote) -> None:
    remote.error = UnknownOutcome("the answer was lost")
    async with asyncio.timeout(SECONDS):
        _, ended, (found,) = await export_one(pipeline, event("event"))
    assert remote.copies == ["session"], "the copy of the first request is found and not made again"
    assert (ended.state, found.state) == (JobState.EXPORTED, StepState.DONE)
    assert (found.result or {})["record_id"] == "1"


async def test_a_copy_that_the_server_commits_late_is_reported(pipeline: Pipeline, remote: Remote) -> None:
    remote.error = UnknownOutcome("the answer was lost")
    async with asyncio.timeout(SECONDS):
        await export_one(pipeline, event("event"))
    remote.copies.append("session")  # a request that had been given up
    assert await pipeline.rechecks.run_once() == 1
    reported = "SELECT error_message FROM upload_log WHERE error_code = 'surplus_copy'"
    assert stored(pipeline.database, reported) == [
        "besides 1 there are copies of ours that the server committed late: 2"
    ]


async def test_a_request_may_leave_until_its_lease_ends(pipeline: Pipeline, remote: Remote) -> None:
    """A process that takes over counts the settle time from there: the old one may only be asleep."""
    remote.gate = asyncio.Event()
    await take_in(pipeline, event("event"))
    async with at_work(pipeline):
        async with asyncio.timeout(SECONDS):
            await remote.started.wait()
        running = await step(pipeline.database, "event")
        remote.gate.set()
    assert running.state is StepState.RUNNING
    assert running.last_request_at is not None
    assert running.last_request_at > datetime.now(UTC) + timedelta(seconds=20)


async def test_a_sqlite_file_takes_one_engine(database: Database) -> None:
    database.lock_for_engine()
    async with Database(str(database.url)) as other:
        with pytest.raises(DatabaseLockedError, match="another engine"):
            other.lock_for_engine()
        await database.close()
        other.lock_for_engine()


async def test_a_commit_is_on_the_disk(database: Database) -> None:
    """An ack follows it, so it has to survive a power cut: with WAL only FULL syncs each commit."""
    async with database.write() as connection:
        modes = [(await connection.exec_driver_sql(f"PRAGMA {name}")).scalar() for name in MODES]
    assert modes == ["wal", 2]


async def test_nothing_begins_before_the_record_is_kept(pipeline: Pipeline) -> None:
    await take_in(pipeline, event("event"))
    async with pipeline.database.write() as connection:
        await jobs.decide_later(connection, [(job_of("event"), datetime.now(UTC))])
    await pipeline.housekeeping.tick()
    assert (await step(pipeline.database, "event")).state is StepState.BLOCKED


# --- intake ----------------------------------------------------------------------------------------------------


async def test_an_event_that_comes_again_is_known(pipeline: Pipeline) -> None:
    first = await take_in(pipeline, event("event"))
    again = await take_in(pipeline, event("event"), event("other", "another session"), event("event"))
    assert (len(first.new), first.known) == (1, 0)
    assert (len(again.new), again.known, again.poison) == (1, 2, [])
    assert stored(pipeline.database, "SELECT count(*) FROM jobs") == [2]


async def test_an_id_that_is_used_again_with_other_data_is_poison(pipeline: Pipeline) -> None:
    await take_in(pipeline, event("event"))
    again = await take_in(pipeline, event("event", user="somebody else"))
    assert ([error.code for _, error in again.poison], again.new, again.known) == (["id_reused"], [], 0)
    assert "somebody else" not in (await job(pipeline.database, "event")).event


class Acks:
    """The channel of deliveries; it notes what the database holds when an ack comes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.seen: list[tuple[int, bool, int]] = []

    async def basic_ack(self, tag: int, *, multiple: bool = False) -> None:
        """Note tag, flag and the number of jobs."""
        (count,) = stored(self._database, "SELECT count(*) FROM jobs")
        self.seen.append((tag, multiple, count))


async def test_a_delivery_is_acked_when_its_job_is_in_the_database(pipeline: Pipeline) -> None:
    broker, channel = Broker("amqp://none.test/", "exchange"), Acks(pipeline.database)
    for tag in (1, 2):
        content = body(f"event {tag}", f"session {tag}")
        broker.deliveries.put_nowait(Delivery(cast("Any", channel), tag, content, STRUCTURED, {}, False))  # noqa: FBT003
    work = asyncio.create_task(pipeline.intake.run(broker))
    await until(lambda: channel.seen)
    await end(work)
    assert channel.seen == [(2, True, 2)]


async def test_a_newer_build_takes_over(pipeline: Pipeline) -> None:
    await take_in(pipeline, event("old", time=OLD))
    await take_in(pipeline, event("new", time=NEW))
    old, new = await job(pipeline.database, "old"), await job(pipeline.database, "new")
    assert (old.state, old.superseded_by) == (JobState.SUPERSEDED, new.id)
    assert (await step(pipeline.database, "old")).state is StepState.SUPERSEDED
    assert new.state is JobState.OPEN


@pytest.mark.parametrize("together", [True, False])
async def test_an_older_build_that_comes_late_overwrites_nothing(
    pipeline: Pipeline, remote: Remote, together: bool
) -> None:
    new, old = event("new", time=NEW), event("old", time=OLD)
    for batch in [[new, old]] if together else [[new], [old]]:
        await take_in(pipeline, *batch)
    async with at_work(pipeline):
        await until(lambda: len(stored(pipeline.database, "SELECT seq FROM outbox")) == 2)
    late = await job(pipeline.database, "old")
    assert (late.state, late.superseded_by) == (JobState.SUPERSEDED, job_of("new"))
    assert (await job(pipeline.database, "new")).state is JobState.EXPORTED
    assert remote.copies == ["session"]


# --- lanes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Misconfigured("the token ran out"), Transient("429", retry_after=60)])
async def test_work_for_a_destination_waits_as_a_whole(pipeline: Pipeline, remote: Remote, error: Exception) -> None:
    """A token that ran out, or a server that asks for patience, concerns every record."""
    remote.error, remote.valid = error, (False, "the token ran out")
    await take_in(pipeline, event("one", "session 1"), event("two", "session 2"))
    async with at_work(pipeline):
        await until(lambda: stored(pipeline.database, "SELECT destination FROM lanes"))
        await asyncio.sleep(QUIET_SECONDS)
    assert len(remote.copies) == 1
    states = stored(pipeline.database, "SELECT state FROM steps")
    assert states == ["due", "due"]


# --- outbox ----------------------------------------------------------------------------------------------------


class Confirms:
    """A broker whose confirms come when the test lets them."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def publish(self, *, message_id: str, **_: Any) -> bool:
        """Wait for the confirm."""
        self.asked.append(message_id)
        return await self.answer


async def unsent(database: Database) -> int:
    async with database.read() as connection:
        return len(await outbox.unsent(connection, datetime.now(UTC), 10))


async def waiting_relay(database: Database) -> tuple[Confirms, "asyncio.Task[tuple[int, int]]"]:
    """Let a relay publish one message; its confirm is still to come."""
    async with database.write() as connection:
        await outbox.add(connection, [SENT], datetime.now(UTC) - timedelta(minutes=1), is_sqlite=True)
    broker = Confirms()
    relay = OutboxRelay(database, cast("Broker", broker), Signals())
    work = asyncio.create_task(relay.relay_once())
    await until(lambda: broker.asked)
    return broker, work


async def test_a_message_is_sent_when_the_broker_has_confirmed_it(database: Database) -> None:
    broker, work = await waiting_relay(database)
    await asyncio.wait([work], timeout=0.3)
    assert await unsent(database) == 1, "no confirm has come"
    broker.answer.set_result(True)
    assert await work == (1, 0)
    assert await unsent(database) == 0


async def test_a_message_without_a_confirm_is_sent_again(database: Database) -> None:
    broker, work = await waiting_relay(database)
    broker.answer.set_exception(BrokerAwayError("the connection broke"))
    assert await work == (0, 1)
    assert await unsent(database) == 1


class Publishing:
    """The channel that a broker publishes on; the confirm is a frame, a message that comes back is none."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.options: dict[str, Any] = {}

    async def basic_publish(self, _body: bytes, **options: Any) -> Any:
        """Note how a message goes out."""
        self.options = options
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


async def publish(answer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, dict[str, Any]]:
    """Publish a message that is answered so."""
    broker, channel = Broker("amqp://none.test/", "exchange"), Publishing(answer)
    monkeypatch.setattr(broker, "_publishing", channel)
    taken = await broker.publish(
        exchange="exchange", routing_key="key", body=b"body", message_id="id-1", content_type=STRUCTURED, headers={},
        kind="outcome",
    )  # fmt: skip
    return taken, channel.options


async def test_what_is_published_survives_a_restart_of_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, options = await publish(Basic.Ack(), monkeypatch)
    assert taken
    assert options["properties"].delivery_mode == 2, "persistent"
    assert options["mandatory"], "else nobody would tell that no queue took it"


@pytest.mark.parametrize(
    "error", [TimeoutError(), ConnectionResetError(), aiormq.exceptions.DeliveryError(None, Basic.Nack())]
)
async def test_a_publish_that_is_not_confirmed_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BrokerAwayError):
        await publish(error, monkeypatch)


# --- names that other programs rely on -------------------------------------------------------------------------


class Declared:
    """A channel that notes what is declared on it; as exchange and queue it is its own answer."""

    def __init__(self) -> None:
        self.queues: dict[str, Mapping[str, Any]] = {}

    async def declare_exchange(self, *_: object, **options: Any) -> "Declared":
        """Take an exchange; only a durable one outlives a restart."""
        assert options == {"durable": True}
        return self

    async def declare_queue(self, name: str, *, durable: bool, arguments: Mapping[str, Any]) -> "Declared":
        """Note a queue."""
        assert durable
        self.queues[name] = arguments
        return self

    async def bind(self, exchange: object, routing_key: str) -> None:
        """Bind the work queue."""
        assert exchange is self
        assert routing_key == "record.built"


async def test_queues_lose_nothing_and_bound_deliveries() -> None:
    """A limit of -1 means none for RabbitMQ 4, but 3.10 would dead-letter at the first requeue."""
    channel = Declared()
    await declare_topology(cast("AbstractChannel", channel), "exchange")
    assert channel.queues == {
        WORK_QUEUE: {
            "x-queue-type": "quorum",
            "x-delivery-limit": 1000,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": DEAD_QUEUE,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
        DEAD_QUEUE: {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000},
    }
