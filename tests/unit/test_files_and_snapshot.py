"""Records are read without leaving their folder, checked once, and kept by their sha256."""

import errno
import hashlib
import os
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.errors import ConfigurationError, RecordError, RecordNotThereYet, RecordRefused, RecordsRootMissing
from consumer.events import INLINE_LIMIT_BYTES, RecordBuilt, built_body, read_moment
from consumer.pipeline import reader as reading
from consumer.pipeline import snapshot
from consumer.pipeline.files import read_below, safe_parts
from consumer.pipeline.snapshot import NAMESPACE, Snapshot, SnapshotReader, Spool, load_schema, parse
from tests.unit.builders import folder_of_another_user
from tools.records import make_record

XML = f"""<?xml version="1.0"?>
<nx:Experiment xmlns:nx="{NAMESPACE}">
  <nx:summary>
    <!-- a comment is no child with a name -->
    <nx:experimenter>ada</nx:experimenter>
    <nx:instrument pid="FEI-Titan-TEM">Titan</nx:instrument>
    <nx:reservationStart>2026-11-24T09:00:00+01:00</nx:reservationStart>
    <nx:reservationEnd>2026-11-24T17:00:00</nx:reservationEnd>
  </nx:summary>
</nx:Experiment>
""".encode()


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def by_path(path: str, content: bytes = XML, **changes: Any) -> RecordBuilt:
    record = {"path": path, "sha256": sha(content), "size": len(content), **changes}
    return RecordBuilt.model_validate({"session_identifier": "s", "record": record})


def inline(content: str, name: str = "a.xml", **changes: Any) -> RecordBuilt:
    body = content.encode()
    record = {"name": name, "content": content, "sha256": sha(body), "size": len(body), **changes}
    return RecordBuilt.model_validate({"session_identifier": "s", "record": record})


