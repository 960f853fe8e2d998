"""The schemas of a CDCS, kept here to validate a record before it is sent.

CDCS answers 500 to an invalid record and to a lost database alike. What was found valid here and is answered with
500 all the same is the server's trouble, and may be tried again.
"""

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from lxml import etree

from consumer.destinations.http import one_line
from consumer.errors import Permanent
from consumer.telemetry import get_logger

#: Returns the XSD of a template version, or nothing when CDCS has none to give.
Download = Callable[[str], Awaitable[bytes | None]]

#: Schema versions kept; each new one pushes the oldest out.
KEPT = 8
#: A schema of more parts is not compiled here.
MOST_PARTS = 50

_XSD = "{http://www.w3.org/2001/XMLSchema}"
_REFERENCES = (f"{_XSD}include", f"{_XSD}import", f"{_XSD}redefine")
# CDCS itself writes such addresses into a schema whose parts it has; their host may be its name for itself
_PART = re.compile(r"(?:https?://[^/?#]+)?(?:/[^?#]*)?/?rest/template/(\w+)/download/?", re.ASCII)

_log = get_logger()


class SchemaError(Exception):
    """A schema that cannot be compiled here; the message says why."""


class Schema:
    """One compiled schema; safe to use from several threads."""

    def __init__(self, compiled: etree.XMLSchema) -> None:
        self._compiled: Any = compiled
        self._lock = threading.Lock()

    def problem(self, tree: Any) -> str | None:
        """Return the first thing that is wrong with a document, with its line."""
        with self._lock:  # the log is the schema's own
            if self._compiled.validate(tree):
                return None
            errors = list(self._compiled.error_log)
            first = errors[0]
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            return f"line {first.line}: {one_line(first.message)}{more}"


class Schemas:
    """Compiled schemas by template version, each downloaded once."""

    def __init__(self, download: Download, destination: str) -> None:
        self._download = download
        self._destination = destination
        self._lock = asyncio.Lock()
        self._kept: dict[str, Schema | None] = {}

    async def problem(self, version: str, tree: Any) -> str | None:
        """Return what breaks a schema version in a document; nothing if it is valid, or if only CDCS can tell.

        Raises what the download raises.
        """
        async with self._lock:
            if version not in self._kept:
                self._keep(version, await self._load(version))
            schema = self._kept[version]
        return None if schema is None else await asyncio.to_thread(schema.problem, tree)

    def _keep(self, version: str, schema: Schema | None) -> None:
        while len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[version] = schema

    async def _load(self, version: str) -> Schema | None:
        try:
            content, parts = await self._collect(version)
            return await asyncio.to_thread(compile_schema, content, parts)
        except SchemaError as error:
            _log.warning(
                "schema_not_compiled",
                destination=self._destination,
                template=version,
                reason=str(error),
                effect="records are not validated before they are sent; CDCS decides",
            )
            return None

    async def _collect(self, version: str) -> tuple[bytes, dict[str, bytes]]:
        """Download a schema and all that it is made of; the parts are named as the schema names them."""
        content = await self._download(version)
        if content is None:
            raise SchemaError("CDCS does not hand it out")
        parts: dict[str, bytes] = {}
        unread = references(content)
        while unread:
            location = unread.pop()
            if location in parts:
                continue
            number = part_number(location)
            part = None if number is None else await self._download(number)
            if part is None:
                raise SchemaError(f"its part {one_line(location)} is no template of this CDCS")
            parts[location] = part
            if len(parts) > MOST_PARTS:
                raise SchemaError(f"it has more than {MOST_PARTS} parts")
            unread |= references(part)
        return content, parts


def part_number(location: str) -> str | None:
    """Return the template version that an address in a schema means, if it is one of a CDCS.

    The address itself is never asked: that could be any.
    """
    found = _PART.fullmatch(location)
    return found[1] if found else None


def references(content: bytes) -> set[str]:
    """Return the addresses of the parts that a schema names. Raises ``SchemaError`` when it is no XML."""
    root = _parse(content, _parser({})).getroot()
    found = (element.get("schemaLocation") for element in root.iterchildren(*_REFERENCES))
    return {location for location in found if location}


def compile_schema(content: bytes, parts: Mapping[str, bytes]) -> Schema:
    """Compile a schema from these bytes alone; nothing is read from disk or network.

    Raises ``SchemaError`` for what is no schema, or names parts that are not given.
    """
    tree = _parse(content, _parser(parts))
    try:
        return Schema(etree.XMLSchema(tree))
    except etree.LxmlError as error:
        raise SchemaError(one_line(str(error))) from None


class _Parts(etree.Resolver):
    """Gives out the parts of a schema; what is not among them is refused, else lxml would open it itself."""

    def __init__(self, parts: Mapping[str, bytes]) -> None:
        self._parts = parts

    def resolve(self, system_url: str, public_id: str, context: Any = None) -> Any:  # noqa: ARG002 - as lxml calls it
        if system_url not in self._parts:
            raise SchemaError(f"{system_url} is not part of it")
        return self.resolve_string(self._parts[system_url], context, base_url=system_url)


def _parser(parts: Mapping[str, bytes]) -> etree.XMLParser:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False)
    parser.resolvers.add(_Parts(parts))
    return parser


def _parse(content: bytes, parser: etree.XMLParser) -> Any:
    try:
        return etree.fromstring(content, parser).getroottree()
    except etree.LxmlError as error:
        raise SchemaError(f"it is no XML: {one_line(str(error))}") from None


def invalid(problem: str, whose: str) -> Permanent:
    """Return the error for a record that breaks a schema; ``whose`` names the schema."""
    return Permanent(f"the record breaks {whose}: {problem}", code="record_invalid")
