"""How stages wake each other, and what they hand on without asking the database for it again.

Everything handed on is committed before, so losing it costs nothing: each stage also looks into the database.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from consumer.store.rows import JobRow, Message

T = TypeVar("T")

#: More than this does not wait in memory; the rest is found in the database.
HANDOFF_LIMIT = 2048


class Handoff(Generic[T]):
    """Rows on their way to the next stage."""

    def __init__(self, limit: int = HANDOFF_LIMIT) -> None:
        self._items: deque[T] = deque()
        self._limit = limit
        self.event = asyncio.Event()

    def has_room(self, count: int) -> bool:
        """Tell whether so many rows would be taken on."""
        return len(self._items) + count <= self._limit

    def give(self, items: Iterable[T]) -> None:
        """Hand rows on as far as there is room, and wake the next stage."""
        for item in items:
            if len(self._items) >= self._limit:
                break
            self._items.append(item)
        self.event.set()

    def take(self, limit: int) -> list[T]:
        """Take the oldest rows."""
        return [self._items.popleft() for _ in range(min(limit, len(self._items)))]

    def clear(self) -> None:
        """Forget all; they are found in the database."""
        self._items.clear()


@dataclass(frozen=True, slots=True)
class Signals:
    """``records``: jobs whose record is to be kept; ``steps``: some may be due; ``outcomes``: mail to send."""

    records: Handoff[JobRow] = field(default_factory=Handoff)
    steps: asyncio.Event = field(default_factory=asyncio.Event)
    outcomes: Handoff[Message] = field(default_factory=Handoff)


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Return when the event is set, or after the given time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
