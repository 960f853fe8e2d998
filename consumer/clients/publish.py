"""Makes ``record.built`` events of record files; publishing the same build twice is the same event."""

import hashlib
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from consumer.errors import NexusExportError, RecordRefused
from consumer.events import (
    INLINE_LIMIT_BYTES,
    RecordBuilt,
    RecordByPath,
    RecordInline,
    built_body,
)
from consumer.pipeline.snapshot import NAMESPACE, parse


class UnusableFileError(NexusExportError):
    """A file that cannot be published; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Built:
    """An event ready to be published."""

    path: Path
    session: str
    event_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """What holds for all files of one call; None: the consumer's own choice."""

    records_root: Path | None
    source: str
    session: str | None = None
    destinations: tuple[str, ...] | None = None
    strategy: str | None = None


def build_event(path: Path, options: PublishOptions) -> Built:
    """Read a record file and describe it as ``record.built``.

    A file below the records root goes by its path, any other one inside the event if it is at most 1 MiB.
    The time of the build is the file's modification time. Raises ``UnusableFileError``.
    """
    try:
        content = path.read_bytes()
        status = path.stat()
    except OSError as error:
        message = f"{path}: {error.strerror}"
        raise UnusableFileError(message) from None
    sha256 = hashlib.sha256(content).hexdigest()
    session = options.session or session_of(path, content)
    data = RecordBuilt(
        session_identifier=session,
        record=_record(path, content, sha256, options.records_root),
        destinations=options.destinations,
        strategy=options.strategy,
    )
    event_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{options.source}\n{session}\n{sha256}\n{status.st_mtime_ns}"))
    built_at = datetime.fromtimestamp(status.st_mtime, UTC)
    return Built(path, session, event_id, built_body(data, event_id=event_id, source=options.source, time=built_at))


def session_of(path: Path, content: bytes) -> str:
    """Return the session that a record names (``Experiment/id``), else the stem of its file."""
    try:
        root = parse(path.name, content).getroot()
    except RecordRefused:
        return path.stem
    found = root.findtext(f"{{{NAMESPACE}}}id")
    return found.strip()[:255] if found and found.strip() else path.stem


def _record(path: Path, content: bytes, sha256: str, root: Path | None) -> RecordByPath | RecordInline:
    if root is not None:
        absolute, base = path.resolve(), root.resolve()
        if absolute.is_relative_to(base):
            return RecordByPath(path=str(absolute.relative_to(base)), sha256=sha256, size=len(content))
    if len(content) > INLINE_LIMIT_BYTES:
        where = f"NX_RECORDS_PATH ({root})" if root else "a folder that NX_RECORDS_PATH names"
        message = f"{path} has {len(content)} bytes: over 1 MiB a record must lie below {where}"
        raise UnusableFileError(message)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        message = f"{path} is not UTF-8: it can only go by path, from below NX_RECORDS_PATH"
        raise UnusableFileError(message) from None
    return RecordInline(name=path.name, content=text, sha256=sha256, size=len(content))
