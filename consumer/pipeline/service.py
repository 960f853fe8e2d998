"""All stages of one consumer process put together: with a broker (``serve``) or for one record (``export_one``)."""

import asyncio
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID, uuid4

from consumer.broker import DEAD_QUEUE, Broker
from consumer.config import Settings
from consumer.destinations.registry import Registry
from consumer.pipeline.decide import Place
from consumer.pipeline.ending import RetrySettings
from consumer.pipeline.engine import Engine, EngineSettings
from consumer.pipeline.housekeeping import Housekeeping
from consumer.pipeline.intake import Accepted, Arrived, Intake
from consumer.pipeline.keeper import Keeper
from consumer.pipeline.outbox import OutboxRelay
from consumer.pipeline.outcome import Names
from consumer.pipeline.progress import Progress
from consumer.pipeline.reader import ReaderSettings, RecordReader
from consumer.pipeline.recheck import Rechecks
from consumer.pipeline.signals import Signals, wait
from consumer.pipeline.snapshot import Spool
from consumer.store import consumers, jobs
from consumer.store.connection import Database, DatabaseError
from consumer.store.rows import JobRow, JobState, StepRow
from consumer.telemetry import get_logger

#: SIGTERM: running attempts may end by themselves for this long; the whole stop stays under 10 s.
GRACE_SECONDS = 5.0
DRAIN_SECONDS = 1.5
STOP_SECONDS = 9.0

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages between the queues."""

    database: Database
    signals: Signals
    intake: Intake
    keeper: Keeper
    engine: Engine
    housekeeping: Housekeeping
    rechecks: Rechecks
    owner: str


def build_pipeline(settings: Settings, database: Database, registry: Registry) -> Pipeline:
    """Build the stages from settings. Raises ``ConfigurationError`` for a record schema that cannot be used."""
    # a restarted container has the name and process number of the one before
    owner = f"{socket.gethostname()[:60]}:{os.getpid()}:{uuid4().hex[:6]}"
    names = Names(settings.amqp_exchange, DEAD_QUEUE, settings.event_source)
    places = {
        item.name: Place(item.name, item.priority, item.links_to, item.depends_on) for item in registry.known.values()
    }
    signals = Signals()
    progress = Progress(places, names, signals.outcomes, is_sqlite=database.is_sqlite)
    spool = Spool(settings.resolved_spool_path)
    reader = RecordReader(
        ReaderSettings(settings.resolved_records_path, settings.record_max_bytes, settings.record_schema, spool.root)
    )
    retry = RetrySettings(settings.retry_base_seconds, settings.retry_max_seconds, settings.export_max_wait)
    keeper = Keeper(
        database, progress, signals, reader, spool,
        wait_seconds=settings.record_wait_seconds, max_wait_seconds=settings.export_max_wait,
    )  # fmt: skip
    engine = Engine(
        database, registry, progress, signals, keeper=keeper,
        settings=EngineSettings(
            owner, retry, settings.lease_margin_seconds, settings.instrument_data_path, settings.data_path
        ),
    )  # fmt: skip
    return Pipeline(
        database=database,
        signals=signals,
        intake=Intake(database, registry, progress, signals, settings.export_strategy),
        keeper=keeper,
        engine=engine,
        housekeeping=Housekeeping(
            database, registry, progress, signals, engine.callers,
            owner=owner, max_wait_seconds=settings.export_max_wait,
        ),
        rechecks=Rechecks(
            database, engine.callers, engine.context_of, max_wait_seconds=settings.export_max_wait
        ),
        owner=owner,
    )  # fmt: skip


async def serve(pipeline: Pipeline, broker: Broker, stop: asyncio.Event) -> None:
    """Run every stage until ``stop`` is set, then end in order within ten seconds.

    What a stage raises ends the service: its supervisor starts it anew, and nothing in the database is lost.
    """
    await pipeline.housekeeping.recover()
    await pipeline.housekeeping.check_destinations()
    pipeline.housekeeping.is_connected = lambda: broker.connected
    pipeline.housekeeping.work_queue_losses = lambda: broker.work_queue_losses
    relay = OutboxRelay(pipeline.database, broker, pipeline.signals)
    async with asyncio.TaskGroup() as group:
        connection = group.create_task(broker.run(), name="broker")
        intake = group.create_task(pipeline.intake.run(broker), name="intake")
        keeper = group.create_task(pipeline.keeper.run(), name="keeper")
        engine = group.create_task(pipeline.engine.run(), name="engine")
        chores = group.create_task(pipeline.housekeeping.run(), name="housekeeping")
        rechecks = group.create_task(pipeline.rechecks.run(), name="rechecks")
        outbox = group.create_task(relay.run(), name="outbox")
        await stop.wait()
        _log.info("stopping", running=pipeline.engine.busy)
        deadline = _leave_by_force_after(STOP_SECONDS)
        broker.pause()
        await _cancel(intake, keeper, chores, rechecks)
        await pipeline.engine.stop(GRACE_SECONDS)
        await engine
        await _cancel(outbox)
        await _drain(relay, broker)
        await _cancel(connection)
    await _leave(pipeline)
    deadline.cancel()
    _log.info("stopped")


def _leave_by_force_after(seconds: float) -> threading.Timer:
    """End the process if the orderly stop hangs: everything is in the database, as after a crash."""

    def leave() -> None:
        _log.error("stop_forced", reason=f"the orderly stop took over {seconds:g} s")
        os._exit(0)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    return timer


async def _leave(pipeline: Pipeline) -> None:
    """Take this process off the list of consumers and let others have what it took."""
    with suppress(*DatabaseError):
        async with pipeline.database.write() as transaction:
            await consumers.leave(transaction, pipeline.owner)
        await pipeline.keeper.give_back()


async def _drain(relay: OutboxRelay, broker: Broker) -> None:
    """Send what the last results put into the outbox; what stays goes out at the next start."""
    if not broker.connected:
        return
    with suppress(TimeoutError, *DatabaseError):
        async with asyncio.timeout(DRAIN_SECONDS):
            await relay.drain()


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task


async def export_one(pipeline: Pipeline, arrived: Arrived) -> tuple[Accepted, JobRow, list[StepRow]]:
    """Bring one event through the same stages without a broker; its outcome waits in the outbox.

    Returns when the job is over. The event must be a valid one.
    """
    if arrived.event is None:
        raise arrived.poison or ValueError(arrived)
    await pipeline.housekeeping.recover()
    await pipeline.housekeeping.check_destinations()
    accepted = await pipeline.intake.accept([arrived])
    identity = arrived.event.job_id
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(pipeline.keeper.run()),
            group.create_task(pipeline.housekeeping.run()),
        ]
        engine = group.create_task(pipeline.engine.run())
        job, steps = await _until_over(pipeline, identity)
        await _cancel(*tasks)
        await pipeline.engine.stop(GRACE_SECONDS)
        await engine
    await _leave(pipeline)
    return accepted, job, steps


async def _until_over(pipeline: Pipeline, identity: UUID) -> tuple[JobRow, list[StepRow]]:
    while True:
        async with pipeline.database.read() as connection:
            job = (await jobs.load_jobs(connection, [identity]))[identity]
            steps = (await jobs.load_steps(connection, [identity])).get(identity, [])
        if job.state is not JobState.OPEN:
            return job, steps
        pipeline.signals.outcomes.event.clear()
        await wait(pipeline.signals.outcomes.event, 1)
