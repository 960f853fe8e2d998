"""A folder as a destination: ``<root>/<instrument>/<year>/<month>/<stem>.xml`` and its manifest ``<stem>.json``.

The manifest says whose record it is, which bytes it has, what it was before and where else it lies. It is written
last: until then the old state holds, and a second export completes what a crash has interrupted.
"""

import errno
import hashlib
import itertools
import json
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consumer.destinations.atomic import Folder, Found, NotPlainError, RootMissingError, open_folder
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
from consumer.errors import Misconfigured, Permanent, Transient

_INSTRUMENT_BYTES = 100
_STEM_BYTES = 200  # leaves room for ".v1.xml" and for the name of a temporary file
_RESERVED = frozenset('/\\:*?"<>|')  # what Linux or a Windows share refuses in a name
_DIGEST = re.compile(r"-[0-9a-f]{16}\Z")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class Version(BaseModel):
    """Earlier bytes of a record; ``archived_at`` is when they were written."""

    model_config = ConfigDict(frozen=True, extra="allow")

    file: str
    sha256: str
    size: int
    archived_at: datetime


class Manifest(BaseModel):
    """What lies beside a record; fields that a person added are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: Literal[1] = 1
    session_identifier: str
    instrument_pid: str
    file: str
    sha256: str
    size: int
    versions: tuple[Version, ...] = ()
    links: dict[str, str] = {}

    def encode(self) -> bytes:
        """Return the bytes of the manifest file."""
        return (
            json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        ).encode()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies below the root."""

    folders: tuple[str, ...]
    stem: str

    @property
    def record(self) -> str:
        """Return the name of the record file."""
        return f"{self.stem}.xml"

    @property
    def manifest(self) -> str:
        """Return the name of the manifest file."""
        return f"{self.stem}.json"

    def relative(self, name: str) -> str:
        """Return the path of a file beside the record, relative to the root."""
        return "/".join((*self.folders, name))


def safe_name(text: str, limit: int = _INSTRUMENT_BYTES) -> str:
    """Make one safe path component; different texts give different ones.

    A text that had to be changed gets a digest, and so does one that looks as if it had one already.
    """
    plain = "".join(c if c.isprintable() and c not in _RESERVED else "_" for c in text).strip(" .")
    if plain and plain == text and len(text.encode()) <= limit and not _DIGEST.search(text):
        return text
    digest = "-" + hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    return (plain.encode()[: limit - len(digest)].decode(errors="ignore") or "unnamed") + digest


def place_of(context: ExportContext) -> Place:
    """Return where the record lies or will lie: where it was put first, else by instrument and month."""
    if context.last_export is not None:
        return _recorded_place(context.last_export.record_id)
    month = (f"{context.dt_from.year:04}", f"{context.dt_from.month:02}")
    return Place((safe_name(context.instrument_pid), *month), safe_name(context.xml_file_path.stem, _STEM_BYTES))


def _recorded_place(record_id: str) -> Place:
    path = PurePosixPath(record_id)
    plain = all(part.isprintable() and not part.startswith(".") for part in path.parts)
    if path.is_absolute() or not plain or path.suffix != ".xml" or str(path) != record_id:
        raise Permanent(f"the recorded place {record_id!r} is no path inside the archive", code="conflict")
    return Place(path.parts[:-1], path.stem)


