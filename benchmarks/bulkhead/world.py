"""An installation under proof: the real service, real RabbitMQ, and a server in a process of its own."""

import asyncio
import json
import secrets
import sys
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aio_pika
import aiohttp
import psutil

from benchmarks.bulkhead.figures import Met
from benchmarks.messages import BUILT, CONTENT_TYPE, DEAD_QUEUE, EXCHANGE, EXPORT_FAILED, EXPORTED, built
from tools.records import make_record
from tools.servers.ports import free_port
from tools.servers.process import Child, clean_environment, is_alive, tail
from tools.servers.rabbitmq import RabbitServer

PROJECT = Path(__file__).resolve().parents[2]
PLUGINS = Path(__file__).resolve().parent / "plugins"
START_SECONDS = 60.0
STOP_SECONDS = 30.0
LOOK_SECONDS = 0.1
CONFIRM_WINDOW = 100
RECORD_BYTES = 2_000
RECORD_FILES = 16
MEBIBYTE = 1024**2


class WorldError(Exception):
    """A run could not be brought to its end; the text says why."""


class World:
    """One run: its own folder, virtual host, database, server and services, all ended by their ids."""

    def __init__(
        self,
        rabbit: RabbitServer,
        folder: Path,
        destinations: Sequence[str],
        *,
        database_url: str | None = None,
        **settings: str,
    ) -> None:
        name = f"run-{secrets.token_hex(4)}"
        self.folder = folder / name
        self.destinations = tuple(destinations)
        self.outcomes: Counter[str] = Counter()
        self.services: list[Child] = []
        self._rabbit = rabbit
        self._vhost = name
        self._port = free_port()
        self._settings = {
            "NX_DATABASE_URL": database_url or f"sqlite:///{self.folder}/run.db",
            "NX_RECORDS_PATH": str(self.folder / "records"),
            "NX_SPOOL_PATH": str(self.folder / "spool"),
            "NX_DESTINATIONS_PATH": str(PLUGINS),
            "NX_LOG_FORMAT": "json",
            **{f"NX_{item.upper()}_URL": f"http://127.0.0.1:{self._port}/" for item in destinations},
            **settings,
        }
        self._records: list[dict[str, Any]] = []
        self._published = 0
        self._server: Child
        self._http: aiohttp.ClientSession
        self._connection: aio_pika.abc.AbstractConnection
        self._channel: aio_pika.abc.AbstractChannel
        self._exchange: aio_pika.abc.AbstractExchange

    async def __aenter__(self) -> Self:
        (self.folder / "records").mkdir(parents=True)
        self._write_records()
        self._settings["NX_AMQP_URL"] = url = self._rabbit.create_vhost(self._vhost)
        self._server = Child(
            [sys.executable, "-m", "benchmarks.bulkhead.server", "--port", str(self._port)],
            env=clean_environment(PYTHONPATH=str(PROJECT)), log=self.folder / "server.log", cwd=self.folder,
        )  # fmt: skip
        self._http = aiohttp.ClientSession(f"http://127.0.0.1:{self._port}")
        self._connection = await aio_pika.connect(url)
        self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        self._exchange = await self._channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await self._channel.declare_queue(exclusive=True)
        for key in (EXPORTED, EXPORT_FAILED):
            await queue.bind(self._exchange, key)
        await queue.consume(self._hear, no_ack=True)
        await self.until(self._answers, START_SECONDS, "the server")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for service in self.services:
            service.kill()
        self._server.kill()
        await self._http.close()
        await self._connection.close()
        self._rabbit.delete_vhost(self._vhost)

    # --- the services ------------------------------------------------------------------------------------------

    async def start(self) -> Child:
        """Start a service and return when it consumes."""
        log = self.folder / f"service-{time.monotonic_ns()}.log"
        environment = clean_environment(**self._settings, PYTHONPATH=str(PROJECT))
        command = [sys.executable, "-m", "consumer", "run"]
        service = Child(command, env=environment, log=log, cwd=self.folder)
        self.services.append(service)

        async def ready() -> bool:
            return b'"broker_connected"' in log.read_bytes()

        await self.until(ready, START_SECONDS, "the service")
        return service

    def kill(self, service: Child) -> None:
        """SIGKILL a service."""
        self.services.remove(service)
        service.kill()

    def resident_mb(self) -> float:
        """Return the resident memory of all services, in MiB."""
        return sum(float(psutil.Process(service.pid).memory_info().rss) for service in self.services) / MEBIBYTE

    async def sample_memory(self, samples: list[tuple[float, float]], every_seconds: float = 0.5) -> None:
        """Add (time, MiB) to the samples until cancelled."""
        while True:
            samples.append((time.monotonic(), self.resident_mb()))
            await asyncio.sleep(every_seconds)

    async def until(self, condition: Callable[[], Awaitable[object]], seconds: float, what: str) -> None:
        """Wait for a condition; ``WorldError`` when it does not come, or a process ends meanwhile."""
        ends_at = time.monotonic() + seconds
        while not await condition():
            for child in (self._server, *self.services):
                if not is_alive(child.pid):
                    raise WorldError(f"{what}: a process ended by itself{tail(child.log)}")
            if time.monotonic() > ends_at:
                log = self.services[-1].log if self.services else None
                raise WorldError(f"{what}: not within {seconds:g} s{tail(log)}")
            await asyncio.sleep(LOOK_SECONDS)

    # --- the server --------------------------------------------------------------------------------------------

    async def behave(self, destination: str, kind: str = "well", **details: Any) -> None:
        """Tell the server how a destination behaves from now on."""
        async with self._http.post(f"/control/{destination}", json={"kind": kind, **details}) as answer:
            answer.raise_for_status()

    async def ledger(self, destination: str) -> list[Met]:
        """Return all requests of a destination, oldest first."""
        return [Met(*row) for row in (await self._ask("ledger", destination))["requests"]]

    async def closings(self, destination: str) -> list[tuple[float, float]]:
        """Return when a destination refused everything: from when to when."""
        return [(start, end) for start, end in (await self._ask("ledger", destination))["closings"]]

    async def copies(self, destination: str) -> int:
        """Return how many records a destination has."""
        return int((await self._ask("count", destination))["copies"])

    async def until_copied(self, destinations: Sequence[str], count: int, seconds: float) -> None:
        """Wait until these destinations have so many records each."""

        async def copied() -> bool:
            return all([await self.copies(item) >= count for item in destinations])

        await self.until(copied, seconds, f"{count} records at {', '.join(destinations)}")

    async def _ask(self, what: str, destination: str) -> dict[str, Any]:
        async with self._http.get(f"/{what}/{destination}") as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def _answers(self) -> bool:
        with suppress(aiohttp.ClientError):
            await self._ask("count", "none")
            return True
        return False

    # --- the broker --------------------------------------------------------------------------------------------

    async def publish(self, count: int, *, per_second: float = 0.0, **data: Any) -> dict[str, float]:
        """Publish records, at once or at a steady rate; returns when each session was published."""
        window = asyncio.Semaphore(CONFIRM_WINDOW)
        published: dict[str, float] = {}
        began = time.monotonic()

        async def publish(session: str, at: float) -> None:
            await asyncio.sleep(at - time.monotonic())
            async with window:
                published[session] = time.monotonic()
                await self._exchange.publish(self._message(session, data), BUILT, mandatory=True)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                self._published += 1
                at = began + number / per_second if per_second else began
                group.create_task(publish(f"session-{self._published:06}", at))
        return published

    async def dead_letters(self) -> int:
        """Return how many dead letters there are."""
        queue = await self._channel.declare_queue(DEAD_QUEUE, passive=True)
        return queue.declaration_result.message_count or 0

    async def _hear(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self.outcomes[message.routing_key or ""] += 1

    def _message(self, session: str, data: Mapping[str, Any]) -> aio_pika.Message:
        event = json.loads(json.dumps(self._records[self._published % RECORD_FILES]))
        event |= {"id": str(uuid.uuid4()), "subject": session}
        event["data"] |= {"session_identifier": session, **data}
        return aio_pika.Message(
            json.dumps(event).encode(), content_type=CONTENT_TYPE, delivery_mode=aio_pika.DeliveryMode.PERSISTENT
        )

    def _write_records(self) -> None:
        """Write some record files; every session has the content of one of them."""
        records = [make_record(index, size=RECORD_BYTES) for index in range(RECORD_FILES)]
        for record in records:
            (self.folder / "records" / record.name).write_bytes(record.content)
        self._records = [json.loads(event.body) for event in built(records)]
