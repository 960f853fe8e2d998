"""What can be said about LabArchives without asking it: names, keys, addresses, and what a page still lacks.

LabArchives allows equal names and lists in any order, so everything that we make carries the record's key, and where
several nodes fit, the one with the least id is taken: any two processes then choose the same one.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from lxml import etree, html
from lxml.html import builder as tag

from consumer.destinations.contract import ExportContext
from consumer.destinations.summary import Summary, as_text, page, related

ROOT_FOLDER = "NexusLIMS Records"
DELETED_FOLDER = "API Deleted Items"
XML_CAPTION = "NexusLIMS XML record"
PREVIEW_CAPTION = "NexusLIMS preview"
#: LabArchives answers 413 to forms near 1 MB, and percent-encoding may triple a text.
FILES_BYTES = 150_000
NAME_LENGTH = 200

_KEY_LENGTH = 12
_WEB_HOSTS = {
    "api.labarchives.com": "mynotebook.labarchives.com",
    "auapi.labarchives.com": "au-mynotebook.labarchives.com",
    "caapi.labarchives.com": "ca-mynotebook.labarchives.com",
    "euapi.labarchives.com": "eu-mynotebook.labarchives.com",
    "ukapi.labarchives.com": "uk-mynotebook.labarchives.com",
    "api.labarchives-gov.com": "mynotebook.labarchives-gov.com",
}


@dataclass(frozen=True, slots=True)
class Node:
    """A folder or page of a notebook."""

    id: str
    name: str
    is_page: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a page; what LabArchives left out is empty or None. ``size`` is in bytes."""

    id: str
    part_type: str
    text: str = ""
    caption: str = ""
    file_name: str = ""
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """A text entry that a page is to have; ``mark`` tells it from our other ones."""

    mark: str
    key: str
    html: str

    @property
    def name(self) -> str:
        """Return what its entry id is remembered under."""
        return f"note {self.mark}"

    def is_in(self, entry: Entry, known_id: str | None) -> bool:
        """Tell whether an entry is this note; a person may have rewritten the one we remember."""
        if entry.id == known_id:
            return True
        return not is_attachment(entry) and self.key in entry.text and self.mark in entry.text


@dataclass(frozen=True, slots=True)
class File:
    """An attachment that a page is to have; ``path`` is read when it is sent."""

    mark: str
    file_name: str
    caption: str
    size: int
    path: Path

    @property
    def name(self) -> str:
        """Return what its entry id is remembered under."""
        return f"file {self.mark}"

    def is_in(self, entry: Entry, known_id: str | None) -> bool:
        """Tell whether an entry is this file; LabArchives tells no hash of it, so the caption does."""
        if not is_attachment(entry) or entry.size not in {None, self.size}:
            return False
        return entry.id == known_id or (self.mark in entry.caption and entry.file_name in {"", self.file_name})


Part = Note | File


# --- names and addresses ---------------------------------------------------------------------------------------