class LocalArchive:
    """Keeps every record, with its earlier versions, in a folder."""

    name = "local_archive"
    priority = 10
    limits = Limits(concurrency=4)
    settle_seconds = 0
    timeout_seconds = 60

    class Settings(BaseModel):
        """Settings of the archive; ``path`` is read from ``NX_LOCAL_ARCHIVE_PATH``."""

        model_config = ConfigDict(frozen=True)

        path: Path | None = Field(None, description="folder of the archive; without it there is none")

    def __init__(self, settings: Settings) -> None:
        self._path = settings.path
        self._was_there = False

    @property
    def enabled(self) -> bool:
        """Tell whether a folder is set."""
        return self._path is not None

    def validate_config(self) -> tuple[bool, str | None]:
        """Make the folder and write a file there; a folder that was there before is not made again.

        If it is gone then, a mount is lost, and what is written below its mount point would be hidden later.
        """
        if self._path is None:
            return False, "NX_LOCAL_ARCHIVE_PATH is not set; name the folder that records should be kept in"
        try:
            if not self._was_there:
                self._path.mkdir(parents=True, exist_ok=True)
            with open_folder(self._path) as folder:
                name = f".nexus-export-check-{secrets.token_hex(8)}"
                folder.create(name, b"nexus-export can write here\n")
                folder.remove(name)
        except OSError as error:
            return False, f"NX_LOCAL_ARCHIVE_PATH: {_advice(self._path, error)}"
        self._was_there = True
        return True, None

    def export(self, context: ExportContext) -> ExportResult:
        """Bring the archive to the state of the context; done twice it changes nothing."""
        content, sha256 = _content(context)
        place = place_of(context)
        with _next_actions(self._root), open_folder(self._root, place.folders, make=True) as folder:
            before = _read_manifest(folder, place, context.session_identifier)
            found = folder.look(place.record)
            _refuse_what_is_not_ours(place, found, before, {sha256, *context.sent_hashes})
            links = {**(before.links if before else {}), **_links(context, self.name)}
            whole = before is not None and found is not None and found.sha256 == before.sha256 == sha256
            if whole and before is not None and links == before.links:
                return self._result(context, place, before, _same(context))
            folder.prepare(place.stem, ".json")
            manifest = Manifest.model_validate(
                {
                    **(before.model_dump() if before else {}),
                    "session_identifier": context.session_identifier,
                    "instrument_pid": context.instrument_pid,
                    "file": place.record,
                    "sha256": sha256,
                    "size": len(content),
                    "versions": _put_aside(folder, place, found, before, sha256),
                    "links": links,
                }
            )
            if found is None:
                folder.create(place.record, content)
            elif found.sha256 != sha256:
                folder.replace(place.record, content)
            elif not whole:
                folder.sync(place.record)  # written by a person, or by a process that was killed before this
            (folder.replace if before else folder.create)(place.manifest, manifest.encode())
        action = _same(context) if whole else "updated" if before and found else "created"
        return self._result(context, place, manifest, action)

    def verify(self, context: ExportContext) -> Answer:
        """Tell whether exactly this record is there, with its manifest. Raises ``Permanent`` on a conflict."""
        place = place_of(context)
        record_id = place.relative(place.record)
        try:
            sha256 = context.record_sha256 or hashlib.sha256(context.xml_file_path.read_bytes()).hexdigest()
            with open_folder(self._root, place.folders) as folder:
                manifest = _read_manifest(folder, place, context.session_identifier)
                found = folder.look(place.record)
        except NotPlainError as error:
            raise Permanent(f"{record_id}: {error}", code="conflict") from None
        except FileNotFoundError:
            return Absent()
        except OSError as error:
            return Unsure(_advice(self._root, error))
        if manifest is None:
            return Partial(record_id) if found and found.sha256 in {sha256, *context.sent_hashes} else Absent()
        if found and found.sha256 == manifest.sha256 == sha256:
            return Present(record_id, self._url(record_id))
        return Partial(record_id)

    @property
    def _root(self) -> Path:
        if self._path is None:
            raise Misconfigured("NX_LOCAL_ARCHIVE_PATH is not set")
        return self._path

    def _url(self, record_id: str) -> str:
        return (self._root.absolute() / record_id).as_uri()

    def _result(self, context: ExportContext, place: Place, manifest: Manifest, action: Action) -> ExportResult:
        self._was_there = True
        record_id = place.relative(place.record)
        return ExportResult(
            success=True,
            destination_name=self.name,
            record_id=record_id,
            record_url=self._url(record_id),
            metadata={"manifest": place.relative(place.manifest), "version": len(manifest.versions) + 1},
            action=action,
            stored_sha256=manifest.sha256,
        )


