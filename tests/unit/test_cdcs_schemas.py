"""Schemas of CDCS compiled here: put together from their parts, and from nothing else."""

import asyncio
from pathlib import Path

import pytest
from lxml import etree
from structlog.testing import capture_logs

from consumer.destinations.cdcs_schema import (
    KEPT,
    MOST_PARTS,
    SchemaError,
    Schemas,
    compile_schema,
    part_number,
    references,
)
from consumer.errors import Transient

PART = "http://cdcs.example.org/rest/template/5/download/"
XSD = '<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema">{}</xs:schema>'
NUMBER = XSD.format('<xs:simpleType name="Number"><xs:restriction base="xs:int"/></xs:simpleType>').encode()
WHOLE = XSD.format('<xs:element name="a" type="xs:int"/>').encode()


def including(location: str) -> bytes:
    return XSD.format(f'<xs:include schemaLocation="{location}"/><xs:element name="a" type="Number"/>').encode()


def document(text: str) -> object:
    return etree.fromstring(text).getroottree()


@pytest.mark.parametrize(
    ("location", "number"),
    [
        (PART, "5"),
        ("https://cdcs.example.org/below/rest/template/12/download", "12"),
        ("/rest/template/5/download/", "5"),
        ("http://www.w3.org/2001/xml.xsd", None),
        ("http://evil.example/?rest/template/5/download/", None),
        ("file:///rest/template/5/download/", None),
        ("rest/template/../5/download/", None),
        ("other.xsd", None),
    ],
)
def test_only_addresses_of_templates_are_parts(location: str, number: str | None) -> None:
    assert part_number(location) == number


def test_the_first_problem_is_told_with_its_line() -> None:
    schema = compile_schema(WHOLE, {})
    assert schema.problem(document("<a>1</a>")) is None
    assert (schema.problem(document("\n\n<a>x</a>".strip())) or "").startswith("line 1: Element 'a': 'x' is not")
    two = compile_schema(XSD.format('<xs:element name="a"/>').encode(), {})
    assert (two.problem(document("<b/>")) or "").startswith("line 1: Element 'b': No matching global")


def test_a_schema_of_parts_is_compiled_from_them() -> None:
    schema = compile_schema(including(PART), {PART: NUMBER})
    assert schema.problem(document("<a>1</a>")) is None
    assert schema.problem(document("<a>x</a>")) is not None
    assert references(including(PART)) == {PART}


def test_nothing_else_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "part.xsd"
    file.write_bytes(NUMBER)
    for location in (str(file), file.as_uri(), "http://127.0.0.1:9/part.xsd"):
        with pytest.raises(SchemaError, match="Failed to parse the XML resource"):
            compile_schema(including(location), {})


@pytest.mark.parametrize("content", [b"", b"{}", b"<a/>", XSD.format('<xs:element type="Nowhere"/>').encode()])
def test_what_is_no_schema_is_told(content: bytes) -> None:
    with pytest.raises(SchemaError):
        compile_schema(content, {})


class Server:
    """Hands out schemas by number, and counts how often."""

    def __init__(self, **contents: bytes | None) -> None:
        self.contents = contents
        self.asked: list[str] = []

    async def download(self, version: str) -> bytes | None:
        """Return a version, or fail when it is down."""
        self.asked.append(version)
        await asyncio.sleep(0)
        content = self.contents[f"v{version}"]
        if content == b"down":
            raise Transient
        return content


async def test_a_version_is_downloaded_once_for_all_that_wait() -> None:
    server = Server(v1=including(PART), v5=NUMBER)
    schemas = Schemas(server.download, "cdcs")
    problems = await asyncio.gather(*(schemas.problem("1", document(f"<a>{text}</a>")) for text in "1x2y"))
    assert [problem is None for problem in problems] == [True, False, True, False]
    assert server.asked == ["1", "5"]


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({"v1": None}, "does not hand it out"),
        ({"v1": b"{}"}, "no XML"),
        ({"v1": including("other.xsd")}, "its part other.xsd is no template"),
        ({"v1": including(PART), "v5": None}, "its part http://cdcs.example.org"),
        ({"v1": XSD.format('<xs:element name="a" type="Number"/>').encode()}, "Number"),
    ],
)
async def test_what_cannot_be_compiled_is_left_to_cdcs_with_one_warning(
    contents: dict[str, bytes | None], reason: str
) -> None:
    schemas = Schemas(Server(**contents).download, "cdcs")
    with capture_logs() as logs:
        for _ in range(3):
            assert await schemas.problem("1", document("<b/>")) is None
    assert [(entry["event"], entry["template"]) for entry in logs] == [("schema_not_compiled", "1")]
    assert reason in logs[0]["reason"]


async def test_a_schema_of_endless_parts_is_left_to_cdcs() -> None:
    async def download(version: str) -> bytes:
        return including(f"/rest/template/{int(version) + 1}/download/")

    with capture_logs() as logs:
        assert await Schemas(download, "cdcs").problem("1", document("<b/>")) is None
    assert logs[0]["reason"] == f"it has more than {MOST_PARTS} parts"


async def test_a_download_that_fails_is_tried_again() -> None:
    server = Server(v1=b"down")
    schemas = Schemas(server.download, "cdcs")
    with pytest.raises(Transient):
        await schemas.problem("1", document("<a>1</a>"))
    server.contents["v1"] = WHOLE
    assert await schemas.problem("1", document("<a>1</a>")) is None


async def test_old_versions_make_room() -> None:
    server = Server(**{f"v{number}": WHOLE for number in range(KEPT + 1)})
    schemas = Schemas(server.download, "cdcs")
    for number in [*range(KEPT + 1), KEPT, 0]:
        assert await schemas.problem(str(number), document("<a>1</a>")) is None
    assert server.asked == [*map(str, range(KEPT + 1)), "0"]