def hex_key(record_key: str, session: str) -> str:
    """Return the key as hex digits; one that is none, or missing (a call by hand), gives way to a digest."""
    plain = record_key.replace("-", "").lower()
    if re.fullmatch(r"[0-9a-f]{16,64}", plain):
        return plain
    return hashlib.sha256((record_key or session).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def bracket(key: str) -> str:
    """Return the part of a page's name that it is found by, whatever a person makes of the rest."""
    return f"[k:{key[:_KEY_LENGTH]}]"


def page_name(start: datetime, session: str, key: str) -> str:
    """Return the name of a session's page; the day is the one at the instrument."""
    return f"{start:%Y-%m-%d} \N{EM DASH} {plain_name(session)[:NAME_LENGTH]} {bracket(key)}"


def plain_name(text: str) -> str:
    """Return a name in one line without control characters; never empty."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "unknown"


def month_name(start: datetime) -> str:
    """Return the name of a month's folder."""
    return f"{start:%Y-%m}"


def api_url(url: str) -> str:
    """Return the address with ``/api/`` at its end; people leave it out."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path="/api/")) if parts.path in {"", "/"} else url


def web_url(url: str) -> str:
    """Return where people see what lies behind an API address; of an unknown host, the same without ``/api``."""
    parts = urlsplit(url)
    web = _WEB_HOSTS.get(parts.hostname or "")
    if web:
        return f"https://{web}"
    return urlunsplit(parts._replace(path=re.sub(r"/api/?$", "", parts.path))).rstrip("/")


def page_url(web: str, notebook: str, page_id: str) -> str:
    """Return the address of a page."""
    return f"{web}/{quote(notebook, safe='')}/page/{quote(page_id, safe='')}"


# --- choosing among what is there ------------------------------------------------------------------------------


def folders_named(nodes: Iterable[Node], name: str) -> list[str]:
    """Return the ids of the folders with a name, the one to use first."""
    return sorted(node.id for node in nodes if not node.is_page and plain_name(node.name) == plain_name(name))


def pages_of(nodes: Iterable[Node], key: str) -> list[str]:
    """Return the ids of the pages that carry a key, in an order that does not depend on the server's."""
    return sorted(node.id for node in nodes if node.is_page and bracket(key) in node.name)


def is_attachment(entry: Entry) -> bool:
    """Tell whether an entry holds a file."""
    return entry.part_type.casefold() == "attachment"


def is_foreign(entries: Sequence[Entry], key: str, hashes: Collection[str]) -> bool:
    """Tell whether a page with our short key holds only records of somebody else: other key, bytes we never sent."""
    marks = [file_mark(sha256) for sha256 in hashes if sha256]
    ours = any(key in e.text or any(mark in e.caption for mark in marks) for e in entries)
    theirs = any("Record key: " in e.text or e.caption.startswith(XML_CAPTION) for e in entries)
    return theirs and not ours


def found_in(part: Part, entries: Iterable[Entry], known: Mapping[str, str]) -> list[str]:
    """Return the ids of the entries that are this part, the remembered one first."""
    known_id = known.get(part.name)
    found = [entry.id for entry in entries if part.is_in(entry, known_id)]
    return sorted(found, key=lambda entry_id: (entry_id != known_id, entry_id))


def missing(parts: Iterable[Part], entries: Sequence[Entry], known: Mapping[str, str]) -> list[Part]:
    """Return the parts that no entry is."""
    return [part for part in parts if not found_in(part, entries, known)]


def choose_page(
    found: Mapping[str, Sequence[Entry]], parts: Sequence[Part], known: Mapping[str, str], page_id: str | None
) -> str:
    """Pick the page to keep among those with our key: the known one, else the fullest, else the least id."""
    if page_id in found:
        return str(page_id)
    return min(found, key=lambda other: (len(missing(parts, found[other], known)), other))


# --- what a page is to have ------------------------------------------------------------------------------------


def file_mark(sha256: str) -> str:
    """Return the part of a caption or text that says which bytes it is about."""
    return f"sha256:{sha256}"


def link_mark(url: str) -> str:
    """Return the part of a text that says which link it holds."""
    return f"link:{hashlib.sha256(url.encode('utf-8', 'surrogatepass')).hexdigest()[:_KEY_LENGTH]}"


def record_note(summary: Summary, links: Mapping[str, str], key: str, name: str, sha256: str) -> Note:
    """Return the page's main text, with the links that are known."""
    marks = " ".join([file_mark(sha256), *map(link_mark, links.values())])
    summary = replace(summary, files=_bounded(summary.files))
    lines = [tag.P(f"Record: {plain_name(name)}"), _key_line(key, marks)]
    return Note(file_mark(sha256), key, page(summary, links) + "".join(map(as_text, lines)))


def link_notes(links: Mapping[str, str], key: str) -> list[Note]:
    """Return one small text for each link that a page may lack."""
    return [_link_note(name, url, key) for name, url in sorted(links.items())]


def _link_note(name: str, url: str, key: str) -> Note:
    mark = link_mark(url)
    return Note(mark, key, "".join(map(as_text, [*related({name: url}), _key_line(key, mark)])))


def _key_line(key: str, marks: str) -> Any:
    return tag.P(f"Record key: {key} {marks}")


def xml_file(path: Path, sha256: str, size: int) -> File:
    """Return the record as the attachment that it is to be."""
    mark = file_mark(sha256)
    return File(mark, file_name(path), f"{XML_CAPTION} {mark}", size, path)


def file_name(path: Path) -> str:
    """Return a file's name; what is no text in it becomes a question mark."""
    return path.name.encode(errors="replace").decode()


def preview_captions(activities: Iterable[Any]) -> dict[Path, str]:
    """Return the previews and what they show: the data file's name, numbered where it has several signals."""
    found: dict[Path, str] = {}
    for activity in activities:
        names = [PurePath(str(name)).name for name in activity.files]
        paired = len(names) == len(activity.previews)
        seen: dict[str, int] = {}
        for index, path in enumerate(activity.previews):
            name = names[index] if paired else path.name if path else ""
            seen[name] = seen.get(name, 0) + 1
            if path is not None:
                several = paired and names.count(name) > 1
                found.setdefault(path, f"{name} ({seen[name]} of {names.count(name)})" if several else name)
    return found


def preview_file(path: Path, shown: str, content: bytes) -> File:
    """Return a preview as the attachment that it is to be."""
    mark = file_mark(hashlib.sha256(content).hexdigest())
    caption = f"{plain_name(shown)[:NAME_LENGTH]}: {PREVIEW_CAPTION} {mark}"
    return File(mark, file_name(path), caption, len(content), path)


def _bounded(files: Sequence[str]) -> tuple[str, ...]:
    """Cut a list of names that would not go through; the attached record has them all."""
    room = FILES_BYTES
    for index, name in enumerate(files):
        room -= len(quote(name, safe="", errors="replace")) + 30
        if room < 0:
            return (*files[:index], f"and {len(files) - index} more, see the attached record")
    return tuple(files)


# --- what comes from LabArchives or from files -----------------------------------------------------------------


def plain_text(fragment: str) -> str:
    """Return the text of an HTML fragment in one line: editors change blanks and entities."""
    try:
        text = str(html.fromstring(f"<div>{fragment}</div>").xpath("string()"))
    except (etree.LxmlError, ValueError):
        text = fragment
    return " ".join(text.split())


def read_users(text: str, *, is_json: bool) -> dict[str, str]:
    """Return uids by username in lower case, from a JSON object or from CSV lines ``username,uid``.

    Raises ``ValueError`` for anything else.
    """
    if is_json:
        value = json.loads(text)
        if not isinstance(value, dict) or not all(isinstance(uid, str) for uid in value.values()):
            raise ValueError('must be a JSON object like {"ada": "uid of ada"}')
        rows = [[name, uid] for name, uid in value.items()]
    else:
        rows = [row for row in csv.reader(io.StringIO(text)) if row and not row[0].lstrip().startswith("#")]
        if any(len(row) != 2 for row in rows):  # noqa: PLR2004 - username and uid
            raise ValueError("must have lines of two columns: username,uid")
    users = {name.strip().casefold(): uid.strip() for name, uid in rows}
    if users.get("username") == "uid":
        del users["username"]
    if not all(name and uid for name, uid in users.items()):
        raise ValueError("has a line without a username or without a uid")
    return users


def username_of(context: ExportContext) -> str | None:
    """Return the name that a session's person has in the users file: the reservation's, else the record's."""
    return getattr(context.reservation_event, "username", None) or context.user


def known_page(context: ExportContext) -> str | None:
    """Return the id of the page (in the inbox: the text entry) that we made before, if we did.

    NexusLIMS told the text entry's id, and the page's only in its address.
    """
    last = context.last_export
    if last is not None:
        old = re.search(r"/#/[^/]+/([^/]+)$", last.record_url or "")
        return unquote(old[1]) if old else last.record_id
    known = context.remembered.get("page") or context.remembered.get("record_id")
    return None if known is None else str(known)


def known_entries(context: ExportContext) -> dict[str, str]:
    """Return the ids of the entries that we made before, by part."""
    known = context.remembered.get("entries")
    return {str(name): str(entry_id) for name, entry_id in known.items()} if isinstance(known, Mapping) else {}