def put(path: Path, content: bytes = XML) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refused(kind: type[RecordError], code: str, root: Path, path: str, limit: int = 10_000) -> str:
    with pytest.raises(RecordError) as caught:
        read_below(root, safe_parts(path), limit)
    assert (type(caught.value), caught.value.code) == (kind, code)
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Give a file that no event may reach."""
    return put(tmp_path / "outside" / "secret.xml", b"<secret/>")


# --- paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("../secret.xml", "holds '..'"),
        ("a/../../secret.xml", "holds '..'"),
        ("a/..", "holds '..'"),
        ("..", "holds '..'"),
        ("/etc/passwd", "is absolute"),
        ("//etc/passwd", "is absolute"),
        (".", "names no file"),
        ("./.", "names no file"),
        ("é" * 128, "longer than 255 bytes"),
    ],
)
def test_a_path_that_could_lead_out_is_refused(path: str, why: str) -> None:
    with pytest.raises(RecordRefused, match=why) as caught:
        safe_parts(path)
    assert caught.value.code == "path_refused"


def test_an_ordinary_path() -> None:
    assert safe_parts("2026/./titan//a..b.xml") == ("2026", "titan", "a..b.xml")
    assert safe_parts("...") == ("...",)
    assert safe_parts("a\\..\\b") == ("a\\..\\b",), "a name like any other here"


# the reader of events refuses NUL and lone surrogates
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
    | st.text("./a\\", min_size=1)
)
def test_no_path_leads_out(path: str) -> None:
    try:
        parts = safe_parts(path)
    except RecordRefused:
        return
    assert parts
    assert not {"", ".", ".."} & set(parts)
    assert not any("/" in part for part in parts)


# --- reading below a root ----------------------------------------------------------------------------------------


def test_a_file_is_read(root: Path) -> None:
    put(root / "2026" / "titan" / "a.xml", b"0123456789")
    assert read_below(root, ("2026", "titan", "a.xml"), 10) == b"0123456789"
    put(root / "empty.xml", b"")
    assert read_below(root, ("empty.xml",), 0) == b""


def test_a_root_that_is_a_link_is_the_administrator_s_choice(root: Path, tmp_path: Path) -> None:
    put(root / "a.xml", b"x")
    (tmp_path / "link").symlink_to(root)
    assert read_below(tmp_path / "link", ("a.xml",), 10) == b"x"


def test_no_link_is_followed(root: Path, outside: Path) -> None:
    (root / "file.xml").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    (root / "dangling.xml").symlink_to(root / "gone")
    put(root / "own.xml", b"x")
    (root / "harmless.xml").symlink_to("own.xml")
    for path in ("file.xml", "dangling.xml", "harmless.xml"):
        assert refused(RecordRefused, "path_refused", root, path) == f"{path}: '{path}' is a symbolic link"
    said = refused(RecordRefused, "path_refused", root, "folder/secret.xml")
    assert said == "folder/secret.xml: 'folder' is a symbolic link"


@pytest.mark.parametrize("swapped", ["folder", "a.xml"])
def test_a_link_that_is_swapped_in_at_the_last_moment_is_not_followed(
    root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    put(root / "folder" / "a.xml", b"x")
    victim, target = (
        (root / "folder", outside.parent) if swapped == "folder" else (root / "folder" / "a.xml", outside)
    )
    real = os.open

    def swap_first(path: Any, *arguments: Any, **more: Any) -> int:
        if path == swapped and not victim.is_symlink():
            victim.rename(victim.with_name("moved"))
            victim.symlink_to(target)
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", swap_first)
    refused(RecordRefused, "path_refused", root, "folder/a.xml")


def test_a_folder_that_is_swapped_once_it_is_open_changes_nothing(
    root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "folder" / "secret.xml", b"mine")
    real = os.open

    def swap_after(path: Any, *arguments: Any, **more: Any) -> int:
        if path == "secret.xml":
            (root / "folder").rename(root / "moved")
            (root / "folder").symlink_to(outside.parent)
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", swap_after)
    assert read_below(root, ("folder", "secret.xml"), 100) == b"mine"


def test_what_is_no_regular_file_is_refused_at_once(root: Path) -> None:
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")
    for path in ("folder", "pipe"):
        assert refused(RecordRefused, "record_not_a_file", root, path) == f"{path} is no regular file"
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    refused(RecordRefused, "record_unreadable", root, "socket")


def test_a_device_is_refused(root: Path) -> None:
    try:
        os.mknod(root / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")
    try:
        refused(RecordRefused, "record_not_a_file", root, "zero")
    except AssertionError:
        refused(RecordNotThereYet, "record_unreadable", root, "zero")  # a file system that allows no devices


def test_a_file_used_as_a_folder_is_refused(root: Path) -> None:
    put(root / "a.xml", b"x")
    assert refused(RecordRefused, "path_refused", root, "a.xml/b") == "a.xml/b: 'a.xml' is no folder"


def test_the_size_is_bounded(root: Path) -> None:
    put(root / "a.xml", b"0123456789")
    assert read_below(root, ("a.xml",), 10) == b"0123456789"
    assert refused(RecordRefused, "record_too_large", root, "a.xml", 9) == "a.xml has 10 bytes; the limit is 9"


def test_a_file_that_grows_while_it_is_read_is_bounded_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(root / "a.xml", b"0123456789")
    real = os.read

    def grow(descriptor: int, count: int) -> bytes:
        with path.open("ab") as file:
            file.write(b"more")
        return real(descriptor, min(count, 5))

    monkeypatch.setattr(os, "read", grow)
    assert refused(RecordRefused, "record_too_large", root, "a.xml", 20) == "a.xml grew over the limit of 20 bytes"


def test_one_byte_more_than_allowed_is_too_much(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(root / "a.xml", b"0123456789")
    real = os.read

    def grow_once(descriptor: int, count: int) -> bytes:
        if path.stat().st_size == 10:
            path.write_bytes(b"0123456789X")
        return real(descriptor, count)

    monkeypatch.setattr(os, "read", grow_once)
    refused(RecordRefused, "record_too_large", root, "a.xml", 10)


def test_what_is_missing_may_still_come(root: Path) -> None:
    for path in ("a.xml", "2026/a.xml"):
        assert refused(RecordNotThereYet, "record_missing", root, path) == f"{path}: No such file or directory"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_a_network_file_system_in_trouble_is_waited_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.open

    def fail(path: Any, *arguments: Any, **more: Any) -> int:
        if path == "a.xml":
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", fail)
    refused(RecordNotThereYet, "record_missing", root, "a.xml")


def test_a_read_that_fails_half_way_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root / "a.xml", b"x")

    def fail(_descriptor: int, _count: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "read", fail)
    refused(RecordNotThereYet, "record_unreadable", root, "a.xml")


def test_a_root_that_is_gone_or_a_file_stops_the_work(root: Path, tmp_path: Path) -> None:
    said = refused(RecordsRootMissing, "records_root_missing", tmp_path / "gone", "a.xml")
    assert said == f"records root {tmp_path / 'gone'} cannot be opened: No such file or directory"
    refused(RecordsRootMissing, "records_root_missing", put(root / "a.xml"), "a.xml")


def test_what_may_not_be_read_is_waited_for_and_says_what_to_do() -> None:
    with folder_of_another_user() as (folder, without_rights), without_rights():
        for path in ("a.xml", "closed/a.xml"):
            said = refused(RecordNotThereYet, "record_unreadable", folder, path)
            assert said == f"{path}: permission denied; the service's user must be able to read it"


def test_nothing_stays_open(root: Path, outside: Path) -> None:
    put(root / "2026" / "a.xml", b"x")
    (root / "link").symlink_to(outside)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - no Path objects while it is counted
    for path in ("2026/a.xml", "2026/gone.xml", "gone/a.xml", "2026", "link", "2026/a.xml/b"):
        for limit in (10, 0):
            try:
                read_below(root, safe_parts(path), limit)
            except RecordError:
                continue
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - as above


# --- the record itself -------------------------------------------------------------------------------------------


def reader(root: Path | None, limit: int = 1_000_000, schema: Path | None = None) -> SnapshotReader:
    return SnapshotReader(root, limit, schema)


def failure(data: RecordBuilt, by: SnapshotReader) -> RecordError:
    with pytest.raises(RecordError) as caught:
        by.read(data)
    return caught.value


def test_a_record_is_read_checked_and_asked_for_what_it_says_of_itself(root: Path) -> None:
    put(root / "2026" / "titan.xml")
    assert reader(root).read(by_path("2026/titan.xml")) == Snapshot(
        sha(XML),
        "titan.xml",
        XML,
        {
            "instrument_pid": "FEI-Titan-TEM",
            "dt_from": "2026-11-24T09:00:00+01:00",
            "dt_to": "2026-11-24T17:00:00+00:00",  # without a zone it is UTC
            "user": "ada",
        },
    )


def test_an_inline_record_needs_no_folder() -> None:
    found = reader(None).read(inline(XML.decode(), "titan.xml"))
    assert (found.name, found.content) == ("titan.xml", XML)


def test_a_generated_record(root: Path) -> None:
    record = make_record(3, size=5_000)
    put(root / record.name, record.content)
    found = reader(root).read(by_path(record.name, record.content)).facts
    assert set(found) == {"instrument_pid", "dt_from", "dt_to", "user"}
    assert datetime.fromisoformat(found["dt_from"]) == record.dt_from


def test_a_path_needs_a_folder() -> None:
    error = failure(by_path("a.xml"), reader(None))
    assert isinstance(error, RecordsRootMissing)
    assert "NX_RECORDS_PATH" in str(error)


@pytest.mark.parametrize("moved", ["uploaded/a.xml", "2026/uploaded/a.xml"])
def test_a_record_that_nexuslims_has_moved_is_found(root: Path, moved: str) -> None:
    put(root / moved)
    found = reader(root).read(by_path("2026/a.xml"))
    assert (found.name, found.content) == ("a.xml", XML)


def test_the_record_where_it_was_announced_comes_first(root: Path) -> None:
    put(root / "uploaded" / "a.xml", b"<old/>")
    put(root / "a.xml")
    assert reader(root).read(by_path("a.xml")).content == XML


def test_of_two_that_were_moved_always_the_same_is_taken(root: Path) -> None:
    put(root / "uploaded" / "a.xml")
    put(root / "2026" / "uploaded" / "a.xml", b"<old/>")
    assert reader(root).read(by_path("2026/a.xml")).content == XML


def test_what_is_nowhere_is_missing_where_it_was_announced(root: Path) -> None:
    error = failure(by_path("2026/a.xml"), reader(root))
    assert isinstance(error, RecordNotThereYet)
    assert str(error) == "2026/a.xml: No such file or directory"


def test_a_link_named_uploaded_does_not_refuse_a_record_that_is_late(root: Path, outside: Path) -> None:
    (root / "uploaded").symlink_to(outside.parent)
    error = failure(by_path("secret.xml"), reader(root))
    assert isinstance(error, RecordNotThereYet)
    assert error.code == "record_missing"


def test_a_path_that_leads_out_has_no_other_place(root: Path) -> None:
    put(root / "uploaded" / "secret.xml")
    assert failure(by_path("../secret.xml"), reader(root)).code == "path_refused"


@pytest.mark.parametrize("changes", [{"sha256": "ab" * 32}, {"size": len(XML) + 1}, {"size": 0}])
def test_other_bytes_than_announced(root: Path, changes: dict[str, Any]) -> None:
    put(root / "a.xml")
    error = failure(by_path("a.xml", **changes), reader(root))
    assert (type(error), error.code) == (RecordRefused, "record_changed")
    assert f"a.xml has {len(XML)} bytes with sha256 {sha(XML)[:12]}" in str(error)
    assert failure(inline(XML.decode(), **changes), reader(None)).code == "record_changed"


def test_an_announced_size_of_any_length(root: Path) -> None:
    put(root / "a.xml")
    assert failure(by_path("a.xml", size=10**400), reader(root)).code == "record_changed"


ENTITIES = """<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;"><!ENTITY d "&c;&c;&c;&c;&c;&c;&c;">
<!ENTITY e "&d;&d;&d;&d;&d;&d;&d;"><!ENTITY f "&e;&e;&e;&e;&e;&e;&e;&e;">]>"""


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "record_malformed"),
        ("no XML", "record_malformed"),
        ("<a>", "record_malformed"),
        ("<a></b>", "record_malformed"),
        ("<a/><b/>", "record_malformed"),
        ("<a>&undeclared;</a>", "record_malformed"),
        ('<?xml version="1.0" encoding="nonsense"?><a/>', "record_malformed"),
        ("<a>\x01</a>", "record_malformed"),
        ("<a/>", "record_wrong_root"),
        ("<Experiment/>", "record_wrong_root"),
        ('<Experiment xmlns="https://elsewhere.test/"/>', "record_wrong_root"),
        (f'<nx:Other xmlns:nx="{NAMESPACE}"/>', "record_wrong_root"),
        (f'<!DOCTYPE x><nx:Experiment xmlns:nx="{NAMESPACE}"/>', "record_doctype"),
        (f'{ENTITIES}<nx:Experiment xmlns:nx="{NAMESPACE}">&f;</nx:Experiment>', "record_doctype"),
        (f'<!DOCTYPE x SYSTEM "http://dtd.test/x.dtd"><nx:Experiment xmlns:nx="{NAMESPACE}"/>', "record_doctype"),
    ],
    ids=range(15),
)
def test_what_is_no_record_is_refused(content: str, code: str) -> None:
    error = failure(inline(content), reader(None))
    assert (type(error), error.code) == (RecordRefused, code)
    assert "a.xml" in str(error)


def test_entities_read_no_file(tmp_path: Path, outside: Path) -> None:
    """Neither as content nor, which is looked for below the message, as a part of the DTD."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # whoever opens it waits for ever
    for entity in (f'<!ENTITY a SYSTEM "file://{outside}">', f'<!ENTITY % a SYSTEM "file://{pipe}"> %a;'):
        content = f'<!DOCTYPE x [{entity}]><nx:Experiment xmlns:nx="{NAMESPACE}">&a;</nx:Experiment>'
        error = failure(inline(content), reader(None))
        assert error.code in {"record_doctype", "record_malformed"}
        assert "secret" not in str(error)


