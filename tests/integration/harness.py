"""A consumer as laboratories run it, and the world around it: events in, outcomes and dead letters out.

What speaks to the broker here uses plain aio-pika and JSON written by hand, as a record builder or listener would.
"""

import asyncio
import hashlib
import json
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import aio_pika
import asyncpg

from tools.records import Record, make_record
from tools.servers.process import Child, clean_environment, tail, wait_for

T = TypeVar("T")

PROJECT = Path(__file__).resolve().parents[2]
EXCHANGE = "nexuslims.records"
WORK_QUEUE = "nexuslims.export"
DEAD_QUEUE = "nexuslims.export.dead"
STRUCTURED = "application/cloudevents+json"
SOURCE = "urn:example:builder"
SECONDS = 15.0
STOP_SECONDS = 10.0

#: So that a test of retries takes a moment and not minutes.
QUICK = {"NX_RETRY_BASE_SECONDS": "0.2", "NX_RETRY_MAX_SECONDS": "0.5", "NX_LOG_FORMAT": "json"}


# --- events ----------------------------------------------------------------------------------------------------


def sha256(content: bytes) -> str:
    """Return the digest as events hold it."""
    return hashlib.sha256(content).hexdigest()


def by_path(path: str, content: bytes, **changes: Any) -> dict[str, Any]:
    """Describe a record file."""
    return {"path": path, "sha256": sha256(content), "size": len(content), **changes}


def inline(name: str, content: bytes, **changes: Any) -> dict[str, Any]:
    """Put a record into the event."""
    return {"name": name, "content": content.decode(), "sha256": sha256(content), "size": len(content), **changes}


def built(
    session: str, record: Mapping[str, Any], *, event_id: str | None = None, time: str | None = None, **data: Any
) -> dict[str, Any]:
    """Write a ``record.built``; keywords become fields of its data."""
    document = {
        "specversion": "1.0",
        "id": event_id or str(uuid.uuid4()),
        "source": SOURCE,
        "type": "record.built",
        "subject": session,
        "datacontenttype": "application/json",
        "data": {"session_identifier": session, "record": dict(record), **data},
    }
    return {**document, "time": time} if time else document


def job_of(event_id: str, source: str = SOURCE) -> uuid.UUID:
    """Name the job of an event as the design does."""
    return uuid.uuid5(uuid.uuid5(uuid.NAMESPACE_URL, source), event_id)


def outcome_id(event_id: str, revision: int = 1) -> str:
    """Name an outcome as the design does."""
    return str(uuid.uuid5(job_of(event_id), str(revision)))


def small(index: int, *, seed: int = 1, size: int = 2_000) -> Record:
    """Make a small record."""
    return make_record(index, seed=seed, size=size)


# --- the broker ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """A message as it came."""

    body: bytes
    routing_key: str
    message_id: str | None
    content_type: str | None
    persistent: bool
    headers: dict[str, Any] = field(default_factory=dict)

    @property
    def event(self) -> dict[str, Any]:
        """Return the event in it."""
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def data(self) -> dict[str, Any]:
        """Return the data of the event in it."""
        found: dict[str, Any] = self.event["data"]
        return found

    @property
    def cause(self) -> str:
        """Return the id of the event that an outcome answers."""
        return str(self.data["cause"]["id"])

    def result(self, destination: str) -> dict[str, Any]:
        """Return what an outcome says of a destination."""
        return next(dict(item) for item in self.data["results"] if item["destination"] == destination)


