"""What a notebook page says of a record: one summary for all notebooks, read from the event and the record.

HTML is built as a tree, never pasted together, so that no name can break out of its place. Only tags that eLabFTW's
purifier keeps are used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lxml import etree, html
from lxml.html import builder as tag

from consumer.destinations.contract import ExportContext

HEADING = "NexusLIMS Microscopy Session"
#: How a link to a copy elsewhere is called; another destination is named as it is.
LINK_TEXTS = {"cdcs": "View in CDCS"}


@dataclass(frozen=True, slots=True)
class Summary:
    """The facts of one session; what is not known is empty or None. ``files`` are names below the data root."""

    session: str
    instrument: str
    user: str | None
    start: str
    end: str
    title: str | None
    motivation: str | None
    samples: tuple[str, ...]
    projects: tuple[str, ...]
    files: tuple[str, ...]
    previews: tuple[Path, ...]


def summarize(context: ExportContext) -> Summary:
    """Collect what a page tells; the reservation comes before the record. Times are ISO 8601 with their zone."""
    record = _record(context.xml_file_path)
    reserved = context.reservation_event
    return Summary(
        session=context.session_identifier,
        instrument=context.instrument_pid,
        user=context.user,
        start=context.dt_from.isoformat(),
        end=context.dt_to.isoformat(),
        title=_text(getattr(reserved, "title", None)) or _first(record, "./*[local-name()='title']"),
        motivation=_text(getattr(reserved, "purpose", None)) or _first(record, "./*/*[local-name()='motivation']"),
        samples=_named(getattr(reserved, "samples", ())) or _all(record, "sample"),
        projects=_named(getattr(reserved, "projects", ())) or _all(record, "project"),
        files=tuple(dict.fromkeys(name for act in context.activities for name in _files(act))),
        previews=tuple(dict.fromkeys(path for act in context.activities for path in act.previews if path)),
    )


def page(summary: Summary, links: Mapping[str, str], *, extra: Sequence[Any] = ()) -> str:
    """Return the page as HTML text: details, links, ``extra`` elements, files."""
    details = [
        ("Session ID", summary.session),
        ("Instrument", summary.instrument),
        ("User", summary.user),
        ("Start", summary.start),
        ("End", summary.end),
        ("Title", summary.title),
        ("Motivation", summary.motivation),
        ("Samples", ", ".join(summary.samples)),
        ("Projects", ", ".join(summary.projects)),
    ]
    parts = [
        tag.H1(HEADING),
        tag.H2("Session Details"),
        tag.UL(*(tag.LI(tag.STRONG(f"{label}: "), _clean(value)) for label, value in details if value)),
        *related(links),
        *extra,
    ]
    if summary.files:
        parts += [tag.H2("Files"), tag.UL(*(tag.LI(_clean(name)) for name in summary.files))]
    return "".join(as_text(part) for part in parts)


def related(links: Mapping[str, str]) -> list[Any]:
    """Return the section of links to the copies elsewhere; nothing without links."""
    if not links:
        return []
    items = (tag.P(tag.A(LINK_TEXTS.get(name, f"View in {name}"), href=_clean(url))) for name, url in links.items())
    return [tag.H2("Related Records"), *items]


def as_text(element: Any) -> str:
    """Return one element as HTML."""
    return str(html.tostring(element, encoding="unicode"))


def _record(path: Path) -> Any:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=True)
    try:
        return etree.parse(path, parser).getroot()
    except (OSError, etree.XMLSyntaxError):
        return None


def _first(record: Any, query: str) -> str | None:
    found = record.xpath(query) if record is not None else []
    return _text(found[0].text) if found else None


def _all(record: Any, name: str) -> tuple[str, ...]:
    query = f"./*[local-name()='{name}']/*[local-name()='name']"
    found = [_text(element.text) for element in record.xpath(query)] if record is not None else []
    return tuple(dict.fromkeys(text for text in found if text))


def _named(values: Sequence[Any]) -> tuple[str, ...]:
    """Return the names of samples or projects, which builders give as texts or as objects."""
    names = (_text(value.get("name") or value.get("id") if isinstance(value, Mapping) else value) for value in values)
    return tuple(dict.fromkeys(name for name in names if name))


def _files(activity: Any) -> Sequence[str]:
    found: Sequence[str] = getattr(activity, "relative_files", None) or activity.files
    return found


def _text(value: Any) -> str | None:
    return " ".join(str(value).split()) or None if value is not None else None


def _clean(text: str) -> str:
    """Leave out what no XML tree takes: control characters."""
    return "".join(char if char.isprintable() or char in "\t\n" else " " for char in text)