@given(st.binary(max_size=80) | st.binary(max_size=40).map(lambda tail: XML[:-20] + tail))
def test_no_bytes_break_the_reader(content: bytes) -> None:
    try:
        parse("a.xml", content)
    except RecordRefused as error:
        refusal = error
    else:
        return
    assert refusal.code == "record_malformed"


@pytest.mark.parametrize(
    "name", ["a/b.xml", "..", ".", "/etc/passwd", "é" * 128], ids=["folder", "up", "here", "root", "long"]
)
def test_the_name_of_an_inline_record_is_a_plain_one(name: str) -> None:
    assert failure(inline(XML.decode(), name), reader(None)).code == "path_refused"


def test_the_size_of_an_inline_record_is_bounded() -> None:
    body = f'<nx:Experiment xmlns:nx="{NAMESPACE}">{{}}</nx:Experiment>'
    fill = INLINE_LIMIT_BYTES - len(body.format(""))
    assert len(reader(None).read(inline(body.format("x" * fill))).content) == INLINE_LIMIT_BYTES
    error = failure(inline(body.format("é" + "x" * (fill - 1))), reader(None))
    assert error.code == "record_too_large", "bytes count, not characters"


# --- what a record says of itself --------------------------------------------------------------------------------


def facts_of(summary: str) -> dict[str, Any]:
    body = f'<nx:Experiment xmlns:nx="{NAMESPACE}"><nx:summary>{summary}</nx:summary></nx:Experiment>'
    return reader(None).read(inline(body)).facts


