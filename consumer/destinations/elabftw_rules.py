"""What can be said about eLabFTW without asking it: what is sent, what its answers mean, what an entry lacks.

The server purifies HTML, cuts titles and knows no transaction, so an entry carries notes of ours in its metadata:
``done`` names the record and page that everything written before it belongs to, ``page`` the text of the last whole
page of ours, ``fields`` the values of our extra fields. They are written with a new entry, else last.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lxml.html import builder as tag

from consumer.destinations.contract import ExportContext
from consumer.destinations.elabftw_entry import (
    ARCHIVED,
    DELETED,
    HTML,
    MARKDOWN,
    NOTES,
    RECORD_KEY,
    RECORD_SHA256,
    as_number,
    as_object,
    digest,
    field_value,
    metadata_of,
    notes_of,
    one_line,
    page_digest,
    state_of,
    stored_digest,
    uploads_of,
    words,
)
from consumer.destinations.summary import as_text, page, related, summarize

XML_COMMENT = "NexusLIMS XML record"
PREVIEW_COMMENT = "NexusLIMS preview"
TITLE_LENGTH = 255
MAX_PREVIEWS = 20
MAX_PREVIEW_BYTES = 10 * 1024**2

_KEY_LENGTH = 32
_SESSION_GROUP, _LINKS_GROUP = 1, 2
_GROUPS = {_SESSION_GROUP: "Session Information", _LINKS_GROUP: "Related Records"}
_LINK_FIELDS = {"cdcs": "CDCS Record"}
_LINK_POSITION = 10
#: Fields that name the copy itself: nobody else's value belongs there.
_OURS_ALONE = {RECORD_KEY, RECORD_SHA256}


@dataclass(frozen=True, slots=True)
class File:
    """A file that belongs to the entry; ``sha256`` is of its bytes, ``comment`` says what it is and which bytes."""

    path: Path
    name: str
    kind: str
    sha256: str
    size: int

    @property
    def comment(self) -> str:
        """Say what the file is, and which bytes it should have."""
        return comment_of(self.kind, self.sha256)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The state that an entry should have. ``page`` and ``done`` are digests, as the notes hold them."""

    key: str
    title: str
    body: str
    tags: tuple[str, ...]
    fields: Mapping[str, Mapping[str, Any]]
    links: Mapping[str, str]
    record: File
    previews: tuple[File, ...]
    page: str
    done: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """What we remember of the page: digests of it as the server stored it, and the notes that belong to them."""

    stored: frozenset[str] = frozenset()
    done: str | None = None


