"""What the four test plugins share: a careful client of the misbehaving server.

It does by hand, with plain httpx, what the contract asks of a plugin: look before creating, and name every ending by
what happens next.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from nexus_export import Absent, Answer, ExportContext, ExportResult, Present, Transient, UnknownOutcome

CONNECT_SECONDS = 5.0


class Shelf:
    """One destination of the server; a subclass adds ``name`` and ``priority``."""

    name = "shelf"
    priority = 0
    settle_seconds = 2
    timeout_seconds = 3
    #: None leaves it to the service to cut a request that gets no answer
    read_seconds: float | None = None

    class Settings(BaseModel):
        """The address of the server."""

        model_config = ConfigDict(frozen=True)

        url: str = Field(validation_alias="NX_STORM_URL")

    def __init__(self, settings: Settings) -> None:
        self._url = f"{settings.url}{self.name}/copies"
        self._client: httpx.AsyncClient | None = None

    @property
    def enabled(self) -> bool:
        """Tell that records go here."""
        return True

    def validate_config(self) -> tuple[bool, str | None]:
        """There is nothing that could be wrong."""
        return True, None

    async def export(self, context: ExportContext) -> ExportResult:
        """Look the key up; create only where it has no copy."""
        try:
            found = await self._copies(context)
        except UnknownOutcome as error:  # nothing was sent that could have an effect
            raise Transient(str(error), code="look_up_failed") from None
        if found:
            return self._result(self._ours(found, context), "unchanged")
        content = await asyncio.to_thread(context.xml_file_path.read_bytes)
        if hashlib.sha256(content).hexdigest() != context.record_sha256:
            raise AssertionError("the spool holds other bytes than announced")
        answer = await self._ask("POST", context, content=content)
        return self._result(str(answer["id"]), "created")

    async def verify(self, context: ExportContext) -> Answer:
        """Say whether the copy is there, and which others of the same key are."""
        found = await self._copies(context)
        if not found:
            return Absent()
        ours = self._ours(found, context)
        return Present(ours, self._address(ours), surplus=tuple(one for one in found if one != ours))

    @staticmethod
    def _ours(found: list[str], context: ExportContext) -> str:
        last = context.last_export
        return last.record_id if last and last.record_id in found else found[0]

    def _address(self, copy: str) -> str:
        return f"{self._url}/{copy}"

    def _result(self, copy: str, action: Any) -> ExportResult:
        return ExportResult(
            success=True,
            destination_name=self.name,
            record_id=copy,
            record_url=self._address(copy),
            action=action,
        )

    async def _copies(self, context: ExportContext) -> list[str]:
        answer = await self._ask("GET", context)
        return [str(one) for one in answer["ids"]]

    async def _ask(self, method: str, context: ExportContext, **parts: Any) -> Any:
        if self._client is None:
            timeout = httpx.Timeout(self.read_seconds, connect=CONNECT_SECONDS)
            self._client = httpx.AsyncClient(timeout=timeout, trust_env=False)
        parameters = {"key": context.record_key, "session": context.session_identifier}
        async with _named_by_what_happens_next():
            answer = await self._client.request(method, self._url, params=parameters, **parts)
            if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
                raise Transient("429", retry_after=float(answer.headers["Retry-After"]), code="rate_limited")
            if not answer.is_success:
                raise UnknownOutcome(f"the server answered {answer.status_code}")
            return answer.json()


@asynccontextmanager
async def _named_by_what_happens_next() -> AsyncIterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Transient(f"cannot connect: {error}", code="cannot_connect") from None
    except (httpx.HTTPError, ValueError) as error:
        raise UnknownOutcome(f"no complete answer: {type(error).__name__}: {error}") from None
