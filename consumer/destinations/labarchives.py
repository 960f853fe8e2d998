"""LabArchives, an electronic notebook, through its XML API (2026).

It has no idempotency keys, names need not be unique, and nothing can be deleted. So every page, text and attachment
carries the record's key or its bytes' digest and is looked for before it is made; what we made is never changed, a
newer build adds a text and an attachment. Without a notebook records go to the inbox, which cannot be listed: an
outcome that is unknown there stays so until a person has looked.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

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
from consumer.destinations.labarchives_client import LabArchivesClient, Place
from consumer.destinations.labarchives_content import load_users, parts_of, read_again
from consumer.destinations.labarchives_folders import Folders
from consumer.destinations.labarchives_rules import (
    DELETED_FOLDER,
    Entry,
    File,
    Note,
    Part,
    api_url,
    choose_page,
    found_in,
    hex_key,
    is_foreign,
    known_entries,
    known_page,
    link_notes,
    missing,
    month_name,
    page_name,
    page_url,
    pages_of,
    plain_text,
    username_of,
    web_url,
)
from consumer.destinations.needed import not_given
from consumer.errors import DestinationError, Misconfigured, Permanent
from consumer.telemetry import get_logger

CLOCK_SECONDS = 60.0

_log = get_logger()


def _bare(value: SecretStr) -> SecretStr:
    return SecretStr(value.get_secret_value().strip())


Secret = Annotated[SecretStr, AfterValidator(_bare)]


@dataclass(frozen=True, slots=True)
class Work:
    """One record on its way: for whom, under which key, and what its page is to have."""

    context: ExportContext
    uid: str
    key: str
    parts: Sequence[Part]
    known: Mapping[str, str]
    metadata: Mapping[str, str]

    @property
    def page_id(self) -> str | None:
        """Return the page (in the inbox: the text) that we made before."""
        return known_page(self.context)


class LabArchives:
    """Makes a page a session in ``NexusLIMS Records/<instrument>``: summary, record and previews."""

    name = "labarchives"
    priority = 90
    links_to = ("cdcs",)
    limits = Limits(concurrency=1, min_interval_seconds=1.0)
    paces_requests = True
    settle_seconds = 120
    timeout_seconds = 300

    class Settings(TlsSettings):
        """Settings of LabArchives, read from ``NX_LABARCHIVES_*``."""

        access_key_id: Secret | None = Field(None, description="access key id of the organisation")
        access_password: Secret | None = Field(None, description="access password that belongs to the key id")
        user_id: Secret | None = Field(None, description="uid of the account that owns what is exported")
        url: BaseUrl | None = Field(
            None,
            description="API of your region, like https://api.labarchives.com/api; without it nothing goes there",
        )
        notebook_id: str | None = Field(None, description="id of the notebook; without it records go to the inbox")
        month_folders: bool = Field(default=False, description="a folder YYYY-MM in each instrument's folder")
        users_file: Path | None = Field(
            None, description="whose uid a record is made with: CSV lines username,uid, or a JSON object"
        )
        max_previews: int = Field(8, ge=0, le=100, description="previews attached to a page, each takes a request")
        min_interval_seconds: float = Field(1.0, ge=0, description="least time between two requests")

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        url = api_url(settings.url or "")
        self._web = web_url(url)
        self._notebook = (settings.notebook_id or "").strip()
        self._client = LabArchivesClient(
            url,
            settings,
            key_id=_revealed(settings.access_key_id),
            password=_revealed(settings.access_password),
            interval_seconds=settings.min_interval_seconds,
        )
        self._folders = Folders(self._client, self._notebook)
        self._max_file_size: int | None = None
        self._asked_for_size = False

    @property
    def disabled_because(self) -> str:
        """Name the setting that is missing, or nothing."""
        given = self._settings
        needed = {
            "NX_LABARCHIVES_ACCESS_KEY_ID": given.access_key_id,
            "NX_LABARCHIVES_ACCESS_PASSWORD": given.access_password,
            "NX_LABARCHIVES_USER_ID": given.user_id,
            "NX_LABARCHIVES_URL": given.url,
        }
        return not_given(needed)

    @property
    def enabled(self) -> bool:
        """Tell whether key, password, uid and address are given."""
        return not self.disabled_because

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def validate_config(self) -> tuple[bool, str | None]:
        """Check settings, address, certificate, clock, credentials, notebook and users file."""
        if self.disabled_because:
            return False, self.disabled_because
        try:
            seconds = await self._client.clock_offset_seconds()
            if abs(seconds) > CLOCK_SECONDS:
                _log.warning("clock_differs", destination=self.name, seconds=round(seconds), advice="set this clock")
            notebooks = await self._client.notebooks(_revealed(self._settings.user_id))
            if self._settings.users_file:
                await asyncio.to_thread(load_users, self._settings.users_file)
        except DestinationError as error:
            return False, f"LabArchives configuration error: {error}"
        if self._notebook and self._notebook not in notebooks:
            seen = ", ".join(f"{name!r} ({known})" for known, name in sorted(notebooks.items())) or "none at all"
            return False, (
                f"the user sees no notebook {self._notebook!r}: check NX_LABARCHIVES_NOTEBOOK_ID, "
                f"or share the notebook with that user; seen: {seen}"
            )
        return True, None

    async def export(self, context: ExportContext) -> ExportResult:
        """Bring the page (or the inbox) to what the context says; what is there already is not made again."""
        work = await self._prepare(context)
        if not self._notebook:
            return await self._to_inbox(work)
        page_id = work.page_id
        if page_id is None:
            page_id, entries = await self._page(work)
        else:
            await self._refuse_what_is_gone(work, page_id)
            entries = await self._client.entries(work.uid, self._notebook, page_id)
        sent = await self._complete(work, Place(self._notebook, page_id), entries)
        return self._result(work, page_id, page_url(self._web, self._notebook, page_id), sent)

    async def verify(self, context: ExportContext) -> Answer:
        """Tell whether the page and all it is to have are there.

        The user is asked for first: a wrong address could answer 404 to everything else.
        """
        work = await self._prepare(context)
        await self._client.notebooks(work.uid)
        if not self._notebook:
            return await self._verify_inbox(work)
        known = work.page_id
        if known is not None and context.purpose != "recheck":
            if not await self._is_there(work, known):
                return Absent()
            found = {known: await self._client.entries(work.uid, self._notebook, known)}
        else:
            found = await self._search(work, renew=True)
            if known is not None and known not in found and await self._is_there(work, known):
                found[known] = await self._client.entries(work.uid, self._notebook, known)
        if not found:
            return Absent()
        page_id = choose_page(found, work.parts, work.known, known)
        url = page_url(self._web, self._notebook, page_id)
        lacking = missing(work.parts, found[page_id], work.known)
        if context.purpose == "recheck":  # people may do with texts and previews what they like
            lacking = [part for part in lacking if isinstance(part, File) and part.path == context.xml_file_path]
        return Partial(page_id) if lacking else Present(page_id, url, _surplus(work, found, page_id))

    # --- what a record becomes ---

    async def _prepare(self, context: ExportContext) -> Work:
        if self.disabled_because:
            raise Misconfigured(self.disabled_because)
        uid, metadata = await self._account(context)
        key = hex_key(context.record_key, context.session_identifier)
        parts: list[Part] = [*link_notes(context.links, key)]
        if context.purpose != "link":
            limit = await self._size_limit(uid)
            own, skipped = await asyncio.to_thread(parts_of, context, key, limit, self._settings.max_previews)
            parts = [*own, *parts]
            if skipped:
                metadata["skipped_previews"] = str(skipped)
        return Work(context, uid, key, parts, known_entries(context), metadata)

    async def _size_limit(self, uid: str) -> int | None:
        if not self._asked_for_size:
            self._max_file_size = await self._client.max_file_size(uid)
            self._asked_for_size = True
        return self._max_file_size

    async def _account(self, context: ExportContext) -> tuple[str, dict[str, str]]:
        """Return whose uid is used, and a warning where it is not the person's; a record keeps its person."""
        service = _revealed(self._settings.user_id)
        if self._settings.users_file is None:
            return service, {}
        users = await asyncio.to_thread(load_users, self._settings.users_file)
        name = context.remembered.get("person", username_of(context)) or ""
        uid = users.get(str(name).strip().casefold())
        if uid:
            return uid, {}
        who = f"for {name!r} " if name else "for a session without a user "
        return service, {"warning": f"no uid {who}in NX_LABARCHIVES_USERS_FILE; the service account owns the entries"}

    async def _complete(self, work: Work, place: Place | None, entries: Sequence[Entry]) -> dict[str, str]:
        """Send what is not there; return the ids of what was sent, by part."""
        there, known, sent = list(entries), dict(work.known), dict[str, str]()
        for part in work.parts:
            if found_in(part, there, known) or (place is None and part.name in known):
                continue
            if isinstance(part, Note):
                entry_id = await self._client.add_text(work.uid, place, part.html)
                there.append(Entry(entry_id, "text entry", plain_text(part.html)))
            else:
                content = await asyncio.to_thread(read_again, part)
                entry_id = await self._client.add_file(work.uid, place, part.file_name, part.caption, content)
                there.append(Entry(entry_id, "Attachment", "", part.caption, part.file_name, part.size))
            known[part.name] = sent[part.name] = entry_id
            await work.context.remember(entries=known)
        return sent

    def _result(self, work: Work, record_id: str, url: str, sent: Mapping[str, str]) -> ExportResult:
        action: Action = "created"
        if work.context.purpose == "link":
            action = "linked"
        elif work.context.last_export is not None:
            action = "updated" if sent else "unchanged"
        metadata = {**work.metadata, **({"notebook_id": self._notebook} if self._notebook else {})}
        return ExportResult(
            success=True,
            destination_name=self.name,
            record_id=record_id,
            record_url=url,
            metadata=metadata,
            action=action,
        )

    # --- the notebook ---

    async def _page(self, work: Work) -> tuple[str, list[Entry]]:
        """Return the page of a record that no page is known of: one with its key, else a new one."""
        found = await self._search(work, renew=bool(work.context.remembered))
        if found:
            page_id = choose_page(found, work.parts, work.known, None)
            await work.context.remember(page=page_id)
            return page_id, found[page_id]
        context = work.context
        if self._settings.users_file and "person" not in context.remembered:
            await context.remember(person=username_of(context) or "")
        page_id, folder = await self._new_page(work)
        await context.remember(page=page_id, folder=folder)
        return page_id, []

    async def _new_page(self, work: Work) -> tuple[str, str]:
        """Make the page; return its id and its folder's."""
        context, folders = work.context, self._folders
        name = page_name(context.dt_from, context.session_identifier, work.key)
        month = month_name(context.dt_from) if self._settings.month_folders else None
        folder = await folders.place(work.uid, context.instrument_pid, month)
        try:
            return await self._client.insert(work.uid, self._notebook, folder, name, folder=False), folder
        except Permanent:
            # nothing was made; a person may have removed the folder since we looked it up
            anew = await folders.place(work.uid, context.instrument_pid, month, renew=True)
            if anew == folder:
                raise
            return await self._client.insert(work.uid, self._notebook, anew, name, folder=False), anew

    async def _search(self, work: Work, *, renew: bool) -> dict[str, list[Entry]]:
        """Return the live pages with our key and their entries. Raises ``Permanent`` if they are somebody else's."""
        context = work.context
        nodes = await self._folders.content(
            work.uid, context.instrument_pid, month_name(context.dt_from), renew=renew
        )
        pages = pages_of(nodes, work.key)
        found = {page: await self._client.entries(work.uid, self._notebook, page) for page in pages}
        hashes = {*context.sent_hashes, context.record_sha256}
        foreign = [page for page, entries in found.items() if is_foreign(entries, work.key, hashes)]
        if found and len(foreign) == len(found) and work.page_id not in found:
            where = page_url(self._web, self._notebook, foreign[0])
            raise Permanent(f"{where} has our key and records that we never sent", code="conflict")
        return {page: entries for page, entries in found.items() if page not in foreign or page == work.page_id}

    async def _is_there(self, work: Work, page_id: str) -> bool:
        """Tell whether a page lies where it was made; it may have another name."""
        folder = work.context.remembered.get("folder")
        if folder is not None and await self._folders.holds(work.uid, str(folder), page_id):
            return True
        context = work.context
        nodes = await self._folders.content(work.uid, context.instrument_pid, month_name(context.dt_from), renew=True)
        return any(node.id == page_id for node in nodes)

    async def _refuse_what_is_gone(self, work: Work, page_id: str) -> None:
        if await self._is_there(work, page_id):
            return
        deleted = await self._folders.deleted(work.uid)
        gone = page_id in {node.id for node in deleted} or pages_of(deleted, work.key)
        what = f"was put into {DELETED_FOLDER!r}" if gone else "was moved or deleted"
        url = page_url(self._web, self._notebook, page_id)
        message = f"the page {url} {what} by a person; move it back, or `nexus-export replay --overwrite` decides"
        raise Permanent(message, code="changed_at_destination")

    # --- the inbox ---

    async def _to_inbox(self, work: Work) -> ExportResult:
        known, context = work.page_id, work.context
        if self._settings.users_file and "person" not in context.remembered:
            await context.remember(person=username_of(context) or "")
        sent = await self._complete(work, None, [])
        main = next((work.known.get(p.name) or sent.get(p.name) for p in work.parts if isinstance(p, Note)), None)
        record_id = known or main
        if record_id is None:
            raise Permanent("nothing was to be sent", code="rejected")
        return self._result(work, record_id, f"{self._web}/", sent)

    async def _verify_inbox(self, work: Work) -> Answer:
        """Ask for what we remember; nobody can tell whether there is more."""
        lost = [part.name for part in work.parts if part.name not in work.known]
        main = work.page_id or next((work.known.get(p.name) for p in work.parts if isinstance(p, Note)), None)
        if main is None or (lost and work.context.purpose != "recheck"):
            return Unsure(
                f"the inbox of LabArchives cannot be listed; look there for the record key {work.key}, "
                "or set NX_LABARCHIVES_NOTEBOOK_ID"
            )
        entry = await self._client.entry(work.uid, main)
        return Absent() if entry is None else Present(main, f"{self._web}/")


def _revealed(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret else ""


def _surplus(work: Work, found: Mapping[str, Sequence[Entry]], page_id: str) -> tuple[str, ...]:
    """Return the further pages with our key, and what the page has twice; a link may stand in several texts."""
    twice = [
        entry_id
        for part in work.parts
        if not part.mark.startswith("link:")
        for entry_id in found_in(part, found[page_id], work.known)[1:]
    ]
    return (*sorted(page for page in found if page != page_id), *twice)
