"""What can be said about CDCS without asking it: titles, texts, what messages mean, what to pick from lists."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consumer.destinations.contract import ExportContext
from consumer.errors import Misconfigured, Permanent

TITLE_LENGTH = 200

_DIGEST_LENGTH = 16
_DECLARED = re.compile(r"""\ufeff?<\?xml[^>]*?\sencoding\s*=\s*["']([\w.:-]+)""", re.ASCII)
_WIDE = re.compile(r"utf-?(16|32)(-?[lb]e)?|(iso-10646-)?ucs-?[24]", re.IGNORECASE)
_INVALID = re.compile(
    r"^Element '[^']*'(, attribute '[^']*')?: |This element is not expected|is not a valid value"
    r"|No matching global declaration"
)
_MALFORMED = re.compile(r", line \d+, column \d+|\(<string>, line \d+\)")
_REFUSED = re.compile(
    r"entities are disabled|invalid input syntax for type json|CHECK constraint failed"
    r"|string is too long for tsvector|JSON parse error|Could not derive file name"
)
_LACKS_RIGHT = re.compile(
    r"(doesn't|does not|don't) have (enough|the) (right|permission)|do not have permission"
    r"|Unable to (write|access)|can not be unpublished"
)


@dataclass(frozen=True, slots=True)
class Template:
    """The schema version that records are uploaded with, and all versions, which older records may have."""

    current: str
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """A record as CDCS has it; ``template`` is the schema version that it was made with, and keeps."""

    id: str
    title: str
    template: str
    workspace: int | None
    sha256: str | None


def record_title(stem: str) -> str:
    """Return the title of a record: the file's name, unless CDCS could not keep it or find it again.

    CDCS takes 200 characters, trims them, names a file after them (so bytes count), and looks for no title with a
    ``$`` in it. What is replaced or cut is made up for by a digest of the whole name.
    """
    title = stem.strip()
    clean = "".join(c if c.isprintable() and c not in "$/\\" else "_" for c in title)
    data = clean.encode()
    if clean == title and len(data) <= TITLE_LENGTH and re.search(r"\w", title):
        return title
    digest = hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()[:_DIGEST_LENGTH]
    head = data[: TITLE_LENGTH - _DIGEST_LENGTH - 1].decode(errors="ignore").strip()
    return f"{head or 'record'}-{digest}"


def record_text(content: bytes) -> str:
    """Return a record's bytes as the text that CDCS keeps as exactly these bytes; the BOM stays.

    Raises ``Permanent`` for anything but UTF-8.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        message = f"CDCS takes UTF-8 text only, and byte {error.start} of the record is none"
        raise Permanent(message, code="record_encoding") from None
    declared = _DECLARED.match(text)
    if declared and _WIDE.fullmatch(declared[1]):
        message = f"CDCS takes UTF-8 text only, and the record says that it is {declared[1]}"
        raise Permanent(message, code="record_encoding")
    return text


def said(content: bytes) -> dict[str, str]:
    """Return the texts of an error answer by their names, ``message`` or ``detail``; nothing if it is no JSON."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    if not isinstance(value, dict):
        return {}
    return {name: text if isinstance(text, str) else json.dumps(text) for name, text in value.items()}


def refusal_code(message: str) -> str | None:
    """Return the code of a 500 whose message is about the record: nothing was stored, and never will be."""
    for pattern, code in ((_INVALID, "record_invalid"), (_MALFORMED, "record_malformed"), (_REFUSED, "rejected")):
        if pattern.search(message):
            return code
    return None


def lacks_right(message: str) -> bool:
    """Tell whether a message is about rights; creating without them is answered with 500."""
    return _LACKS_RIGHT.search(message) is not None


def choose_template(templates: Sequence[Mapping[str, Any]], title: str) -> Template:
    """Pick the schema with the title; the list has others too, and disabled ones.

    Raises ``Misconfigured`` when it is not there.
    """
    usable = {str(t.get("title")): t for t in templates if not t.get("is_disabled") and t.get("current")}
    if title not in usable:
        titles = ", ".join(repr(known) for known in sorted(usable)) or "none at all"
        raise Misconfigured(
            f"CDCS has no schema titled {title!r} in use; there are: {titles}. "
            "Set NX_CDCS_TEMPLATE_TITLE, or upload the schema"
        )
    current = str(usable[title]["current"])
    versions = [str(version) for version in usable[title].get("versions") or ()]
    return Template(current, tuple(dict.fromkeys([*versions, current])))


def find_user(users: Iterable[Mapping[str, Any]], username: str, email: str | None) -> int | None:
    """Return the id of the user with this name, else with this e-mail address."""
    by_email = None
    for user in users:
        if user.get("username") == username:
            return int(user["id"])
        if email and str(user.get("email")).casefold() == email.casefold() and by_email is None:
            by_email = int(user["id"])
    return by_email


def stored_record(answer: Any) -> Record | None:
    """Return the record that an answer tells of, if it is one; newer ones may name its content ``content``."""
    number = answer.get("id") if isinstance(answer, dict) else None
    if not isinstance(number, int | str) or number == "":
        return None
    content, workspace = answer.get("xml_content", answer.get("content")), answer.get("workspace")
    return Record(
        str(number),
        str(answer.get("title")),
        str(answer.get("template")),
        workspace if isinstance(workspace, int) else None,
        hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest() if isinstance(content, str) else None,
    )


def known_id(context: ExportContext) -> str | None:
    """Return the id of the record that we made before, if we did."""
    if context.last_export is not None:
        return context.last_export.record_id
    remembered = context.remembered.get("record_id")
    return None if remembered is None else str(remembered)


def our_hashes(context: ExportContext) -> frozenset[str]:
    """Return the digests that a record of ours may have as long as nobody has changed it."""
    last = context.last_export
    if last is None:
        return context.sent_hashes
    return frozenset(sha256 for sha256 in (last.stored_sha256, last.sent_sha256) if sha256)