class Bus:
    """A builder and listener beside the consumer; every outcome since ``with`` is in ``heard``.

    With ``queue`` it listens at a durable queue of that name, else at one that ends with it.
    """

    def __init__(self, url: str, *, queue: str | None = None) -> None:
        self._url = url
        self._queue = queue
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bus")
        self._connection: aio_pika.abc.AbstractConnection
        self._channel: aio_pika.abc.AbstractChannel
        self._exchange: aio_pika.abc.AbstractExchange
        self.heard: list[Heard] = []
        self.letters: list[Heard] = []

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with suppress(aio_pika.exceptions.AMQPError, ConnectionError):  # the test may have ended the broker
                self._do(self._connection.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _open(self) -> None:
        self._connection = await aio_pika.connect(self._url)
        self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        self._exchange = await self._channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await self._channel.declare_queue(self._queue, exclusive=not self._queue, durable=bool(self._queue))
        for key in ("record.exported", "record.export_failed"):
            await queue.bind(self._exchange, key)
        await queue.consume(self._take, no_ack=True)

    async def _take(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self.heard.append(_heard(message))

    def publish(
        self,
        event: Mapping[str, Any] | bytes,
        *,
        content_type: str | None = STRUCTURED,
        headers: Mapping[str, Any] | None = None,
    ) -> None:
        """Publish a ``record.built``; raises when no queue takes it."""
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        self._do(self._publish(self._exchange, "record.built", body, content_type, headers or {}))

    def publish_binary(self, event: Mapping[str, Any], *, prefix: str = "cloudEvents_") -> None:
        """Publish an event in binary mode: the attributes as headers, the data as body."""
        headers = {prefix + name: value for name, value in event.items() if name not in {"data", "datacontenttype"}}
        self.publish(json.dumps(event["data"]).encode(), content_type="application/json", headers=headers)

    def requeue(self, letter: Heard) -> None:
        """Move a dead letter back by hand, as any tool does: the same body and headers, straight to the queue."""
        exchange = self._channel.default_exchange
        self._do(self._publish(exchange, WORK_QUEUE, letter.body, letter.content_type, letter.headers))

    @staticmethod
    async def _publish(
        exchange: aio_pika.abc.AbstractExchange,
        key: str,
        body: bytes,
        content_type: str | None,
        headers: Mapping[str, Any],
    ) -> None:
        message = aio_pika.Message(
            body,
            content_type=content_type,
            headers=dict(headers),
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        await exchange.publish(message, key, mandatory=True)

    def outcomes(self, event_id: str) -> list[Heard]:
        """Return every outcome heard so far of an event."""
        return [item for item in list(self.heard) if item.cause == event_id]

    def outcome(
        self, event_id: str, *, revision: int = 1, seconds: float = SECONDS, log: Path | None = None
    ) -> Heard:
        """Wait for the outcome of an event."""

        def found() -> list[Heard]:
            return [item for item in self.outcomes(event_id) if item.data["revision"] == revision]

        wait_for(found, seconds, f"the outcome of {event_id}, revision {revision}", log)
        return found()[0]

    def letter(self, matches: Callable[[Heard], bool], *, seconds: float = SECONDS, log: Path | None = None) -> Heard:
        """Wait for a dead letter; all that were fetched are in ``letters``."""

        def found() -> list[Heard]:
            self.fetch_letters()
            return [item for item in self.letters if matches(item)]

        wait_for(found, seconds, "the dead letter", log)
        return found()[0]

    def fetch_letters(self) -> None:
        """Take all dead letters out of their queue."""
        self.letters += self._do(self._drain(DEAD_QUEUE))

    async def _drain(self, name: str) -> list[Heard]:
        channel = await self._connection.channel()
        found = []
        try:
            queue = await channel.get_queue(name, ensure=False)
            while (message := await queue.get(fail=False)) is not None:
                found.append(_heard(message))
                await message.ack()
        finally:
            await channel.close()
        return found

    def depth(self, name: str = WORK_QUEUE) -> int | None:
        """Return how many messages wait in a queue; None when it is not there."""
        return self._do(self._depth(name))

    async def _depth(self, name: str) -> int | None:
        channel = await self._connection.channel()
        try:
            queue = await channel.declare_queue(name, passive=True)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return None
        count = queue.declaration_result.message_count
        await channel.close()
        return count

    def consumers(self, name: str = WORK_QUEUE) -> int:
        """Return how many consumers a queue has; 0 also when it is not there."""
        return self._do(self._consumers(name))

    async def _consumers(self, name: str) -> int:
        channel = await self._connection.channel()
        try:
            queue = await channel.declare_queue(name, passive=True)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return 0
        count = queue.declaration_result.consumer_count or 0
        await channel.close()
        return count

    def declare(self, name: str, **arguments: Any) -> None:
        """Declare a durable queue with such arguments."""
        self._do(self._channel.declare_queue(name, durable=True, arguments=arguments or None))

    def delete(self, name: str) -> None:
        """Delete a queue with all it holds."""
        self._do(self._channel.queue_delete(name))


def _heard(message: aio_pika.abc.AbstractIncomingMessage) -> Heard:
    return Heard(
        message.body,
        message.routing_key or "",
        message.message_id,
        message.content_type,
        message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT,
        dict(message.headers or {}),
    )


# --- the consumer ----------------------------------------------------------------------------------------------


class Service(Child):
    """A running ``python -m consumer run``."""

    @property
    def exit_code(self) -> int | None:
        """Return how it ended, None while it runs."""
        return self._process.poll()

    def logged(self) -> str:
        """Return all it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, predicate: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
        """Wait for a condition; fail at once when the service ends instead."""

        def checked() -> bool:
            assert self.exit_code is None, f"{what}: the service ended with {self.exit_code}{tail(self.log)}"
            return bool(predicate())

        wait_for(checked, seconds, what, self.log)

    def wait_for_log(self, text: str, seconds: float = SECONDS) -> None:
        """Wait until the log holds a text."""
        self.wait_for(lambda: text in self.logged(), f"{text!r} in the log", seconds)

    def wait_for_exit(self, seconds: float = SECONDS) -> int:
        """Wait for it to end by itself; returns its exit code."""
        wait_for(lambda: self.exit_code is not None, seconds, "the end of the service", self.log)
        self._forget()
        return self.exit_code if self.exit_code is not None else -1

    def shut_down(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop it in order; it must end by itself in time, and well."""
        self.stop(STOP_SECONDS, number)
        assert self.exit_code == 0, f"ended with {self.exit_code}{tail(self.log)}"


class Site:
    """The folders, settings and database of one installation; services and commands run in it."""

    def __init__(self, folder: Path, amqp_url: str, database_url: str | None = None, **settings: str) -> None:
        self.folder = folder
        self.amqp_url = amqp_url
        self.database_url = database_url or f"sqlite:///{folder}/test.db"
        self.records = folder / "records"
        self.archive = folder / "archive"
        self.plugins = folder / "plugins"
        for path in (self.records, self.plugins):
            path.mkdir(parents=True, exist_ok=True)
        self.settings = {
            **QUICK,
            "NX_AMQP_URL": amqp_url,
            "NX_DATABASE_URL": self.database_url,
            "NX_RECORDS_PATH": str(self.records),
            "NX_SPOOL_PATH": str(folder / "spool"),
            "NX_LOCAL_ARCHIVE_PATH": str(self.archive),
            "NX_DESTINATIONS_PATH": str(self.plugins),
            **settings,
        }
        self.running: list[Service] = []

    def environment(self, **changes: str) -> dict[str, str]:
        """Return the environment of a process here; an empty text takes a setting away."""
        return clean_environment(**{**self.settings, **changes}, PYTHONPATH=str(PROJECT))

    def start(self, *, ready: bool = True, **changes: str) -> Service:
        """Start a service; with ``ready`` return when it consumes."""
        service = Service(
            [sys.executable, "-m", "consumer", "run"],
            env=self.environment(**changes),
            log=self.folder / f"service-{len(self.running) + 1}.log",
            cwd=self.folder,
        )
        self.running.append(service)
        if ready:
            service.wait_for_log('"broker_connected"')
        return service

    def run(self, *arguments: str | Path, seconds: float = 60, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "consumer", *arguments],
            env=self.environment(**changes),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def write(self, record: Record, folder: str = "") -> dict[str, Any]:
        """Write a record file; returns what an event says of it."""
        path = self.records / folder / record.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record.content)
        return by_path(str(path.relative_to(self.records)), record.content)

    def archived(self, record: Record) -> Path:
        """Return where the archive keeps a record."""
        month = f"{record.dt_from.year:04}/{record.dt_from.month:02}"
        return self.archive / record.instrument_pid / month / record.name

    def plugin(self, name: str, text: str, priority: int = 50) -> None:
        """Write a plugin file: what every one needs, and a class body that may call ``note`` and ``noted``."""
        body = "\n".join(f"    {line}" if line else "" for line in text.strip("\n").splitlines())
        code = PLUGIN.format(name=name, priority=priority, ledger=str(self._ledger(name)), body=body)
        (self.plugins / f"{name}.py").write_text(code, encoding="utf-8")

    def ledger(self, name: str, what: str | None = "export") -> list[dict[str, Any]]:
        """Return what a plugin has noted: one entry a call."""
        path = self._ledger(name)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines]
        return [entry for entry in entries if what is None or entry["what"] == what]

    def _ledger(self, name: str) -> Path:
        return self.plugins / f"{name}.ledger"

    def sql(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Read the database from outside; ``?`` stands for a value."""
        if self.database_url.startswith("sqlite"):
            path = Path(self.database_url.partition(":///")[2])
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
                connection.row_factory = sqlite3.Row
                return [dict(row) for row in connection.execute(query, values)]
        return asyncio.run(_fetch(self.database_url, query, values))

    def job(self, event_id: str) -> dict[str, Any] | None:
        """Return the job of an event, None when there is none."""
        return next(iter(self.sql("SELECT * FROM jobs WHERE id = ?", str(job_of(event_id)))), None)

    def steps(self, event_id: str) -> dict[str, dict[str, Any]]:
        """Return the steps of an event by destination."""
        rows = self.sql("SELECT * FROM steps WHERE job_id = ?", str(job_of(event_id)))
        return {row["destination"]: row for row in rows}

    def log_rows(self, session: str) -> list[dict[str, Any]]:
        """Return the rows of ``upload_log`` for a session, oldest first."""
        return self.sql("SELECT * FROM upload_log WHERE session_identifier = ? ORDER BY id", session)


async def _fetch(url: str, query: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    parts = query.split("?")
    numbered = "".join(f"{part}${number}" for number, part in enumerate(parts[:-1], 1)) + parts[-1]
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        return [dict(row) for row in await connection.fetch(numbered, *values)]
    finally:
        await connection.close()


#: The file of a plugin. Each line of its ledger is written in one call, so that a kill cuts none.
PLUGIN = """\
import json
import os
import time
from pathlib import Path

from nexus_export import (
    Absent, ExportResult, Limits, Misconfigured, Partial, Permanent, Present, Transient, UnknownOutcome, Unsure,
)

LEDGER = Path({ledger!r})


def note(what, context, **facts):
    entry = dict(what=what, session=context.session_identifier, at=time.time(), pid=os.getpid(), **facts)
    with open(LEDGER, "ab", buffering=0) as file:
        file.write(json.dumps(entry).encode() + b"\\n")


def noted(what, context):
    if not LEDGER.exists():
        return []
    entries = [json.loads(line) for line in LEDGER.read_text().splitlines()]
    return [e for e in entries if e["what"] == what and e["session"] == context.session_identifier]


def done(context, **facts):
    return ExportResult(
        success=True, destination_name={name!r},
        record_id=context.session_identifier, record_url="https://{name}.test/" + context.session_identifier, **facts,
    )


class Plugin:
    name = {name!r}
    priority = {priority}
    enabled = True

    def validate_config(self):
        return True, None

{body}
"""

#: A plugin that notes each call and succeeds.
WORKS = """
async def export(self, context):
    note("export", context)
    return done(context)
"""


@contextmanager
def site(
    folder: Path,
    amqp_url: str,
    database_url: str | None = None,
    *,
    plugins: Mapping[str, str] | None = None,
    **settings: str,
) -> Iterator[tuple[Site, Bus]]:
    """Give an installation and a bus beside it; at the end every service must stop in order.

    After a failure the logs are printed.
    """
    here = Site(folder, amqp_url, database_url, **settings)
    for priority, (name, text) in zip(range(90, 0, -10), (plugins or {}).items(), strict=False):
        here.plugin(name, text, priority)
    try:
        with Bus(amqp_url) as bus:
            yield here, bus
        for service in here.running:
            if service.exit_code is None:
                service.shut_down()
    except BaseException:
        for service in here.running:
            sys.stderr.write(f"--- {service.log}\n{service.logged()}")
        raise
    finally:
        for service in here.running:
            if service.exit_code is None:
                service.kill()