def test_a_record_may_say_nothing() -> None:
    assert facts_of("") == {}
    assert reader(None).read(inline(f'<nx:Experiment xmlns:nx="{NAMESPACE}"/>')).facts == {}
    assert facts_of("<nx:instrument/><nx:experimenter/><nx:reservationStart/>") == {}


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-24T09:00:00Z", "2026-11-24T09:00:00+00:00"),
        (" 2026-11-24T09:00:00.5 \n", "2026-11-24T09:00:00.500000+00:00"),
        ("soon", None),
        ("2026-11-24T25:00:00", None),
        ("2026-11-24T09:00:00+01:00:30", None),
        ("0001-01-01T00:00:00+01:00", None),
        ("9999-12-31T23:59:59-01:00", None),
        ("12026-11-24T09:00:00", None),
    ],
)
def test_times_that_no_event_can_hold_are_left_out(text: str, moment: str | None) -> None:
    found = facts_of(f"<nx:reservationStart>{text}</nx:reservationStart>").get("dt_from")
    assert found == moment
    if found:
        assert read_moment(found) == datetime.fromisoformat(found)


# --- schema ------------------------------------------------------------------------------------------------------

XSD = f"""<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema" targetNamespace="{NAMESPACE}"
    xmlns="{NAMESPACE}" elementFormDefault="qualified">
  <xs:element name="Experiment"><xs:complexType><xs:sequence>
    <xs:element name="number" type="xs:integer"/>
  </xs:sequence></xs:complexType></xs:element>
</xs:schema>"""


