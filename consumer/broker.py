"""RabbitMQ: connection, topology, deliveries in, messages out with confirms; the only door to aio-pika.

One plain connection with two channels, made anew as a whole when anything on it breaks: aio-pika's robust
connection cancels callbacks, caches queue depths and cannot tell which deliveries are still ours.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import aio_pika
import aiormq
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractIncomingMessage
from aiormq.abc import AbstractChannel as RawChannel
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from consumer.errors import ConfigurationError, NexusExportError
from consumer.events import BUILT, EXPORT_FAILED, EXPORTED, STRUCTURED_TYPE
from consumer.telemetry import get_logger

WORK_QUEUE = "nexuslims.export"
DEAD_QUEUE = "nexuslims.export.dead"
PREFETCH = 512
CONFIRM_SECONDS = 15.0
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 3.0
RECONNECT_MAX_SECONDS = 5.0

#: 4.x counts a delivery limit of -1 as none, 3.10 dead-letters at the first requeue: always a positive number.
WORK_ARGUMENTS: dict[str, Any] = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 1000,
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": DEAD_QUEUE,
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}
DEAD_ARGUMENTS: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}

_log = get_logger()
_LOST = (
    aiormq.exceptions.AMQPError,
    aiormq.exceptions.ChannelInvalidStateError,
    ConnectionError,
    OSError,
    TimeoutError,
)


class BrokerAwayError(NexusExportError):
    """RabbitMQ cannot be reached now; the message stays in the outbox."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that waits for its ack. ``body`` and ``headers`` are as they came."""

    channel: RawChannel
    tag: int
    body: bytes
    content_type: str | None
    headers: dict[str, Any]
    redelivered: bool

    async def ack(self, *, all_before: bool = False) -> None:
        """Tell the broker that this message (and all before it) is in the database.

        A lost channel is no error: the broker delivers again and the inbox knows the event.
        """
        try:
            await self.channel.basic_ack(self.tag, multiple=all_before)
        except _LOST:
            _log.info("ack_lost", reason="the channel closed first; the broker delivers again")


