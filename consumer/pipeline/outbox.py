"""Sends what the outbox holds, with confirms; nothing in the database is forgotten (T5)."""

import asyncio
import time
from datetime import datetime, timedelta

from consumer.broker import Broker, BrokerAwayError
from consumer.pipeline.signals import Signals, wait
from consumer.store import outbox
from consumer.store.connection import Database, DatabaseError
from consumer.store.rows import Message
from consumer.telemetry import get_logger

BATCH = 256
IDLE_SECONDS = 1.0
#: Younger messages are on their way through memory; the look into the database leaves them alone.
YOUNG_SECONDS = 3.0

_log = get_logger()


class OutboxRelay:
    """Publishes unsent messages, a batch of confirms at a time."""

    def __init__(self, database: Database, broker: Broker, signals: Signals) -> None:
        self._database = database
        self._broker = broker
        self._fresh = signals.outcomes
        self._looked_at = -IDLE_SECONDS
        self._looks_at_all = True
        #: confirmed, but not marked: (kind, id) and whether no queue took it
        self._confirmed: dict[tuple[str, str], bool] = {}

    async def run(self) -> None:
        """Relay until cancelled; with the broker or the database away it waits for them."""
        while True:
            await self._broker.wait_until_ready()
            self._fresh.event.clear()
            try:
                sent, failed = await self.relay_once()
            except DatabaseError as error:
                _log.error("outbox_database_away", reason=str(error).splitlines()[0])
                self._looks_at_all = True
                sent, failed = 0, 1
            if failed:
                # they are in the database and are found there again
                self._fresh.clear()
                await asyncio.sleep(IDLE_SECONDS)
            elif sent == 0:
                await wait(self._fresh.event, IDLE_SECONDS)

    async def relay_once(self) -> tuple[int, int]:
        """Send one batch; returns how many were confirmed and how many must be sent again."""
        if time.monotonic() - self._looked_at >= IDLE_SECONDS:
            if self._looks_at_all:
                self._fresh.clear()  # all of it is in the database too
            sent, failed = await self._send_stored()
            if sent + failed == BATCH:
                return sent, failed
            self._looked_at, self._looks_at_all = time.monotonic(), False
            self._confirmed.clear()
        else:
            sent, failed = 0, 0
        fresh_sent, fresh_failed = await self._send_and_mark(self._fresh.take(BATCH))
        return sent + fresh_sent, failed + fresh_failed

    async def _send_and_mark(self, batch: list[Message]) -> tuple[int, int]:
        done = await self._send_once(batch)
        if done:
            async with self._database.write() as connection:
                await outbox.mark_sent(connection, done, await self._database.now(connection))
            self._forget(done)
        return len(done), len(batch) - len(done)

    async def _send_once(self, batch: list[Message]) -> list[tuple[Message, bool]]:
        """Send what is not confirmed yet, so that a database that is full does not make the relay repeat itself."""
        for message, unrouted in await self._publish([item for item in batch if _key(item) not in self._confirmed]):
            self._confirmed[_key(message)] = unrouted
        return [(item, self._confirmed[_key(item)]) for item in batch if _key(item) in self._confirmed]

    def _forget(self, marked: list[tuple[Message, bool]]) -> None:
        for message, _ in marked:
            self._confirmed.pop(_key(message), None)

    async def drain(self) -> None:
        """Send everything that is unsent, at a stop."""
        self._looks_at_all = True
        while True:
            self._looked_at = -IDLE_SECONDS
            sent, failed = await self.relay_once()
            if not sent or failed:
                return

    async def _send_stored(self) -> tuple[int, int]:
        """Send what the database still holds: from before a crash, or what could not be sent."""
        if self._database.is_sqlite:
            async with self._database.read() as connection:
                batch = await outbox.unsent(connection, self._cutoff(await self._database.now(connection)), BATCH)
            return await self._send_and_mark(batch)
        # the rows stay locked until the confirm, so that two relays do not send the same message
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            batch = await outbox.unsent(connection, self._cutoff(now), BATCH, lock=True)
            done = await self._send_once(batch)
            await outbox.mark_sent(connection, done, now)
        self._forget(done)
        return len(done), len(batch) - len(done)

    def _cutoff(self, now: datetime) -> datetime:
        return now if self._looks_at_all else now - timedelta(seconds=YOUNG_SECONDS)

    async def _publish(self, batch: list[Message]) -> list[tuple[Message, bool]]:
        answers = await asyncio.gather(*(self._send(message) for message in batch))
        return [
            (message, answer == "unrouted")
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


def _key(message: Message) -> tuple[str, str]:
    return message.kind, message.message_id
