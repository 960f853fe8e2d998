"""A destination whose every request passes points; its file is copied into the folder of plugins.

As the repositories, its server knows no idempotency key and commits what it got though the client has gone.
"""

import asyncio
from typing import Any

import aiohttp
from pydantic import BaseModel

from nexus_export import (
    Absent,
    ExportContext,
    ExportResult,
    Partial,
    Permanent,
    Present,
    Transient,
    UnknownOutcome,
)
from tests.crash.points import reach

SENT_SECONDS = 0.1  # by then a request has left, and the server has not committed it


class Doors:
    """Creates a record once, updates it later, and can tell whether it is there."""

    name = "doors"
    priority = 50
    enabled = True
    settle_seconds = 0.5
    timeout_seconds = 2
    door = "http"

    class Settings(BaseModel):
        """Where the server is."""

        url: str

    def __init__(self, settings: Settings) -> None:
        self._url = settings.url

    def validate_config(self) -> tuple[bool, str | None]:
        """Find nothing wrong."""
        return True, None

    async def export(self, context: ExportContext) -> ExportResult:
        """Create the record, or update the one that is known."""
        known = context.last_export.record_id if context.last_export else context.remembered.get("record_id")
        body = self.body(context)
        if known:
            answer = await self._ask("PUT", f"{self._url}/records/{known}", json=body)
        else:
            answer = await self._ask("POST", f"{self._url}/records", json=body)
        await context.remember(record_id=answer["id"])
        return ExportResult(
            success=True, destination_name=self.name, record_id=answer["id"],
            record_url=f"{self._url}/records/{answer['id']}",
        )  # fmt: skip

    def body(self, context: ExportContext) -> dict[str, Any]:
        """Return what is sent."""
        return {"session": context.session_identifier, "content": context.xml_file_path.read_text(encoding="utf-8")}

    async def verify(self, context: ExportContext) -> Present | Partial | Absent:
        """Look for a record of the session."""
        found = await self._ask("GET", f"{self._url}/records", params={"session": context.session_identifier})
        if not found:
            return Absent()
        record = found[0]
        if record["sha256"] == context.record_sha256:
            return Present(record["id"], f"{self._url}/records/{record['id']}")
        return Partial(record["id"])

    async def _ask(self, method: str, url: str, **options: Any) -> Any:
        reach(f"{self.door}:{method}:before-send")
        sent = asyncio.get_running_loop().call_later(SENT_SECONDS, reach, f"{self.door}:{method}:sent")
        try:
            async with aiohttp.ClientSession() as http, http.request(method, url, **options) as response:
                sent.cancel()
                reach(f"{self.door}:{method}:committed")  # the server has begun to answer
                answer = await response.json()
        except aiohttp.ClientConnectorError as error:
            raise Transient(str(error)) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise UnknownOutcome(str(error) or type(error).__name__) from None
        finally:
            sent.cancel()
        reach(f"{self.door}:{method}:answered")
        if response.status == 503:
            raise Transient("busy", retry_after=answer.get("retry_after"))
        if response.status == 422:
            raise Permanent("refused", code="forbidden")
        return answer
