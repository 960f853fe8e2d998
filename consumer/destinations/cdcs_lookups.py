"""What is looked up at CDCS once in a while: the schema that records are uploaded with, and the public workspace."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from consumer.destinations.cdcs_api import CdcsApi
from consumer.destinations.cdcs_rules import Template, choose_template
from consumer.errors import Misconfigured

#: A new schema version is used at the latest after this time.
KEEP_SECONDS = 600.0

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """A value that is looked up once in a while, by one task for all that wait."""

    def __init__(self, look_up: Callable[[], Awaitable[Value]], clock: Callable[[], float] = time.monotonic) -> None:
        self._look_up = look_up
        self._clock = clock
        self._lock = asyncio.Lock()
        self._held: tuple[Value, float] | None = None

    async def get(self) -> Value:
        """Return the value, at most ten minutes old."""
        async with self._lock:
            if self._held is not None and self._clock() < self._held[1]:
                return self._held[0]
            return await self.renew()

    async def renew(self) -> Value:
        """Look the value up now."""
        asked = self._clock()
        value = await self._look_up()
        self._held = (value, asked + KEEP_SECONDS)
        return value

    def forget(self) -> None:
        """Let the next one look it up."""
        self._held = None


async def look_up_template(api: CdcsApi, title: str) -> Template:
    """Return the schema with a title. Raises ``Misconfigured`` with the titles that there are."""
    named = await api.templates(title)
    try:
        return choose_template(named, title)
    except Misconfigured:
        return choose_template(await api.templates(), title)


async def look_up_workspace(api: CdcsApi) -> int:
    """Return the public workspace. Raises ``Misconfigured`` when there is none."""
    public = [int(workspace["id"]) for workspace in await api.workspaces() if workspace.get("is_public")]
    if not public:
        raise Misconfigured(
            "CDCS has no public workspace that NX_CDCS_TOKEN may read, so nobody would see the records; make a "
            "workspace public there, or set NX_CDCS_ASSIGN_TO_PUBLIC_WORKSPACE=false"
        )
    return min(public)
