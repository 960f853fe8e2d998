"""What an answer of eLabFTW says: entries, their metadata, attachments, errors."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from lxml import etree, html

RECORD_KEY = "Record key"
RECORD_SHA256 = "Record SHA-256"
NOTES = "nexus_export"

#: Values of ``state`` and ``content_type``.
NORMAL, ARCHIVED, DELETED = 1, 2, 3
HTML, MARKDOWN = 1, 2


def metadata_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of an answer, which comes as JSON text, and from an old server as JSON text in JSON."""
    value = entry.get("metadata")
    for _ in range(2):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return {}
    return value if isinstance(value, dict) else {}


def field_value(entry: Mapping[str, Any], name: str) -> str | None:
    """Return the value of an extra field."""
    found = as_object(metadata_of(entry).get("extra_fields")).get(name)
    value = as_object(found).get("value")
    return None if value is None else str(value)


def notes_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return our notes in an entry."""
    return as_object(metadata_of(entry).get(NOTES))


def state_of(entry: Mapping[str, Any]) -> int:
    """Return whether an entry is normal, archived or deleted."""
    return as_number(entry.get("state"), NORMAL)


def is_ours(entry: Mapping[str, Any], key: str, hashes: Collection[str]) -> bool:
    """Tell whether an entry carries our key and names bytes that we sent."""
    return has_key(entry, key) and field_value(entry, RECORD_SHA256) in hashes


def has_key(entry: Mapping[str, Any], key: str) -> bool:
    """Tell whether an entry carries our key and was not copied from another one by a person."""
    return field_value(entry, RECORD_KEY) == key and not entry.get("created_from_id")


def stored_digest(entry: Mapping[str, Any]) -> str:
    """Return the digest of title and body exactly as the server stores them."""
    return digest([entry.get("title"), entry.get("body")])


def page_digest(title: Any, body: Any) -> str:
    """Return the digest of what a page says: its title, words and links, which no purifier changes."""
    said_words, links = words(str(body or ""))
    return digest([one_line(str(title or "")), said_words, links])


def words(body: str) -> tuple[str, list[str]]:
    """Return the words of a page as one line, and its links."""
    if not body.strip():
        return "", []
    try:
        tree = html.fragment_fromstring(body, create_parent="div")
    except (etree.ParserError, ValueError):
        return body, []
    return one_line(" ".join(tree.itertext())), [str(url) for url in tree.xpath(".//a/@href")]


def uploads_of(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the attachments that are neither archived nor deleted, oldest first."""
    uploads = entry.get("uploads")
    found = [item for item in uploads if isinstance(item, dict)] if isinstance(uploads, list) else []
    live = [item for item in found if as_number(item.get("state"), NORMAL) == NORMAL]
    return sorted(live, key=lambda item: as_number(item.get("id"), 0))


def location_id(location: str, body: bytes) -> str | None:
    """Return the id of what was created: the last part of ``Location``, else the id in the body."""
    last = location.partition("?")[0].rstrip("/").rpartition("/")[2]
    if last.isascii() and last.isdigit():
        return last
    try:
        value = json.loads(body)
    except ValueError:
        return None
    found = str(as_object(value).get("id", ""))
    return found if found.isascii() and found.isdigit() else None


def said(content: bytes) -> tuple[str, int | None]:
    """Return what an error answer says, its two texts joined, and the code that it holds."""
    try:
        value = as_object(json.loads(content))
    except ValueError:
        return "", None
    texts = [str(value[name]).strip() for name in ("message", "description") if value.get(name)]
    code = value.get("code")
    return ": ".join(dict.fromkeys(texts)), code if isinstance(code, int) else None


def as_object(value: Any) -> dict[str, Any]:
    """Return a JSON object; PHP writes an empty one as a list."""
    return value if isinstance(value, dict) else {}


def as_number(value: Any, default: int) -> int:
    """Return a whole number; what is none counts as the default."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return default


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()


def one_line(text: str) -> str:
    """Return a text without line ends, control characters and runs of blanks."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
