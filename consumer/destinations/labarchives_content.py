"""What is read from disk for LabArchives: the record, its previews, and whose uid belongs to whom."""

import hashlib
import json
from pathlib import Path

from consumer.destinations.contract import ExportContext
from consumer.destinations.labarchives_rules import (
    File,
    Part,
    file_mark,
    preview_captions,
    preview_file,
    read_users,
    record_note,
    xml_file,
)
from consumer.destinations.summary import summarize
from consumer.errors import Misconfigured, Permanent, Transient

PREVIEW_BYTES = 4 * 1024**2


def load_users(path: Path) -> dict[str, str]:
    """Return the uids of people by username."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        return read_users(text, is_json=path.suffix.lower() == ".json")
    except OSError as error:
        raise Misconfigured(f"NX_LABARCHIVES_USERS_FILE: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        why = "is no JSON" if isinstance(error, json.JSONDecodeError) else str(error)
        raise Misconfigured(f"NX_LABARCHIVES_USERS_FILE: {path} {why}") from None


def parts_of(context: ExportContext, key: str, limit: int | None, max_previews: int) -> tuple[list[Part], int]:
    """Return what the page of a record is to have, without links, and how many previews are left out."""
    path = context.xml_file_path
    content = _content(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if context.record_sha256 not in {"", sha256}:
        raise Permanent(f"{path} no longer has the bytes that were checked", code="record_changed")
    if limit is not None and len(content) > limit:
        message = f"the record has {len(content)} bytes, LabArchives takes {limit} in one file"
        raise Permanent(message, code="too_large")
    parts: list[Part] = [record_note(summarize(context), context.links, key, path.name, sha256)]
    parts.append(xml_file(path, sha256, len(content)))
    previews: dict[str, File] = {}
    captions = preview_captions(context.activities)
    for preview, shown in list(captions.items())[:max_previews]:
        try:
            image = preview.read_bytes()
        except OSError:
            continue
        if len(image) <= min(PREVIEW_BYTES, limit or PREVIEW_BYTES):
            file = preview_file(preview, shown, image)
            previews.setdefault(file.mark, file)
    return [*parts, *previews.values()], len(captions) - len(previews)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Transient(f"{path} cannot be read: {error.strerror}", code="record_unreadable") from None


def read_again(file: File) -> bytes:
    """Read a file anew; it must be what its caption says."""
    content = _content(file.path)
    if file_mark(hashlib.sha256(content).hexdigest()) != file.mark:
        raise Transient(f"{file.path} was changed while it was exported", code="record_unreadable")
    return content
