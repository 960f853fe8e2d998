"""eLabFTW, an electronic laboratory notebook, through its API v2 (5.3 to 6.x): one experiment for each session.

It has no idempotency keys and no transactions. The record's key is an extra field, written in the request that makes
the experiment, and every experiment with it is found by an exact search. What a person wrote there stays: a page
that was changed only gets additions.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, SecretStr

from consumer.destinations.contract import (
    Absent,
    Answer,
    ExportContext,
    ExportResult,
    Limits,
    Partial,
    Present,
    Unsure,
)
from consumer.destinations.elabftw_api import Api
from consumer.destinations.elabftw_check import find_problem
from consumer.destinations.elabftw_entry import DELETED, has_key, is_ours, state_of, stored_digest
from consumer.destinations.elabftw_people import find_user, hand_over, read_users, session_names
from consumer.destinations.elabftw_rules import (
    XML_COMMENT,
    File,
    Known,
    Lacks,
    Plan,
    Wanted,
    is_attached,
    lacking,
    obstacle,
    payload,
    plan,
    replacements,
    wanted_of,
)
from consumer.destinations.http import BaseUrl, HttpClient, TlsSettings
from consumer.destinations.needed import not_given
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome
from consumer.telemetry import get_logger

#: The server makes thumbnails of pictures while we wait.
READ_SECONDS = 130.0

_log = get_logger()


def _key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value().strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("holds characters that no API key has; give the key alone, without a word before it")
    return SecretStr(text)


class Elabftw:
    """Keeps an experiment for each record, with the record attached."""

    name = "elabftw"
    priority = 85
    links_to = ("cdcs",)
    limits = Limits(concurrency=4)
    paces_requests = True
    settle_seconds = 120
    timeout_seconds = 180

    class Settings(TlsSettings):
        """Settings of eLabFTW, read from ``NX_ELABFTW_*``."""

        url: BaseUrl | None = Field(None, description="address of eLabFTW; without it nothing goes there")
        api_key: Annotated[SecretStr, AfterValidator(_key)] | None = Field(
            None, description="API key with read/write permission; experiments belong to its user and team"
        )
        experiment_category: int | None = Field(None, gt=0, description="id of the category of new experiments")
        experiment_status: int | None = Field(None, gt=0, description="id of the status of new experiments")
        user_owned_records: bool = Field(
            default=False,
            description="make the session's user the owner of an experiment (before eLabFTW 6: let the user write)",
        )
        users_file: Path | None = Field(
            None, description="CSV (username,userid) or JSON file that says which eLabFTW user is whom"
        )

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._base_url = settings.url or ""
        self._key = settings.api_key.get_secret_value() if settings.api_key else ""
        headers = {"Authorization": self._key, "Accept": "application/json"}
        self._http = HttpClient(
            self._base_url, settings, setting="NX_ELABFTW_URL", headers=headers, read_seconds=READ_SECONDS
        )
        self._api = Api(self._http, self._base_url)

    @property
    def disabled_because(self) -> str:
        """Name the setting that is missing, or nothing."""
        return not_given({"NX_ELABFTW_API_KEY": self._settings.api_key, "NX_ELABFTW_URL": self._settings.url})

    @property
    def enabled(self) -> bool:
        """Tell whether key and address are given."""
        return not self.disabled_because

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # --- before anything is exported ---------------------------------------------------------------------------

    async def validate_config(self) -> tuple[bool, str | None]:
        """Check settings, connection, key, version, category and status."""
        if self.disabled_because:
            return False, self.disabled_because
        try:
            await self._users()
            await self._api.value("users/me")
            problem = await find_problem(
                self._api, self._key, self._settings.experiment_category, self._settings.experiment_status
            )
        except DestinationError as error:
            text = str(error)
            return False, text if text.startswith(
                "eLabFTW authentication"
            ) else f"eLabFTW configuration error: {text}"
        return problem is None, problem

    async def _users(self) -> dict[str, int]:
        path = self._settings.users_file
        return await asyncio.to_thread(read_users, path) if path is not None else {}

    # --- export ------------------------------------------------------------------------------------------------

    async def export(self, context: ExportContext) -> ExportResult:
        """Make the experiment, or go on with the one that we made, until nothing of it is missing."""
        wanted = await self._wanted(context)
        known = _known_id(context) or await self._find(context, wanted)
        record_id = known or await self._create(wanted)
        if context.remembered.get("record_id") != record_id:
            await context.remember(record_id=record_id)
        entry = await self._entry(record_id)
        todo, lacks = self._todo(context, wanted, entry)
        if known is None and not todo.patch:
            todo = Plan()  # however the server stores it, nobody else has written it
        if todo.patch or lacks != Lacks():
            self._refuse_to_write(entry)
        entry, stored = await self._write_page(context, wanted, entry, todo)
        warnings = [*wanted.warnings, *await self._complete(context, wanted, entry, lacks, kept=todo.kept)]
        if todo.kept:
            warnings.append("a person has changed the page: it was kept, what is new was added to it")
        changed = bool(todo.patch) or lacks != Lacks()
        done = "linked" if context.purpose == "link" else "updated" if changed else "unchanged"
        return ExportResult(
            success=True,
            destination_name=self.name,
            record_id=record_id,
            record_url=self._url(record_id),
            metadata={"warning": "; ".join(warnings)} if warnings else {},
            action="created" if context.last_export is None else done,  # type: ignore[arg-type]
            stored_sha256=stored,
        )

    def _todo(self, context: ExportContext, wanted: Wanted, entry: Mapping[str, Any]) -> tuple[Plan, Lacks]:
        """Say what is missing; only the link, where only that was asked for."""
        todo = plan(entry, wanted, _known(context))
        if context.purpose == "link":
            return todo, Lacks()
        return todo, lacking(entry, wanted, tags=context.last_export is None)

    async def _create(self, wanted: Wanted) -> str:
        body = payload(wanted, self._settings.experiment_category, self._settings.experiment_status)
        try:
            return await self._api.create(body)
        except Permanent:
            # the server has no transactions: a refused request may have made the experiment all the same
            made = [hit for hit in await self._api.find(wanted.key) if is_ours(hit, wanted.key, _hashes(wanted))]
            if not made:
                raise
            return str(made[0]["id"])

    async def _write_page(
        self, context: ExportContext, wanted: Wanted, entry: dict[str, Any], todo: Plan
    ) -> tuple[dict[str, Any], str | None]:
        """Write title, body and metadata; return the entry and the digest of our page as the server keeps it."""
        if todo.patch:
            async with self._writing(entry):
                entry = await self._api.patch(str(entry["id"]), todo.patch)
        last = context.last_export.stored_sha256 if context.last_export else None
        stored: str | None = context.remembered.get("stored") or last
        # a page of ours that we do not remember is one whose answer was lost
        forgotten = not todo.patch and context.remembered.get("done") != wanted.done
        if "body" in todo.patch or (not todo.kept and (stored is None or forgotten)):
            stored = stored_digest(entry)
        if context.remembered.get("done") != wanted.done or context.remembered.get("stored") != stored:
            await context.remember(stored=stored, done=wanted.done)
        return entry, stored

    async def _complete(
        self, context: ExportContext, wanted: Wanted, entry: dict[str, Any], lacks: Lacks, *, kept: bool
    ) -> list[str]:
        """Add tags and files, and give the experiment to its user; return what did not matter enough to fail."""
        warnings = []
        for text in lacks.tags:
            try:
                async with self._writing(entry):
                    await self._api.add_tag(str(entry["id"]), text)
            except Permanent as error:
                warnings += _tolerated(error)
        hashes = {*context.sent_hashes, wanted.record.sha256}
        olds = {} if kept else replacements(entry, lacks.files, wanted, hashes)
        for file in lacks.files:
            try:
                async with self._writing(entry):
                    await self._attach(str(entry["id"]), file, olds.get(file))
            except Permanent as error:
                if file.kind == XML_COMMENT:
                    raise
                warnings += _tolerated(error)
        if lacks.files and not is_attached(await self._entry(str(entry["id"])), wanted.record):
            raise UnknownOutcome(f"experiment {entry['id']} has not got the attachment that eLabFTW said it has")
        if self._is_to_be_handed_over(context):
            warnings += await self._hand_over(context, entry)
            await context.remember(offered=True)
        return warnings

    async def _attach(self, record_id: str, file: File, replaces: str | None) -> None:
        try:
            await self._api.attach(record_id, file, replaces)
        except OSError as error:
            if file.kind == XML_COMMENT:
                raise _unreadable(file.path, error) from None
            raise Permanent(f"preview {file.name} cannot be read: {error.strerror}", code="rejected") from None

    def _is_to_be_handed_over(self, context: ExportContext) -> bool:
        """Tell whether the session's user has not been offered the experiment; later it is theirs to keep or give."""
        first = context.last_export is None and not context.remembered.get("offered")
        return first and self._settings.user_owned_records

    async def _hand_over(self, context: ExportContext, entry: Mapping[str, Any]) -> list[str]:
        """Give the experiment to the session's user; whatever goes wrong, the record is there."""
        try:
            userid = await find_user(self._api, context, await self._users())
            if userid is not None:
                await hand_over(self._api, entry, userid)
                return []
            names, email = session_names(context)
            who = ", ".join(filter(None, [*names, email])) or "without a name"
            reason = f"eLabFTW has no user for the session's user ({who}); the key's user owns the experiment"
        except DestinationError as error:
            reason = f"the experiment was not given to the session's user: {error}"
        _log.warning("ownership_not_changed", destination=self.name, record_id=str(entry["id"]), reason=reason)
        return [reason]

    # --- look-ups ----------------------------------------------------------------------------------------------

    async def verify(self, context: ExportContext) -> Answer:
        """Tell whether the experiment is there with all that belongs to it. Every answer takes a valid key."""
        wanted = await self._wanted(context)
        if context.purpose == "recheck":
            return await self._recheck(context, wanted)
        record_id = _known_id(context) or await self._find(context, wanted)
        if record_id is None:
            return Absent()
        try:
            entry = await self._entry(record_id)
        except Permanent as error:
            if error.code != "not_permitted":
                raise
            return Unsure(str(error))  # a missing right says nothing of what became of a request
        todo, lacks = self._todo(context, wanted, entry)
        if not todo.patch and lacks == Lacks():
            url = self._url(record_id)
            return Partial(record_id) if self._is_to_be_handed_over(context) else Present(record_id, url)
        return Partial(record_id)

    async def _find(self, context: ExportContext, wanted: Wanted) -> str | None:
        """Return the id of our experiment by its key. Raises ``Permanent`` for another's, or a deleted one."""
        hits = [hit for hit in await self._api.find(wanted.key) if has_key(hit, wanted.key)]
        there = [hit for hit in hits if state_of(hit) != DELETED]
        hashes = {*context.sent_hashes, *_hashes(wanted)}
        ours = [hit for hit in there if is_ours(hit, wanted.key, hashes)]
        if ours:
            return str(ours[0]["id"])
        if there:
            found = self._url(str(there[0]["id"]))
            message = f"{found} has the key of this record and names bytes that we never sent; look whose it is"
            raise Permanent(message, code="conflict")
        if hits:
            raise self._obstacle(hits[0])
        return None

    async def _recheck(self, context: ExportContext, wanted: Wanted) -> Answer:
        """Look for copies that the server committed late."""
        hashes = {*context.sent_hashes, *_hashes(wanted)}
        hits = [hit for hit in await self._api.find(wanted.key) if is_ours(hit, wanted.key, hashes)]
        live = [str(hit["id"]) for hit in hits if state_of(hit) != DELETED]
        known = _known_id(context)
        if known is not None and known not in live:
            entry = await self._api.entry(known)
            if entry is not None and state_of(entry) != DELETED:
                live.insert(0, known)
        if not live:
            return Absent()
        ours = known if known in live else live[0]
        return Present(ours, self._url(ours), tuple(other for other in live if other != ours))

    async def _wanted(self, context: ExportContext) -> Wanted:
        if self.disabled_because:
            raise Misconfigured(self.disabled_because)
        try:
            return await asyncio.to_thread(wanted_of, context)
        except OSError as error:
            raise _unreadable(context.xml_file_path, error) from None

    async def _entry(self, record_id: str) -> dict[str, Any]:
        """Return an experiment that is there. Raises ``Permanent`` if it was deleted."""
        entry = await self._api.entry(record_id)
        if entry is None:
            raise self._obstacle({"id": record_id, "state": DELETED})
        if state_of(entry) == DELETED:
            raise self._obstacle(entry)
        return entry

    # --- refusals ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _writing(self, entry: Mapping[str, Any]) -> AsyncIterator[None]:
        """Say why an experiment took nothing."""
        try:
            yield
        except Permanent as error:
            if error.code in {"too_large", "locked"}:
                raise
            now = await self._entry(str(entry["id"]))
            self._refuse_to_write(now)
            if now.get("exclusive_edit_mode"):
                message = f"experiment {entry['id']} is being edited ({self._url(str(entry['id']))}): {error}"
                raise Transient(message, code="being_edited") from None
            raise

    def _refuse_to_write(self, entry: Mapping[str, Any]) -> None:
        if obstacle(entry) is not None:
            raise self._obstacle(entry)

    def _obstacle(self, entry: Mapping[str, Any]) -> Permanent:
        found = obstacle(entry)
        code, what, remedy = found or ("rejected", "takes nothing", "look there")
        where = self._url(str(entry["id"]))
        return Permanent(f"experiment {entry['id']} {what} in eLabFTW ({where}); {remedy}, then replay", code=code)

    def _url(self, record_id: str) -> str:
        return f"{self._base_url}experiments.php?mode=view&id={record_id}"


def _known_id(context: ExportContext) -> str | None:
    """Return the id of the experiment that we made before, if we did."""
    if context.last_export is not None:
        return context.last_export.record_id
    remembered = context.remembered.get("record_id")
    return None if remembered is None else str(remembered)


def _known(context: ExportContext) -> Known:
    last = context.last_export.stored_sha256 if context.last_export else None
    stored = {context.remembered.get("stored"), last} - {None}
    return Known(frozenset(map(str, stored)), context.remembered.get("done"))


def _hashes(wanted: Wanted) -> frozenset[str]:
    return frozenset({wanted.record.sha256})


def _tolerated(error: Permanent) -> list[str]:
    """Return a warning for what a record can do without; an obstacle to the whole entry is raised again."""
    if error.code in {"locked", "archived", "deleted"}:
        raise error
    return [str(error)]


def _unreadable(path: Path, error: OSError) -> Transient:
    return Transient(f"the record {path} cannot be read: {error.strerror}", code="record_unreadable")
