"""Pace: the least time between two requests to a destination, kept by all processes through the store."""

import asyncio

from consumer.errors import Transient
from consumer.store import lanes
from consumer.store.connection import Database, DatabaseError

#: What the way to the server may take longer for one request than for the next must not eat into the spacing.
JITTER_SECONDS = 0.07


class Pace:
    """Gives out turns, each at least ``interval_seconds`` after the one before, whichever process took that."""

    def __init__(self, database: Database, destination: str, interval_seconds: float) -> None:
        self._database = database
        self._destination = destination
        self._interval = interval_seconds + JITTER_SECONDS

    async def turn(self) -> None:
        """Wait for the next turn; one that is not used after all is lost."""
        try:
            async with self._database.write() as connection:
                now = await self._database.now(connection)
                at = await lanes.take_turn(
                    connection, self._destination, now, self._interval, is_sqlite=self._database.is_sqlite
                )
        except DatabaseError as error:  # the request has not left
            message = f"no turn for a request: {str(error).splitlines()[0]}"
            raise Transient(message, code="busy") from None
        await asyncio.sleep((at - self._database.clock()).total_seconds())
