"""What a real CDCS refuses is found out before it is sent: schemas, their versions, and its own limits."""

import hashlib
import uuid

import httpx
import pytest
from structlog.testing import capture_logs

from consumer.destinations.contract import LastExport, Present
from consumer.errors import Permanent, Transient
from tests.integration import cdcs_kit
from tests.integration.cdcs_kit import (
    NEXUS,
    TEMPLATES,
    Between,
    MakeContext,
    MakeDestination,
    new_schema,
    new_version,
    rebuilt,
    stored,
    titled,
    upload,
)
from tools.records import make_record
from tools.servers.cdcs import CdcsServer

between, context_of, make, rest = cdcs_kit.between, cdcs_kit.context_of, cdcs_kit.make, cdcs_kit.rest

VALID = make_record(1, size=2_000).content
XSD = '<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema">{}</xs:schema>'
INVALID = VALID.replace(b"<summary>", b"<nonsense/><summary>", 1)


def with_id(text: str) -> bytes:
    return VALID.replace(b"</id>", f"--><id>{text}</id>".encode(), 1).replace(b"<id>", b"<!--", 1)


REFUSED = [
    (
        INVALID,
        "record_invalid",
        r"breaks the schema 'Nexus Experiment Schema' of CDCS, version \d+: line \d+: .*nonsense",
    ),
    (b"<a/>", "record_invalid", "line 1: Element 'a': No matching global declaration"),
    (b"<a>", "record_malformed", "no well-formed XML: .*line 1"),
    (b" ", "record_malformed", "no well-formed XML"),
    (b'<!DOCTYPE a [<!ENTITY e "x">]>' + VALID.partition(b"?>")[2], "record_doctype", "has a DOCTYPE"),
    (with_id("1e999"), "rejected", r"line \d+: id is '1e999', a number that CDCS cannot store"),
    (with_id(" NaN "), "rejected", "id is 'NaN'"),
    (with_id("-Infinity"), "rejected", "id is '-Infinity'"),
    (with_id("9" * 5000), "rejected", "id is '9999"),
    (b'<?xml version="1.0" encoding="UTF-16"?><a/>', "record_encoding", "says that it is UTF-16"),
]


@pytest.mark.parametrize(
    ("content", "code", "reason"), REFUSED, ids=[f"{n}-{item[1]}" for n, item in enumerate(REFUSED)]
)
async def test_what_cdcs_refuses_is_not_sent(
    content: bytes,
    code: str,
    reason: str,
    *,
    between: tuple[Between, str],
    rest: httpx.AsyncClient,
    make: MakeDestination,
    context_of: MakeContext,
) -> None:
    proxy, url = between
    context = context_of(content=content)
    with pytest.raises(Permanent, match=reason) as caught:
        await make(url=url).export(context)
    assert caught.value.code == code
    assert "POST /rest/data/" not in proxy.requests
    with pytest.raises(AssertionError):  # CDCS itself refuses it too
        await upload(rest, context.xml_file_path.stem, content.decode())
    assert await titled(rest, context.xml_file_path.stem) == []


async def test_a_record_in_another_encoding_is_not_sent(make: MakeDestination, context_of: MakeContext) -> None:
    with pytest.raises(Permanent, match="CDCS takes UTF-8 text only") as caught:
        await make().export(context_of(content="<a>µ</a>".encode("latin-1")))
    assert caught.value.code == "record_encoding"