def _same(context: ExportContext) -> Action:
    return "linked" if context.purpose == "link" else "unchanged"


def _content(context: ExportContext) -> tuple[bytes, str]:
    path = context.xml_file_path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Transient(f"the record {path} cannot be read: {error.strerror}", code="record_unreadable") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if context.record_sha256 not in {"", sha256}:
        raise Permanent(f"{path} no longer has the bytes that were checked", code="record_changed")
    return content, sha256


def _links(context: ExportContext, own_name: str) -> dict[str, str]:
    results = context.previous_results.items()
    return {
        name: result.record_url
        for name, result in results
        if result.success and result.record_url and name != own_name
    }


def _read_manifest(folder: Folder, place: Place, session: str) -> Manifest | None:
    content = folder.read(place.manifest)
    if content is None:
        return None
    shown = place.relative(place.manifest)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError:
        message = f"{shown} is damaged: it is no manifest of format 1; mend it, or move it away with its record"
        raise Permanent(message, code="conflict") from None
    if manifest.session_identifier != session:
        raise Permanent(f"{shown} belongs to session {manifest.session_identifier!r}", code="conflict")
    return manifest


def _refuse_what_is_not_ours(
    place: Place, found: Found | None, manifest: Manifest | None, ours: Collection[str]
) -> None:
    """Raise ``Permanent`` where a file would be replaced that we did not write."""
    if found is None or found.sha256 in ours:
        return
    shown = place.relative(place.record)
    if manifest is None:
        raise Permanent(f"{shown} is there already, with other content and no manifest", code="conflict")
    if found.sha256 != manifest.sha256:
        raise Permanent(f"{shown} was changed after it had been archived", code="changed_at_destination")


def _put_aside(
    folder: Folder, place: Place, found: Found | None, before: Manifest | None, sha256: str
) -> tuple[Version, ...]:
    """Give the current file a version name if it is to be replaced; return all versions there are then.

    When a crash came between the new record and its manifest, the manifest's own bytes lie under the next version
    name already, and what is current now is not in the manifest yet.
    """
    versions = before.versions if before else ()
    if before and found and found.sha256 != before.sha256:
        name, kept = _version_name(folder, place, len(versions) + 1, before.sha256)
        if kept:
            versions += (_version(name, kept),)
    if found and found.sha256 != sha256:
        name, kept = _version_name(folder, place, len(versions) + 1, found.sha256)
        if kept is None:
            folder.keep(place.record, name)
        versions += (_version(name, kept or found),)
    return versions


def _version_name(folder: Folder, place: Place, number: int, sha256: str) -> tuple[str, Found | None]:
    """Return the first version name, from ``number`` on, that is free or has these bytes already."""
    for tried in itertools.count(number):
        name = f"{place.stem}.v{tried}.xml"
        kept = folder.look(name)
        if kept is None or kept.sha256 == sha256:
            return name, kept
    raise AssertionError  # count never ends


def _version(name: str, found: Found) -> Version:
    return Version(file=name, sha256=found.sha256, size=found.size, archived_at=found.modified)


@contextmanager
def _next_actions(root: Path) -> Iterator[None]:
    """Turn what a file system answers into what happens next."""
    try:
        yield
    except NotPlainError as error:
        raise Permanent(f"in the archive {root}: {error}", code="conflict") from None
    except OSError as error:
        waits = isinstance(error, RootMissingError) or error.errno in _FULL | _FORBIDDEN
        raise (Misconfigured if waits else Transient)(_advice(root, error)) from None


def _advice(root: Path, error: OSError) -> str:
    """Say what is wrong with the archive and what to do."""
    if error.errno in _FULL:
        return f"disk full at {root} ({error.strerror}); make room there"
    if error.errno in _FORBIDDEN:
        return f"cannot write at {root} ({error.strerror}); the service's user needs to write and to make hard links"
    if isinstance(error, RootMissingError):
        return f"the folder {root} is gone; mount it again, or make it"
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return f"{root} is no folder, or below a file; name another one"
    return f"trouble at {root}: {error.strerror}"
