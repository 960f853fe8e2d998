"""Wakes the next stage at once; without them each stage would look once a second."""

import asyncio
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Signals:
    """``records``: jobs wait for their snapshot; ``steps``: steps may be due; ``outcomes``: the outbox has mail."""

    records: asyncio.Event = field(default_factory=asyncio.Event)
    steps: asyncio.Event = field(default_factory=asyncio.Event)
    outcomes: asyncio.Event = field(default_factory=asyncio.Event)


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Return when the event is set, or after the given time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
