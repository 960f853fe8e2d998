"""Takes deliveries: a batch of events becomes jobs (or poison letters) in one commit, then is acked (T1)."""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from consumer.broker import Broker, Delivery
from consumer.destinations.registry import Registry
from consumer.errors import PoisonEventError
from consumer.events import REPLAY_HEADER, BuiltEvent, parse_built
from consumer.pipeline.outcome import poison_messages, reason_headers
from consumer.pipeline.progress import Advanced, Progress
from consumer.pipeline.signals import Signals
from consumer.store import jobs, outbox
from consumer.store.connection import Connection, Database, DatabaseError, is_data_error
from consumer.store.jobs import new_job_row
from consumer.store.rows import JobRow, JobState, Message, NewJob, NewStep
from consumer.telemetry import get_logger

BATCH = 256
FUTURE_TOLERANCE = timedelta(minutes=5)
STRATEGIES = ("all", "first_success", "best_effort")
RETRY_SECONDS = 1.0

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Arrived:
    """A delivery after parsing: an event, or the reason why it is none."""

    body: bytes
    content_type: str | None
    redelivered: bool
    event: BuiltEvent | None = None
    poison: PoisonEventError | None = None
    replay_of: tuple[UUID, int] | None = None


@dataclass(slots=True)
class Accepted:
    """What one batch came to."""

    now: datetime
    new: list[NewJob] = field(default_factory=list)
    refused: dict[UUID, tuple[str, str]] = field(default_factory=dict)
    reopened: list[UUID] = field(default_factory=list)
    poison: list[tuple[Arrived, PoisonEventError]] = field(default_factory=list)
    known: int = 0
    advanced: list[Advanced] = field(default_factory=list)
    superseded: set[UUID] = field(default_factory=set)
    handed_on: bool = False


def arrive(body: bytes, content_type: str | None, headers: dict[str, Any], *, redelivered: bool) -> Arrived:
    """Parse a delivery; never raises, since every delivery has to end somewhere."""
    try:
        event = parse_built(body, content_type=content_type, headers=headers)
    except PoisonEventError as error:
        return Arrived(body, content_type, redelivered, poison=error)
    return Arrived(body, content_type, redelivered, event=event, replay_of=_replay_of(headers))


def _replay_of(headers: dict[str, Any]) -> tuple[UUID, int] | None:
    job, _, revision = str(headers.get(REPLAY_HEADER, "")).partition("/")
    try:
        return UUID(job), int(revision)
    except ValueError:
        return None


