"""CDCS, the Configurable Data Curation System of NIST, through its REST API.

It has no idempotency keys and never deduplicates, so a record is found again by its title, the templates it can have
been made with, and its bytes, which CDCS keeps unchanged. What it would refuse is found out before it is sent, since
it answers with 500 then, like a server in trouble.
"""

import asyncio
import hashlib
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import httpx
from pydantic import AfterValidator, Field, SecretStr

from consumer.destinations.cdcs_api import CdcsApi
from consumer.destinations.cdcs_content import read_document
from consumer.destinations.cdcs_lookups import Kept, look_up_template, look_up_workspace
from consumer.destinations.cdcs_owners import Owners
from consumer.destinations.cdcs_rules import (
    Record,
    Template,
    choose_template,
    known_id,
    our_hashes,
    record_text,
    record_title,
)
from consumer.destinations.cdcs_schema import Schemas, invalid
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
from consumer.destinations.http import BaseUrl, TlsSettings
from consumer.destinations.needed import not_given
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient
from consumer.telemetry import get_logger

#: Remembered once a record was offered to its owner, whatever came of it.
_OFFERED = "offered_to_owner"

_log = get_logger()


def _token(value: SecretStr) -> SecretStr:
    text = value.get_secret_value().strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("holds characters that no token has; give the token alone")
    return SecretStr(text)


