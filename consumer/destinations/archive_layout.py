"""Where a record lies in the local archive, and what its manifest says: rules without files."""

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict

from consumer.destinations.contract import ExportContext
from consumer.errors import Permanent

_INSTRUMENT_BYTES = 100
_STEM_BYTES = 200  # leaves room for ".v1.xml" and for the name of a temporary file
_RESERVED = frozenset('/\\:*?"<>|')  # what Linux or a Windows share refuses in a name
_DIGEST = re.compile(r"-[0-9a-f]{16}\Z")


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

    @classmethod
    def empty(cls, context: ExportContext, place: Place) -> "Manifest":
        """Return the manifest of a session before anything of it is archived; it is never written."""
        return cls(
            session_identifier=context.session_identifier,
            instrument_pid=context.instrument_pid,
            file=place.record,
            sha256="",
            size=0,
        )

    def encode(self) -> bytes:
        """Return the bytes of the manifest file."""
        fields = self.model_dump(mode="json")
        return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


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
