"""Sends what the outbox holds, with confirms; nothing in the database is forgotten (T5)."""

import asyncio

from consumer.broker import Broker, BrokerAwayError
from consumer.pipeline.signals import Signals, wait
from consumer.store import outbox
from consumer.store.connection import Connection, Database, DatabaseError
from consumer.store.rows import Message
from consumer.telemetry import get_logger

BATCH = 256
IDLE_SECONDS = 1.0

_log = get_logger()


class OutboxRelay:
    """Publishes unsent messages in their order of writing, a batch of confirms at a time."""

    def __init__(self, database: Database, broker: Broker, signals: Signals) -> None:
        self._database = database
        self._broker = broker
        self._signals = signals

    async def run(self) -> None:
        """Relay until cancelled; with the broker or the database away it waits for them."""
        while True:
            await self._broker.wait_until_ready()
            self._signals.outcomes.clear()
            try:
                sent, failed = await self.relay_once()
            except DatabaseError as error:
                _log.error("outbox_database_away", reason=str(error).splitlines()[0])
                sent, failed = 0, 1
            if failed:
                await asyncio.sleep(IDLE_SECONDS)
            elif sent == 0:
                await wait(self._signals.outcomes, IDLE_SECONDS)

    async def relay_once(self) -> tuple[int, int]:
        """Send one batch; returns how many were confirmed and how many must be sent again."""
        if self._database.is_sqlite:
            async with self._database.read() as connection:
                batch = await outbox.unsent(connection, BATCH, lock=False)
            if not batch:
                return 0, 0
            done = await self._publish(batch)
            async with self._database.write() as connection:
                await self._mark(connection, done)
        else:
            # the rows stay locked until the confirm, so that two relays never send the same message
            async with self._database.write() as connection:
                batch = await outbox.unsent(connection, BATCH, lock=True)
                done = await self._publish(batch)
                await self._mark(connection, done)
        return len(done), len(batch) - len(done)

    async def _mark(self, connection: Connection, done: list[tuple[int, bool]]) -> None:
        await outbox.mark_sent(connection, done, await self._database.now(connection))

    async def _publish(self, batch: list[Message]) -> list[tuple[int, bool]]:
        answers = await asyncio.gather(*(self._send(message) for message in batch))
        return [
            (message.seq, answer == "unrouted")
            for message, answer in zip(batch, answers, strict=True)
            if answer != "failed"
        ]

    async def _send(self, message: Message) -> str:
        try:
            routed = await self._broker.publish(
                exchange=message.exchange,
                routing_key=message.routing_key,
                body=message.body,
                message_id=message.message_id,
                content_type=message.content_type,
                headers=message.headers,
                kind=message.kind,
            )
        except BrokerAwayError as error:
            _log.warning("publish_failed", message_id=message.message_id, reason=str(error))
            return "failed"
        if routed:
            return "sent"
        if message.exchange == "":
            # a dead letter has only one place to go: declare its queue again and send it there
            _log.error("dead_letter_unroutable", queue=message.routing_key)
            self._broker.reconnect()
            return "failed"
        return "unrouted"