@pytest.fixture
def xsd(tmp_path: Path) -> Path:
    return put(tmp_path / "record.xsd", XSD.encode())


def numbered(number: str) -> RecordBuilt:
    return inline(f'<Experiment xmlns="{NAMESPACE}">\n<number>{number}</number>\n</Experiment>')


def test_the_schema_decides_and_says_where(xsd: Path) -> None:
    strict = reader(None, schema=xsd)
    assert strict.read(numbered("7")).name == "a.xml"
    error = failure(numbered("seven"), strict)
    assert error.code == "record_invalid"
    assert str(error).startswith("a.xml, line 2: Element '{https://data.nist.gov")
    assert strict.read(numbered("8")).name == "a.xml", "one refusal leaves nothing behind"
    assert reader(None).read(numbered("seven")).name == "a.xml", "without a schema it is not asked"


def test_the_schema_tells_threads_apart(xsd: Path) -> None:
    strict = reader(None, schema=xsd)
    wrong: list[str] = []

    def work(number: int) -> None:
        for _ in range(50):
            error = failure(numbered(f"no-{number}"), strict)
            if f"no-{number}" not in str(error):
                wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("content", [b"", b"<a/>", b"no XML"])
def test_a_schema_that_is_none_stops_the_start(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigurationError, match=r"NX_RECORD_SCHEMA: .* cannot be used: "):
        load_schema(put(tmp_path / "x.xsd", content))
    with pytest.raises(ConfigurationError, match="NX_RECORD_SCHEMA"):
        load_schema(tmp_path / "gone.xsd")