class Intake:
    """Writes batches of arrived events into the store."""

    def __init__(
        self, database: Database, registry: Registry, progress: Progress, signals: Signals, strategy: str
    ) -> None:
        self._database = database
        self._registry = registry
        self._progress = progress
        self._strategy = strategy
        self._signals = signals

    async def run(self, broker: Broker) -> None:
        """Take deliveries until cancelled; while the database is away they go back to the queue."""
        while True:
            batch = [await broker.deliveries.get()]
            while len(batch) < BATCH and not broker.deliveries.empty():
                batch.append(broker.deliveries.get_nowait())
            try:
                await self.accept([_arrived(delivery) for delivery in batch])
            except DatabaseError as error:
                _log_away(error)
                broker.pause()
                await self._accept_later(batch)
                broker.resume()
                continue
            # one ack for the batch: deliveries of a channel come in the order of their tags
            await batch[-1].ack(all_before=True)

    async def accept(self, batch: Sequence[Arrived]) -> Accepted:
        """Commit a batch; one that fails on its data is repeated one by one, so that one cannot hold up others."""
        try:
            result = await self._commit(batch)
        except DatabaseError as error:
            if not is_data_error(error):
                raise
            return await self._one_by_one(batch)
        self._announce(result)
        return result

    async def _accept_later(self, batch: Sequence[Delivery]) -> None:
        """Wait for the database with events that have gone back to the queue; they are known when they come again.

        Fetching them anew for each try would use up the queue's delivery limit and make dead letters of them.
        """
        # of a batch that failed on its way, some letters may be written already
        again = [replace(_arrived(delivery), redelivered=True) for delivery in batch]
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                await self.accept(again)
            except DatabaseError as error:
                _log_away(error)
            else:
                return

    def _announce(self, result: Accepted) -> None:
        """After the commit: log, and hand new jobs to the keeper."""
        _log_accepted(result)
        self._progress.announce(*result.advanced)
        gone = result.superseded | set(result.refused)
        fresh = [new_job_row(job, result.now) for job in result.new if job.id not in gone]
        self._signals.records.give(fresh if result.handed_on else ())

    async def _one_by_one(self, batch: Sequence[Arrived]) -> Accepted:
        result = Accepted(self._database.clock())
        for item in batch:
            try:
                result = await self._commit([item])
            except DatabaseError as error:
                if not is_data_error(error):
                    raise
                reason = PoisonEventError("unstorable", f"the database refuses it: {str(error).splitlines()[0]}")
                result = await self._commit([Arrived(item.body, item.content_type, item.redelivered, poison=reason)])
            self._announce(result)
        return result

    async def _commit(self, batch: Sequence[Arrived]) -> Accepted:
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            result = await self._sort(connection, batch, now)
            result.handed_on = self._signals.records.has_room(len(result.new))
            await self._pass_over(connection, result, now)
            await self._write_new(connection, result, now)
            for item, error in result.poison:
                result.advanced.append(await self._write_poison(connection, item, error, now))
            for job, (code, reason) in result.refused.items():
                await jobs.fail_all_steps(connection, job, code, reason)
            result.advanced.append(await self._progress.advance(connection, result.refused, now))
        return result

    async def _sort(self, connection: Connection, batch: Sequence[Arrived], now: datetime) -> Accepted:
        """Tell new events from known ones, replays and poison."""
        result = Accepted(now)
        events = [item.event for item in batch if item.event]
        digests = await jobs.known_digests(connection, {event.job_id for event in events})
        for item in batch:
            if item.event is None:
                result.poison.append((item, item.poison or PoisonEventError("invalid", "no event")))
                continue
            identity = item.event.job_id
            digest = digests.get(identity)
            if digest is None:
                digests[identity] = item.event.data_sha256
                job, refusal = self.plan(item.event, now)
                result.new.append(job)
                if refusal:
                    result.refused[identity] = refusal
            elif digest != item.event.data_sha256:
                result.poison.append((item, _id_reused(item.event)))
            elif item.replay_of and item.replay_of[0] == identity:
                if await jobs.reopen(connection, identity, item.replay_of[1], now):
                    result.reopened.append(identity)
            else:
                result.known += 1
        return result

    def plan(self, event: BuiltEvent, now: datetime) -> tuple[NewJob, tuple[str, str] | None]:
        """Say which steps an event wants, and why it is refused as a whole, if it is."""
        data = event.data
        wanted = tuple(dict.fromkeys(data.destinations)) if data.destinations else tuple(self._registry.enabled)
        strategy = data.strategy or self._strategy
        usable = event.time is not None and event.time <= now + FUTURE_TOLERANCE
        refusal = self._refusal(wanted, strategy)
        names = {name[:100]: self._registry.enabled.get(name) for name in wanted}
        job = NewJob(
            id=event.job_id,
            source=event.source,
            event_id=event.id,
            data_sha256=event.data_sha256,
            session=data.session_identifier,
            build_time=event.time if usable and event.time else now,
            event=event.text,
            strategy=strategy[:64],
            steps=tuple(NewStep(name, found.priority if found else 0) for name, found in names.items()),
        )
        return job, refusal

    def _refusal(self, wanted: Sequence[str], strategy: str) -> tuple[str, str] | None:
        if not wanted:
            return "no_destination", "no destination is enabled"
        unknown = [name for name in wanted if name not in self._registry.enabled]
        if unknown:
            known = ", ".join(self._registry.enabled) or "none"
            return "unknown_destination", f"{', '.join(unknown)[:300]}: not enabled here; enabled are {known}"
        if strategy not in STRATEGIES:
            return "unknown_strategy", f"{strategy[:100]!r}: known are {', '.join(STRATEGIES)}"
        return None

    async def _pass_over(self, connection: Connection, result: Accepted, now: datetime) -> None:
        """Pass over replayed builds that have a newer one by now: they repeat what it came to."""
        if not result.reopened:
            return
        replayed = await jobs.load_jobs(connection, result.reopened)
        newest = await jobs.newest_builds(connection, {job.session for job in replayed.values()})
        for job in replayed.values():
            successor = newest[job.session]
            if successor.id == job.id:
                continue
            await jobs.supersede(connection, job.id, successor.id)
            result.superseded.add(job.id)
            if successor.state is not JobState.OPEN:
                result.advanced.append(await self._progress.repeat_outcome(connection, successor, now))

    async def _write_new(self, connection: Connection, result: Accepted, now: datetime) -> None:
        newest = await jobs.newest_builds(connection, {job.session for job in result.new})
        await jobs.insert_jobs(connection, result.new, now, handed_on=result.handed_on)
        builds: dict[str, tuple[UUID, datetime]] = {
            session: (job.id, job.build_time) for session, job in newest.items()
        }
        for job in result.new:
            before = builds.get(job.session)
            if job.id in result.refused:
                continue  # an event that is refused as a whole takes nothing over
            if before is None or job.build_time >= before[1]:
                builds[job.session] = (job.id, job.build_time)
                if before is not None:
                    await jobs.supersede(connection, before[0], job.id)
                    result.superseded.add(before[0])
                continue
            # an older build that arrives late: it never runs, and repeats what the newer one came to
            await jobs.supersede(connection, job.id, before[0])
            result.superseded.add(job.id)
            successor: JobRow | None = newest.get(job.session)
            if successor and successor.id == before[0] and successor.state is not JobState.OPEN:
                result.advanced.append(await self._progress.repeat_outcome(connection, successor, now))

    async def _write_poison(
        self, connection: Connection, item: Arrived, error: PoisonEventError, now: datetime
    ) -> Advanced:
        digest = hashlib.sha256(item.body).hexdigest()
        if item.redelivered and await outbox.has_letter(connection, digest):
            return Advanced()
        names = self._progress.names
        letter = Message(
            "poison", f"{digest}.{uuid4().hex}", "", names.dead_queue, item.body,
            headers=reason_headers(error.code, str(error), error.session),
            content_type=item.content_type or "application/octet-stream",
        )  # fmt: skip
        messages = poison_messages(error, letter, digest=digest, strategy=self._strategy, now=now, names=names)
        await outbox.add(connection, messages, now, is_sqlite=self._database.is_sqlite)
        return Advanced((), tuple(messages))


def _arrived(delivery: Delivery) -> Arrived:
    return arrive(delivery.body, delivery.content_type, delivery.headers, redelivered=delivery.redelivered)


def _id_reused(event: BuiltEvent) -> PoisonEventError:
    return PoisonEventError(
        "id_reused",
        f"event {event.id!r} of {event.source!r} was accepted before with other data; give each build its own id",
        source=event.source,
        event_id=event.id,
        session=event.data.session_identifier,
    )


def _log_away(error: BaseException) -> None:
    _log.error("database_away", reason=str(error).splitlines()[0], retry_in_seconds=RETRY_SECONDS)


def _log_accepted(result: Accepted) -> None:
    for job in result.new:
        _log.debug("event_accepted", session=job.session, event_id=job.event_id)
    for _item, error in result.poison:
        _log.warning("event_poison", code=error.code, reason=str(error)[:500], event_id=error.event_id)
    if result.known:
        _log.info("events_known", count=result.known)