@dataclass(frozen=True, slots=True)
class _Build:
    """The record as it is to be at CDCS."""

    title: str
    content: bytes
    text: str
    sha256: str


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
        users_file: Path | None = Field(
            None, description="user names at CDCS where they differ: CSV lines `here,there`, or a JSON object"
        )
        assign_to_public_workspace: bool = Field(
            default=True, description="put records into the public workspace, where everybody sees them"
        )
        template_title: str = Field("Nexus Experiment Schema", description="title of the schema at CDCS")

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        token = settings.token.get_secret_value() if settings.token else ""
        self._api = api = CdcsApi(settings.url or "", token, settings)
        self._template = Kept(lambda: look_up_template(api, settings.template_title))
        self._workspace = Kept(lambda: look_up_workspace(api))
        self._schemas = Schemas(api.schema, self.name)
        self._owners = Owners(api, settings.users_file)

    @property
    def disabled_because(self) -> str:
        """Name the setting that is missing, or nothing."""
        return not_given({"NX_CDCS_TOKEN": self._settings.token, "NX_CDCS_URL": self._settings.url})

    @property
    def enabled(self) -> bool:
        """Tell whether token and address are given."""
        return not self.disabled_because

    async def aclose(self) -> None:
        """Close the connections."""
        await self._api.aclose()

    async def validate_config(self) -> tuple[bool, str | None]:
        """Check settings, connection, token, schema, workspace and, where they are needed, a superuser's rights."""
        if self.disabled_because:
            return False, self.disabled_because
        try:
            problem = await self._api.problem()
            if problem:
                return False, problem
            choose_template(await self._api.templates(), self._settings.template_title)
            if self._settings.assign_to_public_workspace:
                await look_up_workspace(self._api)
            if self._settings.user_owned_records:
                await self._owners.check()
                _log.info("superuser_token_needed", destination=self.name, setting="NX_CDCS_USER_OWNED_RECORDS")
        except Transient as error:
            question = f"is NX_CDCS_URL ({self._settings.url}) right, and does CDCS run?"
            return False, f"CDCS configuration error: {error}; {question}"
        except DestinationError as error:
            return False, f"CDCS configuration error: {error}"
        return True, None

    async def export(self, context: ExportContext) -> ExportResult:
        """Create the record, or bring the one that we made before up to date."""
        self._refuse_if_disabled()
        build = await asyncio.to_thread(_read, context)
        record_id = known_id(context)
        action: Action
        if record_id is None:
            action, record = "created", await self._create(build)
        else:
            action, record = await self._bring_up_to_date(record_id, build, context)
        return ExportResult(
            success=True,
            destination_name=self.name,
            record_id=record.id,
            record_url=self._api.page(record.id),
            metadata=await self._finish(record, context),
            action=action,
        )

    async def verify(self, context: ExportContext) -> Answer:
        """Tell whether the record is at CDCS.

        Records are looked up without authentication too, then only public ones are seen. So the list of schemas is
        asked for first, which takes a valid token.
        """
        self._refuse_if_disabled()
        template = await self._template.renew()
        wanted = context.record_sha256 or (await asyncio.to_thread(_read, context)).sha256
        record_id = known_id(context)
        if record_id is None:
            return await self._search(template, wanted, context)
        try:
            if context.purpose == "recheck":
                return await self._recheck(record_id, template, wanted, context)
            record = await self._api.read(record_id)
        except Permanent as error:  # it is there, and its content is not known
            return Unsure(str(error))
        if record is None:
            return Absent()
        if record.sha256 != wanted or self._is_unfinished(record, context):
            return Partial(record.id)
        return Present(record.id, self._api.page(record.id))

    async def _search(self, template: Template, wanted: str, context: ExportContext) -> Answer:
        """Look for a record whose id is not known."""
        hits = await self._hits(template, context)
        if isinstance(hits, Unsure):
            return hits
        complete = [record for record in hits if record.sha256 == wanted]
        earlier = [record for record in hits if record.sha256 in context.sent_hashes - {wanted}]
        if complete or earlier:
            ours, *others = complete + earlier
            if not complete or self._is_unfinished(ours, context):
                return Partial(ours.id)
            return Present(ours.id, self._api.page(ours.id), tuple(record.id for record in others))
        if hits:
            found = self._api.page(hits[0].id)
            raise Permanent(f"{found} has the title {hits[0].title!r} and bytes that we never sent", code="conflict")
        return Absent()

    async def _recheck(self, record_id: str, template: Template, wanted: str, context: ExportContext) -> Answer:
        """Look at the record that the outcome names, and for further copies of ours."""
        hits = await self._hits(template, context)
        if isinstance(hits, Unsure):
            return hits
        named = next((record for record in hits if record.id == record_id), None)
        # a person may have given it another title
        named = named or await self._api.read(record_id)
        if named is None:
            return Absent()
        if named.sha256 != wanted:
            return Partial(named.id)
        ours = context.sent_hashes | {wanted}
        surplus = tuple(record.id for record in hits if record.sha256 in ours and record.id != record_id)
        return Present(named.id, self._api.page(named.id), surplus)

    async def _hits(self, template: Template, context: ExportContext) -> list[Record] | Unsure:
        """List the records with the title of this one, the oldest first."""
        title = record_title(context.xml_file_path.stem)
        hits = await self._api.search(title, template.versions)
        if isinstance(hits, str):
            return Unsure(f"CDCS refused to look for {title!r}: {hits}")
        return sorted(hits, key=lambda record: int(record.id))

    async def _create(self, build: _Build) -> Record:
        tree = await asyncio.to_thread(read_document, build.content)
        version = await self._fitting_version(tree)
        answer = await self._post(build, version)
        if await self._is_outdated(answer, version):  # nothing was stored
            answer = await self._post(build, await self._fitting_version(tree))
        return self._api.created(answer)

    async def _fitting_version(self, tree: Any) -> str:
        """Return the schema version to upload a record with. Raises ``Permanent`` when it breaks the newest one."""
        version = (await self._template.get()).current
        problem = await self._schemas.problem(version, tree)
        if problem is not None:
            newest = (await self._template.renew()).current
            if newest != version:
                version, problem = newest, await self._schemas.problem(newest, tree)
        if problem is not None:
            raise invalid(problem, f"the schema {self._settings.template_title!r} of CDCS, version {version}")
        return version

    async def _post(self, build: _Build, version: str) -> httpx.Response:
        body: dict[str, Any] = {"template": version, "title": build.title, "xml_content": build.text}
        if self._settings.assign_to_public_workspace:
            body["workspace"] = await self._workspace.get()
        return await self._api.create(body)

    async def _is_outdated(self, answer: httpx.Response, version: str) -> bool:
        """Tell whether a record was refused for a schema or workspace that were replaced since we looked."""
        if answer.status_code == HTTPStatus.BAD_REQUEST and b"Invalid pk" in answer.content:
            self._template.forget()
            self._workspace.forget()
            return True
        if answer.status_code == HTTPStatus.CREATED:
            return False
        refused = self._api.refused(answer, "create")
        return isinstance(refused, Permanent) and (await self._template.renew()).current != version

    async def _bring_up_to_date(self, record_id: str, build: _Build, context: ExportContext) -> tuple[Action, Record]:
        record = await self._api.read(record_id)
        if record is None:
            raise self._changed(record_id, "was deleted at CDCS")
        if record.sha256 == build.sha256:
            return "unchanged" if context.last_export else "created", record
        if record.sha256 not in our_hashes(context):
            raise self._changed(record_id, "was changed at CDCS after we wrote it")
        tree = await asyncio.to_thread(read_document, build.content)
        problem = await self._schemas.problem(record.template, tree)
        if problem is not None:
            whose = f"schema version {record.template} of CDCS, which its copy {self._api.page(record_id)} has"
            advice = "if it fits a newer version, migrate the copy at CDCS, then replay"
            raise invalid(f"{problem}; {advice}", whose)
        # the title stays as it is: a person may have changed it
        if not await self._api.update(record_id, build.text):
            raise self._changed(record_id, "was deleted at CDCS")
        return "updated", record

    def _changed(self, record_id: str, what: str) -> Permanent:
        page = self._api.page(record_id)
        message = f"record {record_id} {what} ({page}); `nexus-export replay --overwrite` decides"
        return Permanent(message, code="changed_at_destination")

    def _is_unfinished(self, record: Record, context: ExportContext) -> bool:
        """Tell whether a new record still waits for its workspace, or for being offered to its owner."""
        return self._lacks_workspace(record, context) or self._waits_for_owner(context)

    def _lacks_workspace(self, record: Record, context: ExportContext) -> bool:
        # later, a person may have taken it out of there
        new = context.last_export is None
        return new and self._settings.assign_to_public_workspace and record.workspace is None

    def _waits_for_owner(self, context: ExportContext) -> bool:
        offered = context.last_export is not None or _OFFERED in context.remembered
        has_owner = bool(getattr(context.reservation_event, "username", None))
        return self._settings.user_owned_records and has_owner and not offered

    async def _finish(self, record: Record, context: ExportContext) -> dict[str, Any]:
        """Do for a new record what takes further requests; return what became of it."""
        if context.last_export is not None:
            return {}
        if self._is_unfinished(record, context):
            await context.remember(record_id=record.id)
        if self._lacks_workspace(record, context):
            await self._assign(record.id)
        if not self._settings.user_owned_records:
            return {}
        warning = await self._hand_over(record.id, context)
        return {"warning": warning} if warning else {}

    async def _assign(self, record_id: str) -> None:
        if await self._api.assign(record_id, await self._workspace.get()):
            return
        workspace = await self._workspace.renew()
        if not await self._api.assign(record_id, workspace):
            raise Transient(f"CDCS has no record {record_id}, or no workspace {workspace}", code="server_error")

    async def _hand_over(self, record_id: str, context: ExportContext) -> str:
        """Make the session's user the owner; whatever goes wrong, the record is there, and it is only told."""
        try:
            await self._owners.hand_over(record_id, context.reservation_event)
            warning = ""
        except DestinationError as error:
            warning = f"the owner of the record was not changed: {error}"
            _log.warning("ownership_not_changed", destination=self.name, record_id=record_id, reason=str(error))
        if self._waits_for_owner(context):
            await context.remember(**{_OFFERED: True})
        return warning

    def _refuse_if_disabled(self) -> None:
        if self.disabled_because:
            raise Misconfigured(self.disabled_because)


def _read(context: ExportContext) -> _Build:
    try:
        content = context.xml_file_path.read_bytes()
    except OSError as error:
        message = f"the record {context.xml_file_path} cannot be read: {error.strerror}"
        raise Transient(message, code="record_unreadable") from None
    sha256 = hashlib.sha256(content).hexdigest()
    return _Build(record_title(context.xml_file_path.stem), content, record_text(content), sha256)
