"""A record builder and a listener in one thread, with plain aio-pika; both outlive any death of the broker."""

import asyncio
import hashlib
import json
import threading
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import aio_pika
from yarl import URL

from tools.records import make_record

EXCHANGE = "nexuslims.records"
WORK_QUEUE = "nexuslims.export"
DEAD_QUEUE = "nexuslims.export.dead"
OWN_QUEUE = "storm.outcomes"
SOURCE = "urn:example:storm"
OUTCOMES = ("record.exported", "record.export_failed")
RECORD_BYTES = 2_000
PAUSE_SECONDS = 0.1
ANSWER_SECONDS = 10.0

#: What aio-pika and its parts raise when the broker goes away at any moment.
_LOST = (aio_pika.exceptions.AMQPError, ConnectionError, OSError, TimeoutError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Announced:
    """A record and the event that announces it."""

    event_id: str
    session: str
    sha256: str
    body: bytes


def announce(folder: Path, count: int, seed: int) -> list[Announced]:
    """Write that many record files and their events."""
    folder.mkdir(parents=True)
    made = []
    for index in range(count):
        record = make_record(index, seed=seed, size=RECORD_BYTES)
        (folder / record.name).write_bytes(record.content)
        digest = hashlib.sha256(record.content).hexdigest()
        event = {
            "specversion": "1.0",
            "id": str(uuid.uuid4()),
            "source": SOURCE,
            "type": "record.built",
            "subject": record.session,
            "time": datetime.now(UTC).isoformat(),
            "datacontenttype": "application/json",
            "data": {
                "session_identifier": record.session,
                "record": {"path": record.name, "sha256": digest, "size": len(record.content)},
            },
        }
        made.append(Announced(str(event["id"]), record.session, digest, json.dumps(event).encode()))
    return made


class Traffic:
    """Publishes events at a steady pace, up to ``quota`` of them, and collects outcomes from a durable queue."""

    def __init__(self, url: str, events: Sequence[Announced], interval: float) -> None:
        self._url = url
        self._events = events
        self._interval = interval
        self._loop: asyncio.AbstractEventLoop
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._both()), name="traffic")
        self._tasks: list[asyncio.Task[None]] = []
        self.quota = 0
        self.published = 0
        self.listening = threading.Event()
        self.heard: list[dict[str, Any]] = []
        self.causes: set[str] = set()
        #: what ended the traffic before its time
        self.failure: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join()

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _both(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(self._again(work)) for work in (self._listen, self._publish)]
        self._up.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _again(self, work: Callable[[aio_pika.abc.AbstractChannel], Awaitable[None]]) -> None:
        """Repeat work on a new connection until it comes to its end."""
        while True:
            # not connect(): a connection that finds no broker has to be closed too
            connection = aio_pika.Connection(URL(self._url))
            try:
                await connection.connect(timeout=ANSWER_SECONDS)
                await work(await connection.channel(publisher_confirms=True, on_return_raises=True))
            except _LOST:
                await asyncio.sleep(PAUSE_SECONDS)
            except asyncio.CancelledError:  # the library cancels what waits on a lost channel
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
            except Exception as error:
                self.failure = error
                raise
            else:
                return
            finally:
                with suppress(*_LOST):
                    await connection.close()

    async def _listen(self, channel: aio_pika.abc.AbstractChannel) -> None:
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(OWN_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        for key in OUTCOMES:
            await queue.bind(exchange, key)
        self.listening.set()
        while True:
            message = await queue.get(fail=False, timeout=ANSWER_SECONDS)
            if message is None:
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            event = json.loads(message.body)
            self.heard.append(event)
            self.causes.add(event["data"]["cause"]["id"])
            await message.ack()

    async def _publish(self, channel: aio_pika.abc.AbstractChannel) -> None:
        """Publish what is left; an event without a confirm is published again, with the same id."""
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        while self.published < len(self._events):
            if self.published >= self.quota:
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            message = aio_pika.Message(
                self._events[self.published].body,
                content_type="application/cloudevents+json",
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            )
            # without a queue (the consumer has not declared it yet) it comes back: a DeliveryError, then again
            await exchange.publish(message, "record.built", mandatory=True, timeout=ANSWER_SECONDS)
            self.published += 1
            await asyncio.sleep(self._interval)


async def queue_lengths(url: str) -> dict[str, int]:
    """Return how many messages wait at the consumer's queues."""
    connection = await aio_pika.connect(url, timeout=ANSWER_SECONDS)
    async with connection:
        channel = await connection.channel()
        queues = [await channel.declare_queue(name, passive=True) for name in (WORK_QUEUE, DEAD_QUEUE)]
        return {queue.name: queue.declaration_result.message_count or 0 for queue in queues}