@pytest.mark.parametrize("text", ["NaN nm", "info", "9" * 400, "1e308", "0x7ff", "infinite"])
async def test_what_looks_like_such_a_number_is_sent(
    text: str, *, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    content = with_id(text)
    result = await make().export(context_of(content=content))
    assert (await stored(rest, result.record_id))["xml_content"].encode() == content


async def test_an_invalid_update_is_not_sent(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    result = await destination.export(context)
    newer = rebuilt(context, result)
    newer.xml_file_path.write_bytes(INVALID)
    with pytest.raises(Permanent, match=r"which its copy http.* has: line \d+: .*nonsense") as caught:
        await destination.export(newer)
    assert caught.value.code == "record_invalid"
    assert not [request for request in proxy.requests if request.startswith("PATCH")]
    kept = (await stored(rest, result.record_id))["xml_content"].encode()
    assert hashlib.sha256(kept).hexdigest() == context.record_sha256


async def nexus_version(rest: httpx.AsyncClient) -> str:
    entries = (await rest.get(TEMPLATES[1:], params={"title": NEXUS})).json()
    return str(entries[0]["current"])


async def test_a_schema_of_several_parts_is_put_together(
    cdcs: CdcsServer,
    between: tuple[Between, str],
    rest: httpx.AsyncClient,
    make: MakeDestination,
    context_of: MakeContext,
) -> None:
    proxy, url = between
    first = f"GET /rest/template/{await nexus_version(rest)}/download/"
    space = "https://data.nist.gov/od/dm/nexus/experiment/v1.0"
    part = "http://the-name-that-cdcs-has-for-itself.invalid/rest/template/77/download/"
    whole = (
        f'<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema" targetNamespace="{space}">'
        f'<xs:include schemaLocation="{part}"/></xs:schema>'
    )
    destination = make(url=url)
    proxy.answer(first, "200 OK", whole)
    proxy.answer("GET /rest/template/77/download/", "200 OK", cdcs.schema_path.read_text())
    with pytest.raises(Permanent, match="nonsense"):
        await destination.export(context_of(content=INVALID))
    assert "POST /rest/data/" not in proxy.requests
    result = await destination.export(context_of())
    assert (await stored(rest, result.record_id))["xml_content"].encode() == VALID
    assert proxy.requests.count("GET /rest/template/77/download/") == 1


ELSEWHERE = XSD.format('<xs:include schemaLocation="file:///etc/passwd"/>')
LEFT_TO_CDCS = [
    ("404 Not Found", {"message": "Template not found."}, "does not hand it out"),
    ("403 Forbidden", {"message": "Access Forbidden."}, "does not hand it out"),
    ("200 OK", {"type": "object"}, "no XML"),
    ("200 OK", ELSEWHERE, "its part file:///etc/passwd is no template"),
]


@pytest.mark.parametrize(("status", "body", "reason"), LEFT_TO_CDCS)
async def test_without_a_schema_cdcs_decides_and_one_warning_is_given(
    status: str,
    body: object,
    reason: str,
    *,
    between: tuple[Between, str],
    rest: httpx.AsyncClient,
    make: MakeDestination,
    context_of: MakeContext,
) -> None:
    proxy, url = between
    destination, invalid = make(url=url), context_of(content=INVALID)
    proxy.answer(f"GET /rest/template/{await nexus_version(rest)}/download/", status, body)
    with capture_logs() as logs:
        assert (await destination.export(context_of())).success
        with pytest.raises(Permanent, match=r"^CDCS upload failed: \{.*nonsense") as caught:
            await destination.export(invalid)
    assert caught.value.code == "record_invalid"
    assert [entry["event"] for entry in logs] == ["schema_not_compiled"]
    assert reason in logs[0]["reason"]
    assert await titled(rest, invalid.xml_file_path.stem) == []


async def test_a_schema_that_cannot_be_downloaded_now_is_waited_for(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    proxy.answer(
        f"GET /rest/template/{await nexus_version(rest)}/download/", "503 Service Unavailable", "<h1>No</h1>"
    )
    with pytest.raises(Transient):
        await destination.export(context)
    assert "POST /rest/data/" not in proxy.requests
    assert (await destination.export(context)).success


NOTE = XSD.format(
    '<xs:element name="note"><xs:complexType><xs:sequence><xs:element name="a" type="xs:string"/>{}'
    "</xs:sequence></xs:complexType></xs:element>"
)
OLDER, NEWER = NOTE.format(""), NOTE.format('<xs:element name="b" type="xs:string" minOccurs="0"/>')


async def test_a_new_schema_version_is_used_at_once_when_a_record_needs_it(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    title = f"Note {uuid.uuid4().hex}"
    schema = await new_schema(rest, title, OLDER)
    destination = make(url=url, template_title=title)
    old = context_of(content=b"<note><a>one</a></note>")
    first = await destination.export(old)
    version = await new_version(rest, schema, NEWER)
    result = await destination.export(context_of(content=b"<note><a>two</a><b>new</b></note>"))
    assert str((await stored(rest, result.record_id))["template"]) == version
    assert proxy.requests.count("POST /rest/data/") == 2
    # records of the old version are found, and keep it
    assert await destination.verify(old) == Present(first.record_id or "", first.record_url)
    newer = rebuilt(old, first)
    newer.xml_file_path.write_bytes(b"<note><a>three</a></note>")
    assert (await destination.export(newer)).action == "updated"
    assert str((await stored(rest, first.record_id))["template"]) == schema["current"] != version
    newer.last_export = LastExport(
        first.record_id or "", None, None, hashlib.sha256(b"<note><a>three</a></note>").hexdigest()
    )
    newer.xml_file_path.write_bytes(b"<note><a>four</a><b>new</b></note>")
    with pytest.raises(Permanent, match=r"line 1: .*'b'.*migrate the copy at CDCS") as caught:
        await destination.export(newer)
    assert caught.value.code == "record_invalid"


async def test_a_new_schema_version_is_used_at_once_after_cdcs_refused_a_record(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    title = f"Note {uuid.uuid4().hex}"
    schema = await new_schema(rest, title, OLDER)
    destination = make(url=url, template_title=title)
    proxy.answer(f"GET /rest/template/{schema['current']}/download/", "404 Not Found", {"message": "No."})
    await destination.export(context_of(content=b"<note><a>one</a></note>"))
    version = await new_version(rest, schema, NEWER)
    context = context_of(content=b"<note><a>two</a><b>new</b></note>")
    result = await destination.export(context)
    assert str((await stored(rest, result.record_id))["template"]) == version
    assert len(await titled(rest, context.xml_file_path.stem)) == 1
    assert proxy.requests.count("POST /rest/data/") == 3


async def test_a_record_that_breaks_the_newest_version_too_is_refused(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    title = f"Note {uuid.uuid4().hex}"
    schema = await new_schema(rest, title, OLDER)
    destination = make(template_title=title)
    await destination.export(context_of(content=b"<note><a>one</a></note>"))
    version = await new_version(rest, schema, NEWER)
    with pytest.raises(Permanent, match=f"version {version}: line 1: .*'c'"):
        await destination.export(context_of(content=b"<note><a>two</a><c/></note>"))


async def test_a_copy_made_with_an_older_schema_version_is_found(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    context = context_of()
    first = await upload(rest, context.xml_file_path.stem, context.xml_file_path.read_text())
    template = (await rest.get(TEMPLATES[1:], params={"title": NEXUS})).json()[0]
    newer = {**template, "current": "99999", "versions": [*template["versions"], "99999"]}
    proxy.answer(f"GET {TEMPLATES}", "200 OK", [newer])
    assert await make(url=url).verify(context) == Present(first, f"{url}data?id={first}")
