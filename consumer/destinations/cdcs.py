"""CDCS, the Configurable Data Curation System of NIST, through its REST API (core_main_app 2.18 to 2.23).

It has no idempotency keys and never deduplicates, so a record is found again by its title, the templates it can have
been made with, and its bytes, which CDCS keeps unchanged. A record that breaks the schema is answered with 500 like
a server in trouble; only the message tells them apart.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import AfterValidator, Field, SecretStr

from consumer.destinations.cdcs_rules import (
    Template,
    choose_template,
    content_sha256,
    find_user,
    is_refusal,
    known_id,
    lacks_right,
    our_hashes,
    record_text,
    record_title,
    said,
)
from consumer.destinations.contract import (
    Absent,
    Action,
    Answer,
    ExportContext,
    ExportResult,
    Limits,
    Partial,
    Present,
    Unsure,
)
from consumer.destinations.http import BaseUrl, HttpClient, TlsSettings, retry_after_seconds
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome
from consumer.telemetry import get_logger

#: A new schema version is used at the latest after this time.
KEEP_SECONDS = 600.0
#: Large records take long: CDCS needs about half a second for each megabyte, times the records in parallel.
READ_SECONDS = 110.0

_TEMPLATES = "rest/template-version-manager/global/"
_AUTHENTICATION = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_INTERNAL = {HTTPStatus.INTERNAL_SERVER_ERROR}

_log = get_logger()
Value = TypeVar("Value")


def _token(value: SecretStr) -> SecretStr:
    text = value.get_secret_value().strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("holds characters that no token has; give the token alone")
    return SecretStr(text)


class Kept(Generic[Value]):
    """A value that is looked up once in a while, by one task for all that wait."""

    def __init__(self, look_up: Callable[[], Awaitable[Value]]) -> None:
        self._look_up = look_up
        self._lock = asyncio.Lock()
        self._held: tuple[Value, float] | None = None

    async def get(self) -> Value:
        """Return the value, at most ten minutes old."""
        async with self._lock:
            if self._held is not None and time.monotonic() < self._held[1]:
                return self._held[0]
            return await self.renew()

    async def renew(self) -> Value:
        """Look the value up now."""
        value = await self._look_up()
        self._held = (value, time.monotonic() + KEEP_SECONDS)
        return value

    def forget(self) -> None:
        """Let the next one look it up."""
        self._held = None


class Cdcs:
    """Uploads records to CDCS, updates its own ones, and never writes over what a person changed there."""

    name = "cdcs"
    priority = 100
    limits = Limits(concurrency=8)
    settle_seconds = 120
    timeout_seconds = 120

    class Settings(TlsSettings):
        """Settings of CDCS, read from ``NX_CDCS_*``."""

        url: BaseUrl | None = Field(None, description="address of CDCS; without it nothing goes there")
        token: Annotated[SecretStr, AfterValidator(_token)] | None = Field(None, description="API token")
        user_owned_records: bool = Field(
            default=False, description="make the session's user the owner of a record; needs a superuser's token"
        )
        assign_to_public_workspace: bool = Field(
            default=True, description="put records into the public workspace, where everybody sees them"
        )
        template_title: str = Field("Nexus Experiment Schema", description="title of the schema at CDCS")

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._base_url = settings.url or ""
        token = settings.token.get_secret_value() if settings.token else ""
        headers = {"Authorization": f"Token {token}", "Accept": "application/json"}
        self._http = HttpClient(
            self._base_url, settings, setting="NX_CDCS_URL", headers=headers, read_seconds=READ_SECONDS
        )
        self._template = Kept(self._look_up_template)
        self._workspace = Kept(self._look_up_workspace)

    @property
    def disabled_because(self) -> str:
        """Name the setting that is missing, or nothing."""
        token = None if self._settings.token is None else self._settings.token.get_secret_value()
        for name, value in (("NX_CDCS_TOKEN", token), ("NX_CDCS_URL", self._settings.url)):
            if not value:
                return f"{name} not configured" if value is None else f"{name} is empty"
        return ""

    @property
    def enabled(self) -> bool:
        """Tell whether token and address are given."""
        return not self.disabled_because

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def validate_config(self) -> tuple[bool, str | None]:
        """Check settings, connection, token and schema."""
        if self.disabled_because:
            return False, self.disabled_because
        try:
            answer = await self._http.request("GET", _TEMPLATES, pass_through=range(400, 600))
            status, body = answer.status_code, self._http.quote(answer)
            if status in _AUTHENTICATION:
                return False, f"CDCS authentication failed: check NX_CDCS_TOKEN ({status}: {body})"
            if status != HTTPStatus.OK:
                return False, f"CDCS answered {status} {answer.reason_phrase} at {self._base_url}{_TEMPLATES}"
            choose_template(self._objects(answer), self._settings.template_title)
        except DestinationError as error:
            return False, f"CDCS configuration error: {error}"
        if self._settings.user_owned_records:
            _log.info("superuser_token_needed", destination=self.name, setting="NX_CDCS_USER_OWNED_RECORDS")
        return True, None

    async def export(self, context: ExportContext) -> ExportResult:
        """Create the record, or bring the one that we made before up to date."""
        if self.disabled_because:
            raise Misconfigured(self.disabled_because)
        content = await asyncio.to_thread(_read, context)
        body = {"title": record_title(context.xml_file_path.stem), "xml_content": record_text(content)}
        record_id = known_id(context)
        if record_id is None:
            action: Action = "created"
            record_id = await self._create(body)
        else:
            action = await self._bring_up_to_date(record_id, body, _sha256(content), context)
        metadata = {} if context.last_export else await self._hand_over(record_id, context)
        return ExportResult(
            success=True,
            destination_name=self.name,
            record_id=record_id,
            record_url=self._url(record_id),
            metadata=metadata,
            action=action,
        )

    async def verify(self, context: ExportContext) -> Answer:
        """Tell whether the record is at CDCS.

        Records are looked up without authentication too, then only public ones are seen. So the list of schemas is
        asked for first, which takes a valid token.
        """
        if self.disabled_because:
            raise Misconfigured(self.disabled_because)
        template = await self._template.renew()
        wanted = context.record_sha256 or _sha256(await asyncio.to_thread(_read, context))
        record_id = known_id(context)
        if record_id is None or context.purpose == "recheck":
            return await self._search(template, wanted, context)
        answer = await self._http.request("GET", _record(record_id))
        if answer.status_code == HTTPStatus.NOT_FOUND:
            return Absent()
        if answer.status_code in _AUTHENTICATION:
            return Unsure(f"the token may not read record {record_id}: {self._http.quote(answer)}")
        if self._sha256_of(answer) == wanted:
            return Present(record_id, self._url(record_id))
        return Partial(record_id)

    async def _search(self, template: Template, wanted: str, context: ExportContext) -> Answer:
        title = record_title(context.xml_file_path.stem)
        templates = [{"id": version} for version in template.versions]
        query = {"query": {}, "title": title, "templates": templates, "all": "true"}
        answer = await self._http.request("POST", "rest/data/query/", json=query)
        if answer.status_code == HTTPStatus.BAD_REQUEST:  # more than a hundred hits
            return Unsure(f"CDCS refused to look for {title!r}: {self._http.quote(answer)}")
        # a filter that CDCS does not know is ignored, so the title is checked here too
        hits = [(int(r["id"]), content_sha256(r)) for r in self._objects(answer) if r.get("title") == title]
        complete = sorted(number for number, sha256 in hits if sha256 == wanted)
        earlier = sorted(number for number, sha256 in hits if sha256 in context.sent_hashes - {wanted})
        if complete or earlier:
            known = known_id(context)
            # two equal copies: the one that outcomes name is kept, else the first
            ours = int(known) if known in {str(number) for number in complete} else (complete + earlier)[0]
            surplus = tuple(str(number) for number in complete + earlier if number != ours)
            return Present(str(ours), self._url(ours), surplus) if complete else Partial(str(ours))
        if hits:
            found = self._url(min(hits)[0])
            raise Permanent(f"{found} has the title {title!r} and bytes that we never sent", code="conflict")
        return Absent()

    async def _create(self, body: Mapping[str, str]) -> str:
        answer = await self._post(body)
        if answer.status_code == HTTPStatus.BAD_REQUEST and b"Invalid pk" in answer.content:
            # schema or workspace were replaced since we looked; nothing was stored
            self._template.forget()
            self._workspace.forget()
            answer = await self._post(body)
        if answer.status_code != HTTPStatus.CREATED:
            raise self._refusal(answer, creating=True)
        record = self._http.json_of(answer, creates=True)
        record_id = record.get("id") if isinstance(record, dict) else None
        if not isinstance(record_id, int | str) or record_id == "":
            raise UnknownOutcome(f"CDCS created a record and did not say which: {self._http.quote(answer)}")
        return str(record_id)

    async def _post(self, body: Mapping[str, str]) -> httpx.Response:
        record: dict[str, Any] = {"template": (await self._template.get()).current, **body}
        if self._settings.assign_to_public_workspace:
            workspace = await self._workspace.get()
            if workspace is not None:
                record["workspace"] = workspace
        return await self._http.request("POST", "rest/data/", json=record, creates=True, pass_through=_INTERNAL)

    async def _bring_up_to_date(
        self, record_id: str, body: Mapping[str, str], sha256: str, context: ExportContext
    ) -> Action:
        answer = await self._http.request("GET", _record(record_id))
        if answer.status_code == HTTPStatus.NOT_FOUND:
            raise self._changed(record_id, "was deleted at CDCS")
        if answer.status_code in _AUTHENTICATION:
            raise self._refusal(answer, creating=False)
        there = self._sha256_of(answer)
        if there == sha256:
            return "unchanged" if context.last_export else "created"
        if there not in our_hashes(context):
            raise self._changed(record_id, "was changed at CDCS after we wrote it")
        path = _record(record_id)
        answer = await self._http.request("PATCH", path, json=dict(body), creates=True, pass_through=_INTERNAL)
        if answer.status_code == HTTPStatus.NOT_FOUND:
            raise self._changed(record_id, "was deleted at CDCS")
        if answer.status_code != HTTPStatus.OK:
            raise self._refusal(answer, creating=False)
        return "updated"

    def _changed(self, record_id: str, what: str) -> Permanent:
        message = f"record {record_id} {what} ({self._url(record_id)}); `nexus-export replay --overwrite` decides"
        return Permanent(message, code="changed_at_destination")

    def _refusal(self, answer: httpx.Response, *, creating: bool) -> DestinationError:
        """Say what an answer to a write means that is not success."""
        status, body = answer.status_code, self._http.quote(answer)
        error = said(answer.content)
        message = error.get("message", "")
        if status == HTTPStatus.UNAUTHORIZED or (status == HTTPStatus.FORBIDDEN and "detail" in error):
            return Misconfigured(f"Could not authenticate to CDCS, check NX_CDCS_TOKEN: {body}")
        if status == HTTPStatus.FORBIDDEN or lacks_right(message):
            if creating:
                return Misconfigured(f"NX_CDCS_TOKEN may not create records: {body}")
            return Permanent(f"NX_CDCS_TOKEN may not change this record: {body}", code="not_permitted")
        if creating and status in {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED}:
            return Misconfigured(f"there is no CDCS at {self._base_url}, check NX_CDCS_URL: {status} {body}")
        if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR or is_refusal(message):
            return Permanent(f"CDCS upload failed: {body}", code="rejected")
        wait = retry_after_seconds(answer.headers)
        return UnknownOutcome(f"CDCS answered {status} {answer.reason_phrase}: {body}", retry_after=wait)

    async def _hand_over(self, record_id: str, context: ExportContext) -> dict[str, Any]:
        """Make the session's user the owner; whatever goes wrong, the record is there."""
        if not self._settings.user_owned_records:
            return {}
        await context.remember(record_id=record_id)
        try:
            await self._change_owner(record_id, context.reservation_event)
        except DestinationError as error:
            _log.warning("ownership_not_changed", destination=self.name, record_id=record_id, reason=str(error))
            return {"ownership": str(error)}
        return {}

    async def _change_owner(self, record_id: str, reservation: Any) -> None:
        username = getattr(reservation, "username", None)
        if not username:
            raise Permanent("the session has no reservation with a username; the token's user owns the record")
        user_id = await self._find_user(reservation)
        if user_id is None:
            refusal = await self._create_user(reservation)
            # another task may have created the user just before
            user_id = await self._find_user(reservation)
            if user_id is None:
                raise Permanent(f"CDCS did not create the user {username}: {refusal}")
        self._ok(await self._http.request("PATCH", f"{_record(record_id)}change-owner/{user_id}", creates=True))

    async def _find_user(self, reservation: Any) -> int | None:
        users = self._objects(await self._http.request("GET", "rest/user/"))
        return find_user(users, reservation.username, getattr(reservation, "user_email", None))

    async def _create_user(self, reservation: Any) -> str:
        """Create the user; return what CDCS said."""
        user = {
            "username": reservation.username,
            "email": getattr(reservation, "user_email", None) or "",
            "first_name": getattr(reservation, "user_first_name", None) or "",
            "last_name": getattr(reservation, "user_last_name", None) or "",
            "password": secrets.token_urlsafe(32),
        }
        # two tasks that create one user at a time get 400 or 500
        any_status = range(400, 600)
        answer = await self._http.request("POST", "rest/user/", json=user, creates=True, pass_through=any_status)
        return self._http.quote(answer)

    async def _look_up_template(self) -> Template:
        title = self._settings.template_title
        named = self._objects(await self._http.request("GET", _TEMPLATES, params={"title": title}))
        try:
            return choose_template(named, title)
        except Misconfigured:  # for the message, which tells the titles there are
            return choose_template(self._objects(await self._http.request("GET", _TEMPLATES)), title)

    async def _look_up_workspace(self) -> int | None:
        workspaces = self._objects(await self._http.request("GET", "rest/workspace/read_access/"))
        public = [int(workspace["id"]) for workspace in workspaces if workspace.get("is_public")]
        if not public:
            _log.warning("no_public_workspace", destination=self.name, setting="NX_CDCS_ASSIGN_TO_PUBLIC_WORKSPACE")
        return min(public, default=None)

    def _objects(self, answer: httpx.Response) -> list[dict[str, Any]]:
        """Return the objects of an answer that should be a list of them."""
        value = self._ok(answer)
        if not isinstance(value, list) or not all(isinstance(item, dict) and "id" in item for item in value):
            raise Transient(f"CDCS answered something unexpected: {self._http.quote(answer)}", code="no_answer")
        return value

    def _sha256_of(self, answer: httpx.Response) -> str:
        """Return the digest of the content in an answer that should be a record."""
        record = self._ok(answer)
        sha256 = content_sha256(record) if isinstance(record, dict) else None
        if sha256 is None:
            raise Transient(f"CDCS answered no record: {self._http.quote(answer)}", code="no_answer")
        return sha256

    def _ok(self, answer: httpx.Response) -> Any:
        """Return the value of an answer that should be a success."""
        if answer.status_code in _AUTHENTICATION:
            raise Misconfigured(f"Could not authenticate to CDCS, check NX_CDCS_TOKEN: {self._http.quote(answer)}")
        if answer.status_code != HTTPStatus.OK:
            where = f"{answer.request.method} {answer.request.url.path}"
            raise Misconfigured(
                f"CDCS answered {answer.status_code} to {where}, check NX_CDCS_URL: {self._http.quote(answer)}"
            )
        return self._http.json_of(answer)

    def _url(self, record_id: str | int) -> str:
        return f"{self._base_url}data?id={record_id}"


def _record(record_id: str) -> str:
    return f"rest/data/{quote(record_id, safe='')}/"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(context: ExportContext) -> bytes:
    try:
        return context.xml_file_path.read_bytes()
    except OSError as error:
        message = f"the record {context.xml_file_path} cannot be read: {error.strerror}"
        raise Transient(message, code="record_unreadable") from None
