"""The record is read once, checked, and kept by its sha256; everything later reads the copy."""

import ctypes
import hashlib
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lxml import etree

from consumer.errors import ConfigurationError, RecordNotThereYet, RecordRefused, RecordsRootMissing
from consumer.events import INLINE_LIMIT_BYTES, RecordBuilt, RecordByPath, RecordInline, read_moment
from consumer.pipeline.files import read_below, safe_parts

NAMESPACE = "https://data.nist.gov/od/dm/nexus/experiment/v1.0"
ROOT = f"{{{NAMESPACE}}}Experiment"
_START, _END, _USER, _INSTRUMENT = (
    f"{{{NAMESPACE}}}{name}" for name in ("reservationStart", "reservationEnd", "experimenter", "instrument")
)

_LIBC = ctypes.CDLL(None, use_errno=True)  # Python has sync() and fsync(), but not syncfs()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A record that was read and checked; ``facts`` are what it says of itself (all optional)."""

    sha256: str
    name: str
    content: bytes
    facts: dict[str, Any]


class Spool:
    """The service's own copies: ``<root>/<first two of the sha256>/<sha256>/<file name>``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, sha256: str, name: str) -> Path:
        """Return where a copy lies (or would lie)."""
        return self.root / sha256[:2] / sha256 / name

    def keep(self, snapshots: Sequence[Snapshot]) -> None:
        """Write copies so that they survive a power cut; they may be read once this returns.

        A whole batch is flushed by one call: a flush for each file and folder is what limits small records.
        Raises ``OSError`` (disk full, no rights).
        """
        if not snapshots:
            return
        for item in snapshots:
            self._write(item)
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync_file_system(descriptor)
        finally:
            os.close(descriptor)

    def _write(self, item: Snapshot) -> None:
        folder = f"{self.root}/{item.sha256[:2]}/{item.sha256}"
        path = f"{folder}/{item.name}"
        try:
            os.mkdir(folder)  # noqa: PTH102 - called for each record, where building Path objects shows
        except FileNotFoundError:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            # a copy from before may be cut or not flushed (a crash), so only its bytes count
            if Path(path).exists() and Path(path).read_bytes() == item.content:
                return
        temporary = f"{folder}/.{os.getpid()}-{threading.get_ident()}.part"
        try:
            with open(temporary, "wb", buffering=0) as file:  # noqa: PTH123 - as above
                _write_all(file.fileno(), item.content)
            os.rename(temporary, path)  # noqa: PTH104 - as above
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_file_system(descriptor: int) -> None:
    """Flush the file system that holds an open file (syncfs(2)). Raises ``OSError`` when the disk refuses."""
    if _LIBC.syncfs(descriptor) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class SnapshotReader:
    """Reads and checks records below one root."""

    def __init__(self, root: Path | None, limit: int, schema: Path | None = None) -> None:
        self._root = root
        self._limit = limit
        self._schema = load_schema(schema) if schema else None
        self._schema_lock = threading.Lock()

    def read(self, data: RecordBuilt) -> Snapshot:
        """Read the record that an event names and check all that can be checked without a server.

        Raises ``RecordRefused``, ``RecordNotThereYet`` or ``RecordsRootMissing`` with a code.
        """
        record = data.record
        if isinstance(record, RecordInline):
            name, content = _inline(record)
        else:
            name, content = self._file(record)
        sha256 = hashlib.sha256(content).hexdigest()
        if len(content) != record.size or sha256 != record.sha256:
            message = (
                f"{name} has {len(content)} bytes with sha256 {sha256[:12]}…, "
                f"announced were {record.size} with {record.sha256[:12]}…"
            )
            raise RecordRefused("record_changed", message)
        return Snapshot(sha256, name, content, self._check(name, content))

    def _file(self, record: RecordByPath) -> tuple[str, bytes]:
        if self._root is None:
            message = "events name files, but neither NX_RECORDS_PATH nor NX_DATA_PATH is set"
            raise RecordsRootMissing("records_root_missing", message)
        parts = safe_parts(record.path)
        try:
            return parts[-1], read_below(self._root, parts, self._limit)
        except RecordNotThereYet as missing:
            # NexusLIMS moves a record there once it counts it as exported
            # (a link or folder of that name refuses nothing: the record itself may still come)
            for moved in dict.fromkeys([("uploaded", parts[-1]), (*parts[:-1], "uploaded", parts[-1])]):
                with suppress(RecordNotThereYet, RecordRefused):
                    return parts[-1], read_below(self._root, moved, self._limit)
            raise missing from None

    def _check(self, name: str, content: bytes) -> dict[str, Any]:
        tree = parse(name, content)
        root = tree.getroot()
        if tree.docinfo.doctype:
            raise RecordRefused("record_doctype", f"{name} has a DOCTYPE; records must not")
        if root.tag != ROOT:
            raise RecordRefused("record_wrong_root", f"{name} starts with {root.tag}; expected {ROOT}")
        if self._schema is not None:
            with self._schema_lock:
                if not self._schema.validate(tree):
                    first = self._schema.error_log[0]
                    message = f"{name}, line {first.line}: {first.message}"
                    raise RecordRefused("record_invalid", message)
        return facts(root)


def _inline(record: RecordInline) -> tuple[str, bytes]:
    content = record.content.encode()
    if len(content) > INLINE_LIMIT_BYTES:
        message = f"{record.name} has {len(content)} bytes inside the event; the limit is {INLINE_LIMIT_BYTES}"
        raise RecordRefused("record_too_large", message)
    if "/" in record.name or record.name in {".", ".."} or len(record.name.encode()) > 255:  # noqa: PLR2004
        raise RecordRefused("path_refused", f"record name {record.name!r} is no plain file name")
    return record.name, content


def parse(name: str, content: bytes) -> Any:
    """Parse XML without entities, network or DTD. Raises ``RecordRefused``."""
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False, huge_tree=False
    )
    try:
        return etree.fromstring(content, parser).getroottree()
    except etree.XMLSyntaxError as error:
        raise RecordRefused("record_malformed", f"{name} is not well-formed XML: {error}") from None


def load_schema(path: Path) -> Any:
    """Load an XSD. Raises ``ConfigurationError`` when it cannot be used."""
    try:
        return etree.XMLSchema(etree.parse(path, etree.XMLParser(no_network=True)))
    except (OSError, etree.LxmlError) as error:
        message = f"NX_RECORD_SCHEMA: {path} cannot be used: {error}"
        raise ConfigurationError(message) from None


def facts(root: Any) -> dict[str, Any]:
    """Collect what a record says of itself: instrument, reservation times, experimenter."""
    summary = root.find(f"{{{NAMESPACE}}}summary")
    if summary is None:
        return {}
    children = {child.tag: child for child in summary}
    texts = {
        name: children[tag].text if tag in children else None
        for name, tag in (("start", _START), ("end", _END), ("user", _USER))
    }
    instrument = children.get(_INSTRUMENT)
    found = {
        "instrument_pid": instrument.get("pid") if instrument is not None else None,
        "dt_from": _moment(texts["start"]),
        "dt_to": _moment(texts["end"]),
        "user": texts["user"],
    }
    return {name: value for name, value in found.items() if value}


def _moment(text: str | None) -> str | None:
    """Normalise an xs:dateTime; one without a zone is taken as UTC, one that no event can hold is left out."""
    try:
        value = datetime.fromisoformat((text or "").strip())
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return read_moment(aware.isoformat()).isoformat()
    except ValueError:
        return None