class Broker:
    """A connection that mends itself. ``deliveries`` is the stream of ``record.built`` messages."""

    def __init__(self, url: str, exchange: str, *, name: str = "nexus-export", prefetch: int = PREFETCH) -> None:
        self.url = url
        self._exchange_name = exchange
        self._name = name
        self._prefetch = prefetch
        self.deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        self._publishing: RawChannel | None = None
        self._ready = asyncio.Event()
        self._broken = asyncio.Event()
        self._may_consume = asyncio.Event()
        self._may_consume.set()
        self.connected_before = False
        #: how often the work queue was found missing since the start
        self.work_queue_losses = 0

    @property
    def connected(self) -> bool:
        """Tell whether messages can be published now."""
        return self._ready.is_set()

    async def wait_until_ready(self) -> None:
        """Return as soon as messages can be published."""
        await self._ready.wait()

    async def run(self) -> None:
        """Keep a session up until cancelled.

        Raises ``ConfigurationError`` when the first answer of the broker shows that a person must act.
        """
        pause = 0.5
        while True:
            try:
                async with self._session() as session:
                    pause = 0.5
                    self.connected_before = True
                    await self._consume_until_broken(session)
            except _LOST as error:
                problem = explain(error, self.url)
                if isinstance(error, _FATAL) and not self.connected_before:
                    raise ConfigurationError(problem) from None
                _log.warning("broker_lost", reason=problem, retry_in_seconds=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, RECONNECT_MAX_SECONDS)

    def pause(self) -> None:
        """Stop taking deliveries and give those that wait back to the queue (the database is away)."""
        if self._may_consume.is_set():
            self._may_consume.clear()
            self._broken.set()

    def resume(self) -> None:
        """Take deliveries again."""
        self._may_consume.set()

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aio_pika.abc.AbstractConnection]:
        self._broken.clear()
        connection = await connect(self.url, self._name)
        try:
            publishing = await connection.channel(publisher_confirms=True)
            if self.connected_before and not await _has_work_queue(connection):
                self._work_queue_gone()
            await declare_topology(publishing, self._exchange_name)
            self._publishing = await publishing.get_underlay_channel()
            connection.close_callbacks.add(self._on_break)
            publishing.close_callbacks.add(self._on_break)
            self._ready.set()
            _log.info("broker_connected", address=shown(self.url))
            yield connection
        finally:
            self._ready.clear()
            self._publishing = None
            await _close_quietly(connection)

    async def _consume_until_broken(self, connection: aio_pika.abc.AbstractConnection) -> None:
        while not connection.is_closed:
            await self._wait_for_leave(connection)
            if connection.is_closed or self._publishing is None or self._publishing.is_closed:
                return
            channel = await connection.channel(publisher_confirms=False)
            channel.close_callbacks.add(self._on_break)
            await channel.set_qos(prefetch_count=self._prefetch)
            raw = await channel.get_underlay_channel()
            raw.on_consumer_cancel_callbacks.add(self._on_cancel)
            self._broken.clear()
            # a quorum queue without a leader never answers
            await raw.basic_consume(WORK_QUEUE, self._on_message, timeout=CONFIRM_SECONDS)
            try:
                await self._broken.wait()
            finally:
                # what waits belongs to this channel: closing it gives every delivery back to the queue
                self._drop_deliveries()
                await _close_quietly(channel)
            if self._may_consume.is_set():
                return

    async def _wait_for_leave(self, connection: aio_pika.abc.AbstractConnection) -> None:
        while not self._may_consume.is_set() and not connection.is_closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._may_consume.wait()

    def _drop_deliveries(self) -> None:
        while not self.deliveries.empty():
            self.deliveries.get_nowait()

    def _on_break(self, *_: Any) -> None:
        self._broken.set()

    def _on_cancel(self, *_: Any) -> None:
        """Hear that the broker ended our consumer: its queue was deleted or moved."""
        self._work_queue_gone()
        self._broken.set()

    def _work_queue_gone(self) -> None:
        self.work_queue_losses += 1
        _log.error(
            "work_queue_gone", queue=WORK_QUEUE,
            consequence="it is declared again; what was in it or was published meanwhile may be lost",
        )  # fmt: skip

    async def _on_message(self, message: DeliveredMessage) -> None:
        properties = message.header.properties
        self.deliveries.put_nowait(
            Delivery(
                message.channel, message.delivery_tag or 0, message.body, properties.content_type,
                dict(properties.headers or {}), bool(message.redelivered),
            )
        )  # fmt: skip

    async def publish(
        self, *, exchange: str, routing_key: str, body: bytes, message_id: str,
        content_type: str, headers: dict[str, Any], kind: str,
    ) -> bool:  # fmt: skip
        """Publish one persistent message and wait for the confirm. Returns whether a queue took it.

        ``exchange`` empty: straight to the queue named by ``routing_key``. A time-out does not mean that the
        message was refused: it is sent again with the same id. Raises ``BrokerAwayError``.
        """
        channel = self._publishing
        if channel is None:
            raise BrokerAwayError
        properties = Basic.Properties(
            content_type=content_type, message_id=message_id, message_type=kind, headers=headers, delivery_mode=2
        )
        try:
            answer = await channel.basic_publish(
                body, exchange=exchange, routing_key=routing_key, properties=properties, mandatory=True,
                timeout=CONFIRM_SECONDS,
            )  # fmt: skip
        except _LOST as error:
            raise BrokerAwayError(str(error) or type(error).__name__) from None
        return not isinstance(answer, DeliveredMessage)

    def reconnect(self) -> None:
        """Make the session anew, declaring every queue again (one that we need is gone)."""
        self._broken.set()


_FATAL = (
    aiormq.exceptions.ProbableAuthenticationError,
    aiormq.exceptions.AuthenticationError,
    aiormq.exceptions.ChannelPreconditionFailed,
    aiormq.exceptions.ChannelAccessRefused,
    aiormq.exceptions.ConnectionNotAllowed,
)


async def connect(url: str, name: str) -> aio_pika.abc.AbstractConnection:
    """Open a plain connection with a name that the management pages show."""
    try:
        return await aio_pika.connect(
            url, timeout=CONNECT_SECONDS, client_properties={"connection_name": name}, heartbeat=20
        )
    except aiormq.exceptions.InvalidFrameError as error:
        if "Connection.OpenOk" not in str(error):
            raise
        # aiormq loses the broker's own words: it closed the connection instead of opening the virtual host
        raise aiormq.exceptions.ConnectionNotAllowed(urlsplit(url).path.lstrip("/") or "/") from None
    except ValueError as error:
        message = f"NX_AMQP_URL is not an AMQP address (amqp://user:password@host/): {error}"
        raise ConfigurationError(message) from None


async def _has_work_queue(connection: aio_pika.abc.AbstractConnection) -> bool:
    channel = await connection.channel()
    try:
        await channel.declare_queue(WORK_QUEUE, passive=True)
    except aiormq.exceptions.ChannelNotFoundEntity:
        return False
    await channel.close()
    return True


async def declare_topology(channel: AbstractChannel, exchange_name: str) -> AbstractExchange:
    """Declare exchange, dead letters and work queue; the same declaration again changes nothing."""
    exchange = await channel.declare_exchange(exchange_name, aio_pika.ExchangeType.TOPIC, durable=True)
    await channel.declare_queue(DEAD_QUEUE, durable=True, arguments=DEAD_ARGUMENTS)
    queue = await channel.declare_queue(WORK_QUEUE, durable=True, arguments=WORK_ARGUMENTS)
    await queue.bind(exchange, BUILT)
    return exchange


