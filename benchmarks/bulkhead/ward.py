"""What the destinations of this proof have in common: they bring records to the server that does as it is told."""

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from consumer.destinations.contract import request_turn
from consumer.destinations.http import HttpClient, TlsSettings
from nexus_export import Absent, Answer, ExportContext, ExportResult, Misconfigured, Present


class WardSettings(BaseModel):
    """Settings of one destination, ``NX_<NAME>_URL`` and so on."""

    url: str = ""
    priority: int = 50
    read_seconds: float = 60.0
    #: look-ups before the create
    looks: int = 0


class Ward:
    """A destination that makes one copy with one request; it can be asked whether a copy is there."""

    Settings = WardSettings
    name = ""

    def __init__(self, settings: WardSettings) -> None:
        self._settings = settings
        self._client = HttpClient(
            settings.url, TlsSettings(cert_bundle=None, cert_bundle_file=None),
            setting=f"NX_{self.name.upper()}_URL", read_seconds=settings.read_seconds,
        )  # fmt: skip
        self.priority = settings.priority

    @property
    def enabled(self) -> bool:
        """Take records where an address is set."""
        return bool(self._settings.url)

    async def validate_config(self) -> tuple[bool, str | None]:
        """Ask the server whether the token is good."""
        answer = await self._client.request("GET", f"{self.name}/check")
        return (True, None) if answer.is_success else (False, f"the server answered {answer.status_code}")

    async def export(self, context: ExportContext) -> ExportResult:
        """Make a copy."""
        for _ in range(self._settings.looks):
            await self._request("GET", context)
        made = await self._request("POST", context, creates=True, content=context.xml_file_path.read_bytes())
        return ExportResult(success=True, destination_name=self.name, record_id=made["id"])

    async def verify(self, context: ExportContext) -> Answer:
        """Look for the copy."""
        found = await self._request("GET", context)
        return Present(context.session_identifier) if found["there"] else Absent()

    async def _request(self, method: str, context: ExportContext, *, creates: bool = False, **parts: Any) -> Any:
        await request_turn.get()()
        path, session = f"{self.name}/copies", {"session": context.session_identifier}
        answer = await self._client.request(method, path, params=session, creates=creates, **parts)
        if answer.status_code == HTTPStatus.UNAUTHORIZED:
            raise Misconfigured("the token is not valid")
        return self._client.json_of(answer, creates=creates)