@dataclass(frozen=True, slots=True)
class Lacks:
    """What an entry has not got yet beside its page."""

    tags: tuple[str, ...] = ()
    files: tuple[File, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written to an entry, in this order; ``kept``: a person's page stays as it is."""

    patch: Mapping[str, Any] = field(default_factory=dict)
    kept: bool = False


# --- what is sent ----------------------------------------------------------------------------------------------


def wanted_of(context: ExportContext) -> Wanted:
    """Read record and previews, and say what the entry should be. Raises ``OSError`` if the record is gone."""
    record = _file(context.xml_file_path, XML_COMMENT)
    summary = summarize(context)
    links = links_of(context)
    title, body = title_of(context.xml_file_path.stem), page(summary, links)
    # an empty key would be that of every duplicate
    key = context.record_key.replace("-", "") or digest(context.session_identifier)[:_KEY_LENGTH]
    previews, warnings = _previews(summary.previews)
    shown = page_digest(title, body)
    return Wanted(
        key=key,
        title=title,
        body=body,
        tags=tags_of(context.instrument_pid, context.user),
        fields=fields_of(context, links, key, record.sha256),
        links=links,
        record=record,
        previews=previews,
        page=shown,
        done=digest([shown, record.sha256]),
        warnings=warnings,
    )


def links_of(context: ExportContext) -> dict[str, str]:
    """Return the addresses of the session's copies elsewhere; a result of this very job counts too."""
    results = {name: context.get_result(name) for name in _LINK_FIELDS}
    found = {name: result.record_url for name, result in results.items() if result and result.success}
    return {**{name: url for name, url in found.items() if url}, **context.links}


def _previews(paths: Sequence[Path]) -> tuple[tuple[File, ...], tuple[str, ...]]:
    """Take the first previews that can be read and are not too large."""
    found: dict[tuple[str, str], File] = {}
    warnings = []
    if len(paths) > MAX_PREVIEWS:
        warnings.append(f"{len(paths) - MAX_PREVIEWS} of {len(paths)} previews were left out")
    for path in paths[:MAX_PREVIEWS]:
        try:
            size = path.stat().st_size
            if size > MAX_PREVIEW_BYTES:
                warnings.append(f"preview {path.name} is too large ({size} bytes)")
                continue
            preview = _file(path, PREVIEW_COMMENT)
        except OSError as error:
            warnings.append(f"preview {path.name} cannot be read: {error.strerror}")
            continue
        found[preview.name, preview.sha256] = preview
    return tuple(found.values()), tuple(warnings)


def _file(path: Path, kind: str) -> File:
    content = path.read_bytes()
    return File(path, file_name(path.name), kind, hashlib.sha256(content).hexdigest(), len(content))


def title_of(stem: str) -> str:
    """Return the title as the server keeps it: one line of at most 255 characters."""
    return one_line(f"NexusLIMS Experiment - {stem}")[:TITLE_LENGTH].rstrip()


def file_name(name: str) -> str:
    """Return a file name that comes out of a multipart form as it went in."""
    return "".join("_" if c in '"\\/' or not c.isprintable() else c for c in name)


def comment_of(kind: str, sha256: str) -> str:
    """Return the comment of an attachment."""
    return f"{kind}, sha256 {sha256}"


def tags_of(instrument: str, user: str | None) -> tuple[str, ...]:
    """Return the tags; a bar would make two of one where the server joins them."""
    texts = (one_line(text.replace("|", " ")) for text in ("NexusLIMS", instrument, user or ""))
    return tuple(dict.fromkeys(text for text in texts if text))


def fields_of(context: ExportContext, links: Mapping[str, str], key: str, sha256: str) -> dict[str, dict[str, Any]]:
    """Return the extra fields by name."""
    fields = {
        "Session ID": _field("text", context.session_identifier, 1),
        "Instrument": _field("text", context.instrument_pid, 2),
        "Start Time": _time_field(context.dt_from, 3),
        "End Time": _time_field(context.dt_to, 4),
    }
    if context.user:
        fields["User"] = _field("text", context.user, 5)
    # a person's duplicate of the entry must not be found in its place
    alone = {"readonly": True, "blank_value_on_duplicate": True}
    fields[RECORD_KEY] = {**_field("text", key, 6), **alone}
    fields[RECORD_SHA256] = {**_field("text", sha256, 7), **alone}
    for number, (name, url) in enumerate(sorted(links.items())):
        fields[link_field(name)] = _field("url", url, _LINK_POSITION + number, _LINKS_GROUP)
    return fields


def link_field(destination: str) -> str:
    """Name the field with the address of a copy elsewhere."""
    return _LINK_FIELDS.get(destination, f"{destination} record")


def _field(kind: str, value: str, position: int, group: int = _SESSION_GROUP) -> dict[str, Any]:
    return {"type": kind, "value": value, "position": position, "group_id": group}


def _time_field(moment: datetime, position: int) -> dict[str, Any]:
    """Return a time in its own zone, which the server cannot hold and the description tells."""
    text = moment.isoformat(timespec="minutes")
    return {**_field("datetime-local", text[:16], position), "description": f"UTC{text[16:]}"}


def payload(wanted: Wanted, category: int | None, status: int | None) -> dict[str, Any]:
    """Return the body of the request that creates the entry: no tags, and metadata as an object."""
    body: dict[str, Any] = {
        "title": wanted.title,
        "body": wanted.body,
        "content_type": HTML,
        "category": category,
        "status": status,
        "metadata": merged({}, wanted, wanted.page),
    }
    return {name: value for name, value in body.items() if value is not None}


def search(key: str, limit: int) -> dict[str, str | int]:
    """Return the query that finds all entries with a record key, also archived and deleted ones, oldest first."""
    return {
        "extended": f'extrafield:s:"{RECORD_KEY}":"{key}"',
        "scope": 3,
        "state": "1,2,3",
        "order": "id",
        "sort": "asc",
        "limit": limit,
        "offset": 0,
        "full": 1,
    }


# --- what it lacks -------------------------------------------------------------------------------------------------


def plan(entry: Mapping[str, Any], wanted: Wanted, known: Known) -> Plan:
    """Say what is to be written to title, body and metadata; a page that a person changed only gets additions."""
    notes = notes_of(entry)
    markdown = as_number(entry.get("content_type"), HTML) == MARKDOWN
    # before 5.4 the key owner's preference decided, and the HTML was stored as it was
    if markdown and entry.get("body") == wanted.body:
        return Plan({"content_type": HTML, "body": wanted.body, "metadata": _written(entry, wanted, wanted.page)})
    says = page_digest(entry.get("title"), entry.get("body"))
    as_stored = stored_digest(entry) in known.stored
    if notes.get("done") == wanted.done:
        return Plan(kept=says != wanted.page and not as_stored)
    if says == wanted.page:
        return Plan({"metadata": _written(entry, wanted, wanted.page)})
    # notes that we do not remember are of a write whose answer was lost
    in_doubt = notes.get("done") is not None and notes.get("done") != known.done
    if as_stored or (in_doubt and says == notes.get("page")):
        whole = {"title": wanted.title, "body": wanted.body, "metadata": _written(entry, wanted, wanted.page)}
        return Plan({"content_type": HTML, **whole} if markdown else whole)
    text = additions(entry, wanted, markdown=markdown)
    metadata = _written(entry, wanted, notes.get("page"))
    return Plan({"bodyappend": text, "metadata": metadata} if text else {"metadata": metadata}, kept=True)


def additions(entry: Mapping[str, Any], wanted: Wanted, *, markdown: bool) -> str:
    """Return what is appended to a page that a person changed; what is there already is not said twice."""
    body, parts = str(entry.get("body") or ""), []
    sha256 = wanted.record.sha256
    if field_value(entry, RECORD_SHA256) != sha256 and sha256 not in body:
        parts.append(tag.P(f"NexusLIMS built this record anew: {wanted.record.name} is attached, sha256 {sha256}."))
    lacking = {name: url for name, url in wanted.links.items() if not _has_link(entry, body, name, url)}
    parts += related(lacking)
    if markdown:
        lines = ["".join(part.itertext()) for part in parts]
        return "".join(f"\n\n{line}" for line in [*lines, *lacking.values()])
    return "".join(as_text(part) for part in parts)


def _has_link(entry: Mapping[str, Any], body: str, name: str, url: str) -> bool:
    return field_value(entry, link_field(name)) == url or url in body or url in words(body)[1]


def merged(metadata: Mapping[str, Any], wanted: Wanted, page_there: str | None) -> dict[str, Any]:
    """Return the metadata with our fields and notes; what a person changed or took away stays so."""
    extra, ours = dict(as_object(metadata.get("extra_fields"))), dict(as_object(metadata.get("elabftw")))
    wrote = as_object(as_object(metadata.get(NOTES)).get("fields"))
    for name, wish in wanted.fields.items():
        there = extra.get(name)
        untouched = name not in wrote if there is None else as_object(there).get("value") == wrote.get(name)
        if untouched or name in _OURS_ALONE:
            extra[name] = {**as_object(there), **wish}
    groups = ours.get("extra_fields_groups")
    groups = list(groups) if isinstance(groups, list) else []
    present = {as_object(group).get("id") for group in groups}
    used = {wish["group_id"] for wish in wanted.fields.values()}
    groups += [{"id": number, "name": _GROUPS[number]} for number in sorted(used - present)]
    ours = {"display_main_text": True, **ours, "extra_fields_groups": groups}
    fields = {**wrote, **{name: wish["value"] for name, wish in wanted.fields.items() if name not in _OURS_ALONE}}
    notes = {"done": wanted.done, "page": page_there, "fields": fields}
    notes = {name: value for name, value in notes.items() if value is not None}
    return {**metadata, "elabftw": ours, "extra_fields": extra, NOTES: notes}


def _written(entry: Mapping[str, Any], wanted: Wanted, page_there: str | None) -> str:
    """Return the metadata as a change wants it: as text."""
    return json.dumps(merged(metadata_of(entry), wanted, page_there))


def is_attached(entry: Mapping[str, Any], file: File) -> bool:
    """Tell whether a file is there whole; the server gives no digest of files from 100 MB on."""
    return any(_is_copy(upload, file) for upload in uploads_of(entry) if upload.get("real_name") == file.name)


def _is_copy(upload: Mapping[str, Any], file: File) -> bool:
    sha256 = upload.get("hash")
    if sha256:
        return str(sha256).lower() == file.sha256
    return upload.get("filesize") == file.size and upload.get("comment") == file.comment


def replacements(
    entry: Mapping[str, Any], files: Sequence[File], wanted: Wanted, hashes: Collection[str]
) -> dict[File, str]:
    """Return the ids of our attachments that files take the place of: older ones, and such as came out empty.

    ``hashes`` are those of all records that we sent. An attachment whose bytes a person replaced is none of ours.
    """
    present = {file.sha256 for file in (wanted.record, *wanted.previews)}
    free = [upload for upload in uploads_of(entry) if upload.get("hash") not in present]
    found = {}
    for file in files:
        comments = {comment_of(file.kind, sha256) for sha256 in {*hashes, file.sha256}}
        old = next((upload for upload in free if _is_older(upload, file, comments)), None)
        if old is not None:
            free.remove(old)
            found[file] = str(old.get("id"))
    return found


def _is_older(upload: Mapping[str, Any], file: File, comments: Collection[str]) -> bool:
    comment, sha256 = upload.get("comment"), upload.get("hash")
    as_sent = comment == comment_of(file.kind, str(sha256))
    if file.kind == PREVIEW_COMMENT:
        ours = as_sent and upload.get("real_name") == file.name
    else:
        ours = comment in comments and (as_sent or not sha256)
    return ours or (comment in comments and upload.get("filesize") == 0)


def lacking(entry: Mapping[str, Any], wanted: Wanted, *, tags: bool) -> Lacks:
    """Say which tags and files an entry lacks; without ``tags`` a person may have taken some away."""
    files = [file for file in (wanted.record, *wanted.previews) if not is_attached(entry, file)]
    return Lacks(tuple(missing_tags(entry, wanted)) if tags else (), tuple(files))


def obstacle(entry: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Say why nothing may be written to an entry: a code, what it is, and what undoes it; None if it may."""
    if state_of(entry) == DELETED:
        return "deleted", "was deleted", "restore it there"
    if state_of(entry) == ARCHIVED:
        return "archived", "is archived", "unarchive it there"
    if as_number(entry.get("locked"), 0):
        return "locked", "is locked", "unlock it there"
    return None


def missing_tags(entry: Mapping[str, Any], wanted: Wanted) -> list[str]:
    """Return the tags that an entry lacks; the server compares them without regard to case."""
    there = {text.strip().casefold() for text in str(entry.get("tags") or "").split("|")}
    return [text for text in wanted.tags if text.casefold() not in there]