async def _close_quietly(closable: Any) -> None:
    """Close a channel or connection; one that does not answer is left behind.

    Not by ``wait_for``: that waits until the inner task has taken its cancellation, and a close that hangs on a
    channel cut in the middle of its own close never does.
    """
    closing = asyncio.ensure_future(closable.close())
    done, _ = await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
    if not done:
        closing.cancel()
    elif not closing.cancelled() and isinstance(closing.exception(), Exception):
        _log.debug("close_failed", reason=str(closing.exception()))


def explain(error: BaseException, url: str) -> str:
    """Say in a sentence what is wrong with the broker and what to do."""
    where = shown(url)
    if isinstance(error, aiormq.exceptions.ProbableAuthenticationError | aiormq.exceptions.AuthenticationError):
        return f"RabbitMQ at {where} refuses the user or password in NX_AMQP_URL"
    if isinstance(error, aiormq.exceptions.ConnectionNotAllowed):
        return f"RabbitMQ at {where}: no such virtual host, or no right to it (NX_AMQP_URL): {error}"
    if isinstance(error, aiormq.exceptions.ChannelPreconditionFailed):
        return (
            f"a queue or exchange at {where} exists with other arguments: {error}. "
            "Move its messages away and delete it; it is declared again with the right ones"
        )
    if isinstance(error, aiormq.exceptions.ChannelAccessRefused):
        return f"the user in NX_AMQP_URL lacks a right at {where}: {error}"
    return f"RabbitMQ at {where} cannot be reached (NX_AMQP_URL): {error or type(error).__name__}"


def shown(url: str) -> str:
    """Return the address without user and password."""
    parts = urlsplit(url)
    return f"{parts.hostname or '?'}:{parts.port or 5672}{parts.path}"


async def queue_depths(url: str) -> dict[str, int | None]:
    """Return the number of ready messages in our queues, None for a queue that is not there.

    Uses a connection of its own: passive declarations on a used channel close it on a missing queue.
    Raises ``BrokerAwayError`` with a sentence.
    """
    depths: dict[str, int | None] = {}
    try:
        connection = await connect(url, "nexus-export-status")
        try:
            for name in (WORK_QUEUE, DEAD_QUEUE):
                channel = await connection.channel()
                try:
                    queue = await channel.declare_queue(name, passive=True)
                    depths[name] = queue.declaration_result.message_count
                except aiormq.exceptions.ChannelNotFoundEntity:
                    depths[name] = None
        finally:
            await _close_quietly(connection)
    except _LOST as error:
        raise BrokerAwayError(explain(error, url)) from None
    return depths


class Client:
    """A short connection for commands: publishes events, and hears the outcomes of the whole exchange."""

    def __init__(self, url: str, exchange: str) -> None:
        self._url = url
        self._exchange_name = exchange
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._exchange: AbstractExchange | None = None
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        """Connect and declare the topology. Raises ``BrokerAwayError`` with a sentence."""
        try:
            self._connection = await connect(self._url, "nexus-export-client")
            channel = await self._connection.channel(publisher_confirms=True)
            self._exchange = await declare_topology(channel, self._exchange_name)
        except _LOST as error:
            raise BrokerAwayError(explain(error, self._url)) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._connection is not None:
            await _close_quietly(self._connection)

    async def listen(self) -> None:
        """Begin to put the bodies of all outcome events from now on into ``heard``."""
        if self._connection is None or self._exchange is None:
            raise BrokerAwayError
        channel = await self._connection.channel(publisher_confirms=False)
        await channel.set_qos(prefetch_count=100)
        queue = await channel.declare_queue(exclusive=True, auto_delete=True)
        for key in (EXPORTED, EXPORT_FAILED):
            await queue.bind(self._exchange, key)

        async def take(message: AbstractIncomingMessage) -> None:
            self.heard.put_nowait(message.body)

        await queue.consume(take, no_ack=True)

    async def publish(self, body: bytes, event_id: str) -> None:
        """Publish a ``record.built`` and wait for the confirm. Raises ``BrokerAwayError``."""
        if self._exchange is None:
            raise BrokerAwayError
        message = aio_pika.Message(
            body, message_id=event_id, content_type=STRUCTURED_TYPE, type=BUILT,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )  # fmt: skip
        try:
            answer = await self._exchange.publish(message, BUILT, mandatory=True, timeout=CONFIRM_SECONDS)
        except _LOST as error:
            raise BrokerAwayError(explain(error, self._url)) from None
        if isinstance(answer, DeliveredMessage):
            message_text = f"no queue takes {BUILT} at {shown(self._url)}"
            raise BrokerAwayError(message_text)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # before Python 3.12 wait_for loses a Ctrl-C that comes together with the confirm
            raise asyncio.CancelledError
