"""A folder as a destination: ``<root>/<instrument>/<year>/<month>/<stem>.xml`` and its manifest ``<stem>.json``.

The manifest says whose record it is, which bytes it has, what it was before and where else it lies. It is written
last: until then the old state holds, and a second export completes what a crash has interrupted.
"""

import errno
import hashlib
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consumer.destinations.archive_layout import Manifest, Place, Version, place_of
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

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class LocalArchive:
    """Keeps every record, with its earlier versions, in a folder."""

    name = "local_archive"
    priority = 10
    limits = Limits(concurrency=4)
    settle_seconds = 0
    timeout_seconds = 60
    disabled_because = "NX_LOCAL_ARCHIVE_PATH is not set"

    class Settings(BaseModel):
        """Settings of the archive; ``path`` is read from ``NX_LOCAL_ARCHIVE_PATH``."""

        model_config = ConfigDict(frozen=True)

        path: Path | None = Field(None, description="folder of the archive; without it there is none")

    def __init__(self, settings: Settings) -> None:
        self._path = settings.path.expanduser().absolute() if settings.path else None
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
            return False, "NX_LOCAL_ARCHIVE_PATH is not set; name the folder that records are to be kept in"
        try:
            if not self._was_there:
                self._path.mkdir(parents=True, exist_ok=True)
            with open_folder(self._path) as folder:
                name = f".nexus-export-check-{secrets.token_hex(8)}"
                folder.create(name, b"nexus-export can write here\n")
                folder.remove(name)
        except (FileExistsError, NotADirectoryError):
            return False, f"NX_LOCAL_ARCHIVE_PATH: {self._path} is a file, or lies below one; name a folder"
        except OSError as error:
            return False, f"NX_LOCAL_ARCHIVE_PATH: {_advice(self._path, error)}"
        self._was_there = True
        return True, None

    def export(self, context: ExportContext) -> ExportResult:
        """Bring the archive to the state of the context; done twice it changes nothing.

        Raises ``Permanent`` where a file is in the way that is not ours, ``Misconfigured`` where a person has to
        make room or give rights, else ``Transient``.
        """
        content, sha256 = _content(context)
        place = place_of(context)
        with _next_actions(self._root), open_folder(self._root, place.folders, make=True) as folder:
            before = _read_manifest(folder, place, context.session_identifier)
            found = folder.look(place.record)
            _refuse_what_is_not_ours(place, found, before, {sha256, *context.sent_hashes})
            folder.prepare(place.stem, ".json")
            manifest = before or Manifest.empty(context, place)
            links = {**manifest.links, **self._links(context)}
            whole = found is not None and found.sha256 == manifest.sha256 == sha256
            if whole and links == manifest.links:
                folder.sync()  # whoever wrote it may have been killed before it was synced
            else:
                changes: dict[str, object] = {"links": links}
                if not whole:
                    changes |= {"instrument_pid": context.instrument_pid, "sha256": sha256, "size": len(content)}
                    changes["versions"] = _put_aside(folder, place, found, manifest, sha256)
                    _write_record(folder, place, found, content, sha256)
                manifest = manifest.model_copy(update=changes)
                (folder.replace if before else folder.create)(place.manifest, manifest.encode())
        self._was_there = True
        if whole:
            return self._result(place, manifest, "linked" if context.purpose == "link" else "unchanged")
        return self._result(place, manifest, "updated" if before and found else "created")

    def verify(self, context: ExportContext) -> Answer:
        """Tell whether exactly this record is there, with its manifest. Raises ``Permanent`` on a conflict."""
        sha256 = context.record_sha256 or _content(context)[1]
        place = place_of(context)
        record_id = place.relative(place.record)
        try:
            with open_folder(self._root, place.folders) as folder:
                manifest = _read_manifest(folder, place, context.session_identifier)
                found = folder.look(place.record)
        except NotPlainError as error:
            raise Permanent(f"in the archive {self._root}: {error}", code="conflict") from None
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
        return (self._root / record_id).as_uri()

    def _links(self, context: ExportContext) -> dict[str, str]:
        results = {name: result for name, result in context.previous_results.items() if name != self.name}
        return {name: result.record_url for name, result in results.items() if result.success and result.record_url}

    def _result(self, place: Place, manifest: Manifest, action: Action) -> ExportResult:
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


def _write_record(folder: Folder, place: Place, found: Found | None, content: bytes, sha256: str) -> None:
    if found is None:
        folder.create(place.record, content)
    elif found.sha256 != sha256:
        folder.replace(place.record, content)
    else:  # put there by a person, or by a process that was killed before it wrote the manifest
        folder.sync(place.record)


def _put_aside(
    folder: Folder, place: Place, found: Found | None, manifest: Manifest, sha256: str
) -> tuple[Version, ...]:
    """Give the current file a version name if it is to be replaced; return all versions there are then.

    When a crash came between the new record and its manifest, the manifest's own bytes lie under the next version
    name already, and what is current now is not in the manifest yet.
    """
    versions = manifest.versions
    if manifest.sha256 and found and found.sha256 != manifest.sha256:
        name, kept = _version_name(folder, place, len(versions) + 1, manifest.sha256)
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
    while True:
        name = f"{place.stem}.v{number}.xml"
        kept = folder.look(name)
        if kept is None or kept.sha256 == sha256:
            return name, kept
        number += 1


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
        return f"there is no folder {root}; mount it again, or make it"
    return f"trouble at {root}: {error.strerror}"