def test_a_batch_puts_an_error_in_the_place_of_its_record(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "a.xml")
    spool = Spool(tmp_path / "spool")
    spool.root.mkdir(exist_ok=True)
    monkeypatch.setattr(reading, "_state", {"reader": reader(root), "spool": spool})
    events = [
        built_body(data, event_id=str(number), source="test", time=datetime(2026, 11, 24, tzinfo=UTC)).decode()
        for number, data in enumerate([by_path("gone.xml"), by_path("a.xml"), by_path("../x")])
    ]
    found = reading.read_batch(events)
    assert [item.kind for item in found] == ["not_there_yet", "kept", "refused"]
    assert [item.code for item in found] == ["record_missing", "", "path_refused"]
    assert spool.path(found[1].sha256, found[1].name).read_bytes() == (root / "a.xml").read_bytes()


# --- our own copies ----------------------------------------------------------------------------------------------


def kept(content: bytes = XML, name: str = "a.xml") -> Snapshot:
    return Snapshot(sha(content), name, content, {})


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_copies_lie_by_their_sha256_with_their_own_names(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "deep" / "spool")
    first, second, same_bytes = kept(), kept(b"<b/>", "b.xml"), kept(name="other.xml")
    spool.keep([first, second, same_bytes])
    for item in (first, second, same_bytes):
        assert spool.path(item.sha256, item.name).read_bytes() == item.content
    digest = sha(XML)
    assert spool.path(digest, "a.xml") == tmp_path / "deep" / "spool" / digest[:2] / digest / "a.xml"
    assert len(files(spool.root)) == 3


def test_keeping_twice_is_keeping_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.keep([kept()])
    path = spool.path(sha(XML), "a.xml")
    before = path.stat()
    spool.keep([kept(), kept()])
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("left", [b"", XML[:10], XML.replace(b"ada", b"bob"), XML + b"more"])
def test_a_cut_copy_from_before_a_crash_is_replaced(tmp_path: Path, left: bytes) -> None:
    spool = Spool(tmp_path)
    path = put(spool.path(sha(XML), "a.xml"), left)
    spool.keep([kept()])
    assert path.read_bytes() == XML
    assert len(files(tmp_path)) == 1, "no temporary file stays"


def test_nothing_to_keep_makes_no_folder(tmp_path: Path) -> None:
    Spool(tmp_path / "spool").keep([])
    assert not (tmp_path / "spool").exists()


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    put(spool.path(sha(XML), "a.xml"), b"cut")
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) <= len(XML) // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[: len(XML) // 2 + 1])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        spool.keep([kept()])
    assert files(tmp_path) == [str(spool.path(sha(XML), "a.xml").relative_to(tmp_path))]
    monkeypatch.undo()
    spool.keep([kept()])
    assert spool.path(sha(XML), "a.xml").read_bytes() == XML


def test_a_write_may_take_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    Spool(tmp_path).keep([kept()])
    monkeypatch.undo()
    assert Spool(tmp_path).path(sha(XML), "a.xml").read_bytes() == XML


def test_a_batch_is_flushed_once_and_a_disk_that_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []

    def flush(descriptor: int) -> None:
        assert os.fstat(descriptor).st_ino == tmp_path.stat().st_ino
        flushed.append(files(tmp_path))

    monkeypatch.setattr(snapshot, "sync_file_system", flush)
    Spool(tmp_path).keep([kept(), kept(b"<b/>")])
    assert [len(names) for names in flushed] == [2], "once, and after everything is written"
    monkeypatch.undo()
    with pytest.raises(OSError, match="Bad file descriptor"):
        snapshot.sync_file_system(-1)


def test_two_threads_may_keep_the_same(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    content = b"<a>" + b"x" * 100_000 + b"</a>"
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                spool.keep([kept(content)])
                spool.path(sha(content), "a.xml").read_bytes()
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert spool.path(sha(content), "a.xml").read_bytes() == content
    assert len(files(tmp_path)) == 1
