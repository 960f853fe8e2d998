"""What is said about LabArchives without asking it: signatures, names, keys, what is missing, what answers mean."""

import base64
import hashlib
import hmac
import random
import string
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.destinations.contract import ExportContext, LastExport
from consumer.destinations.labarchives_client import problem, signature
from consumer.destinations.labarchives_rules import (
    FILES_BYTES,
    XML_CAPTION,
    Entry,
    File,
    Node,
    Note,
    Part,
    api_url,
    bracket,
    choose_page,
    file_mark,
    folders_named,
    found_in,
    hex_key,
    is_foreign,
    known_entries,
    known_page,
    link_mark,
    link_notes,
    missing,
    month_name,
    page_name,
    page_url,
    pages_of,
    plain_name,
    plain_text,
    preview_captions,
    preview_file,
    read_users,
    record_note,
    username_of,
    web_url,
    xml_file,
)
from consumer.destinations.summary import Summary
from consumer.errors import Misconfigured, Permanent, Transient, UnknownOutcome

KEY = "0b9d2f1e7c3a5d449a105b7f3c2d1e00"
SHA = "a" * 64
NOW = datetime(2026, 3, 1, 23, 30, tzinfo=timezone(timedelta(hours=-7)))
SUMMARY = Summary(
    "s-1", "SEM", "ada", "2026-03-01T23:30:00-07:00", "2026-03-02T00:30:00-07:00", None, None, (), (), ("a.dm4",), ()
)


def context(**more: Any) -> ExportContext:
    return ExportContext(Path("r.xml"), "s-1", "SEM", NOW, NOW, **more)


# --- signature ---------------------------------------------------------------------------------------------------


def test_the_published_vector() -> None:
    """The one example that LabArchives gives of its signature."""
    assert signature("1234567890", "0234wedkfjrtfd34er", "entry_attachment", 264433207000) == (
        "mT7pS+KgqlNseR0bo4YLQOVIsgOugMWzlQGllInXS25Q7VpA6lRmL0nUq/UUdrlF+WV7POYE1vcwvN/pnac7bw=="
    )


@pytest.mark.parametrize(("method", "signed"), [
    ("get_tree_level", "mxbeGekFRuCqdroPO8wIAMIKS7IUNSoGkHWe7rYGHxEU6wbs8ilemCp4FqR5GNHWJLqQ7vCLheP+rldtZ5rdYA=="),
    ("insert_node", "wHKi6CoEUeW/63CRpKIhx3br6GOCh/pRml5IkpbxiBc9R7n4eYuT9T4TVobHk7f1Rjo1e6HgvxXh+DELtL43yQ=="),
    ("add_entry", "5FSQJ3h+WgZx/ysj84AoL2fgJnDhDNGHEoehXDFxG+rk46/yxAFux1vROtLHRkNyvdycYupVrCgAzyZxcB9XqQ=="),
    ("add_attachment", "MvzFHrLTJ6frPBlCn0H09HLTyv9atzGwXc1WNodweA3V46/3CY5FC/Qwe07PTpBNRSAX2MzKf2GAntRvuWsXbw=="),
])  # fmt: skip
def test_further_vectors(method: str, signed: str) -> None:
    assert signature("test-password", "test-akid-0001", method, 1767225600000) == signed


@given(st.text(max_size=30), st.text(max_size=30), st.integers(0, 2**50))
def test_a_signature_covers_key_method_and_time(password: str, key_id: str, expires: int) -> None:
    message = f"{key_id}insert_node{expires}".encode()
    right = hmac.new(password.encode(), message, hashlib.sha512).digest()
    assert base64.b64decode(signature(password, key_id, "insert_node", expires)) == right


# --- what an answer means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
@pytest.mark.parametrize(("code", "kind", "name"), [
    (4500, Permanent, "rejected"), (4501, Permanent, "not_permitted"), (4502, Permanent, "not_permitted"),
    (4504, Misconfigured, "misconfigured"), (4506, Misconfigured, "misconfigured"),
    (4507, Misconfigured, "misconfigured"), (4514, Misconfigured, "misconfigured"),
    (4520, Misconfigured, "misconfigured"), (4533, Misconfigured, "misconfigured"), (4529, Permanent, "rejected"),
    (4547, Permanent, "not_permitted"),
])  # fmt: skip
def test_a_code_means_the_same_with_every_status(code: int, kind: type, name: str, status: int) -> None:
    for creates in (False, True):
        error = problem("add_entry", status, code, "said", creates=creates)
        assert type(error) is kind
        assert error is not None
        assert error.code == name
        assert str(code) in str(error)


@pytest.mark.parametrize(
    ("status", "code"), [(200, 4999), (500, 4999), (500, None), (502, None), (503, 1), (408, None)]
)
def test_trouble_of_the_server_is_unknown_for_what_creates(status: int, code: int | None) -> None:
    created = problem("add_entry", status, code, "", creates=True, retry_after=7)
    assert isinstance(created, UnknownOutcome)
    assert created.retry_after == 7
    asked = problem("get_tree_level", status, code, "", creates=False, retry_after=7)
    assert isinstance(asked, Transient)
    assert (asked.code, asked.retry_after) == ("server_error", 7)


@pytest.mark.parametrize("creates", [False, True])
@pytest.mark.parametrize(("status", "kind", "name"), [
    (301, Misconfigured, "misconfigured"), (400, Permanent, "rejected"), (401, Misconfigured, "misconfigured"),
    (403, Misconfigured, "misconfigured"), (404, Misconfigured, "misconfigured"),
    (405, Misconfigured, "misconfigured"),
    (407, Misconfigured, "misconfigured"), (413, Permanent, "too_large"), (414, Permanent, "rejected"),
    (429, Transient, "rate_limited"),
])  # fmt: skip
def test_a_status_without_a_code(status: int, kind: type, name: str, *, creates: bool) -> None:
    """A question that was refused without a word of LabArchives says nothing of the record."""
    error = problem("add_entry", status, None, "", creates=creates)
    if kind is Permanent and not creates:
        kind, name = Transient, "no_answer"
    assert type(error) is kind
    assert error is not None
    assert error.code == name


def test_a_success_is_no_problem() -> None:
    assert problem("add_entry", 200, None, "", creates=True) is None
    assert isinstance(problem("add_entry", 200, 4711, "", creates=True), Permanent)


# --- keys and names ----------------------------------------------------------------------------------------------


def test_the_key_is_the_record_key_in_hex() -> None:
    assert hex_key("0b9d2f1e-7c3a-5d44-9a10-5b7f3c2d1e00", "s") == KEY
    assert hex_key("0B9D2F1E7C3A5D449A105B7F3C2D1E00", "s") == KEY


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_key_is_always_hex_and_the_same(record_key: str, session: str) -> None:
    key = hex_key(record_key, session)
    assert len(key) >= 16
    assert set(key) <= set("0123456789abcdef")
    assert key == hex_key(record_key, session)


def test_the_name_of_a_page() -> None:
    name = page_name(NOW, "https://nemo.example.org/event/?id=31", KEY)
    assert name == "2026-03-01 — https://nemo.example.org/event/?id=31 [k:0b9d2f1e7c3a]"
    assert month_name(NOW) == "2026-03"


@given(st.text(max_size=400))
def test_every_page_is_found_by_its_name(session: str) -> None:
    name = page_name(NOW, session, KEY)
    assert pages_of([Node("1", name, is_page=True)], KEY) == ["1"]
    assert name == plain_name(name)
    assert len(name) < 250


@given(st.text(max_size=60))
def test_a_plain_name_has_one_line_and_is_plain_already(text: str) -> None:
    name = plain_name(text)
    assert name
    assert name.isprintable()
    assert plain_name(name) == name


@pytest.mark.parametrize(("api", "web"), [
    ("https://api.labarchives.com/api/", "https://mynotebook.labarchives.com"),
    ("https://api.labarchives.com", "https://mynotebook.labarchives.com"),
    ("https://auapi.labarchives.com/api/", "https://au-mynotebook.labarchives.com"),
    ("https://caapi.labarchives.com/api/", "https://ca-mynotebook.labarchives.com"),
    ("https://euapi.labarchives.com/api/", "https://eu-mynotebook.labarchives.com"),
    ("https://ukapi.labarchives.com/api/", "https://uk-mynotebook.labarchives.com"),
    ("https://api.labarchives-gov.com/api/", "https://mynotebook.labarchives-gov.com"),
    ("http://localhost:8090/api/", "http://localhost:8090"),
    ("https://notebooks.example.org/la/api", "https://notebooks.example.org/la"),
    ("https://api.labarchives.com.evil.example/api/", "https://api.labarchives.com.evil.example"),
])  # fmt: skip
def test_where_people_look(api: str, web: str) -> None:
    assert web_url(api) == web


def test_the_api_path_may_be_left_out() -> None:
    assert api_url("https://api.labarchives.com/") == "https://api.labarchives.com/api/"
    assert api_url("https://api.labarchives.com/api/") == "https://api.labarchives.com/api/"
    assert not web_url(api_url("")).startswith("https")


def test_ids_are_encoded_in_addresses() -> None:
    assert page_url("https://w", "a/b==", "c+d=") == "https://w/a%2Fb%3D%3D/page/c%2Bd%3D"


# --- choosing ----------------------------------------------------------------------------------------------------


def test_of_equal_folders_every_process_takes_the_same() -> None:
    nodes = [Node("b", "SEM", is_page=False), Node("a", " SEM ", is_page=False), Node("0", "SEM", is_page=True)]
    for _ in range(5):
        random.shuffle(nodes)
        assert folders_named(nodes, "SEM") == ["a", "b"]
    assert folders_named(nodes, "sem") == []


def test_a_page_is_found_whatever_a_person_calls_it() -> None:
    nodes = [
        Node("2", f"My best session {bracket(KEY)} !", is_page=True),
        Node("1", bracket(KEY), is_page=True),
        Node("3", bracket(KEY), is_page=False),
        Node("4", bracket("f" * 32), is_page=True),
    ]
    assert pages_of(nodes, KEY) == ["1", "2"]


def test_the_fullest_page_is_kept_unless_one_is_known() -> None:
    parts: list[Part] = [Note(file_mark(SHA), KEY, ""), xml_file(Path("r.xml"), SHA, 3)]
    text = Entry("t", "text entry", f"Record key: {KEY} sha256:{SHA}")
    full = [text, Entry("f", "Attachment", "", f"{XML_CAPTION} sha256:{SHA}", "r.xml", 3)]
    found = {"a": [], "b": full, "c": [text]}
    assert choose_page(found, parts, {}, None) == "b"
    assert choose_page(found, parts, {}, "c") == "c"
    assert choose_page(found, parts, {}, "gone") == "b"
    assert choose_page({"y": [], "x": []}, parts, {}, None) == "x"


NOTE = Note(file_mark(SHA), KEY, "")
FILE = xml_file(Path("r.xml"), SHA, 3)
CAPTION = f"{XML_CAPTION} sha256:{SHA}"


@pytest.mark.parametrize(("entry", "known", "there"), [
    (Entry("1", "text entry", f"… Record key: {KEY} sha256:{SHA}"), {}, True),
    (Entry("1", "text entry", f"… Record key: {KEY} sha256:{SHA} link:1"), {}, True),
    (Entry("1", "text entry", f"Record key: {KEY} sha256:{'b' * 64}"), {}, False),
    (Entry("1", "text entry", f"Record key: {'f' * 32} sha256:{SHA}"), {}, False),
    (Entry("1", "text entry", "rewritten by a person"), {NOTE.name: "1"}, True),
    (Entry("1", "text entry", "rewritten by a person"), {FILE.name: "1"}, False),
    (Entry("1", "Attachment", f"Record key: {KEY} sha256:{SHA}"), {}, False),
])  # fmt: skip
def test_when_a_text_is_there(entry: Entry, known: dict[str, str], *, there: bool) -> None:
    assert (missing([NOTE], [entry], known) == []) is there


@pytest.mark.parametrize(("entry", "known", "there"), [
    (Entry("1", "Attachment", "", CAPTION, "r.xml", 3), {}, True),
    (Entry("1", "attachment", "", f"x {CAPTION} y", "", None), {}, True),
    (Entry("1", "Attachment", "", CAPTION, "r.xml", 2), {}, False),
    (Entry("1", "Attachment", "", CAPTION, "other.xml", 3), {}, False),
    (Entry("1", "Attachment", "", XML_CAPTION, "r.xml", 3), {}, False),
    (Entry("1", "Attachment", "", "mine", "other.xml", 3), {FILE.name: "1"}, True),
    (Entry("1", "Attachment", "", "mine", "other.xml", 0), {FILE.name: "1"}, False),
    (Entry("1", "text entry", "", CAPTION, "r.xml", 3), {}, False),
])  # fmt: skip
def test_when_a_file_is_there(entry: Entry, known: dict[str, str], *, there: bool) -> None:
    assert (missing([FILE], [entry], known) == []) is there


def test_the_remembered_one_comes_first_and_the_rest_is_surplus() -> None:
    entries = [Entry(i, "Attachment", "", CAPTION, "r.xml", 3) for i in "cab"]
    assert found_in(FILE, entries, {FILE.name: "b"}) == ["b", "a", "c"]
    assert found_in(FILE, entries, {}) == ["a", "b", "c"]


@pytest.mark.parametrize(("entries", "foreign"), [
    ([], False),
    ([Entry("1", "text entry", "a person's words")], False),
    ([Entry("1", "text entry", f"Record key: {KEY} sha256:{SHA}")], False),
    ([Entry("1", "text entry", f"Record key: {'f' * 32} sha256:{SHA}")], True),
    ([Entry("1", "Attachment", "", f"{XML_CAPTION} sha256:{'b' * 64}")], True),
    ([Entry("1", "Attachment", "", f"{XML_CAPTION} sha256:{'b' * 64}"), Entry("2", "text entry", KEY)], False),
    ([Entry("1", "Attachment", "", CAPTION)], False),
])  # fmt: skip
def test_whose_a_page_with_our_short_key_is(entries: list[Entry], *, foreign: bool) -> None:
    assert is_foreign(entries, KEY, {SHA, ""}) is foreign


# --- what a page is to have --------------------------------------------------------------------------------------


def test_the_text_says_whose_record_it_is_and_links() -> None:
    url = "https://cdcs.example.org/data?id=1&x=<b>"
    note = record_note(SUMMARY, {"cdcs": url}, KEY, "r<1>.xml", SHA)
    text = plain_text(note.html)
    assert f"Record key: {KEY} sha256:{SHA} {link_mark(url)}" in text
    assert "Record: r<1>.xml" in text
    assert "&lt;b&gt;" in note.html
    there = Entry("1", "text entry", text)
    assert missing([note, *link_notes({"cdcs": url}, KEY)], [there], {}) == []
    assert len(missing(link_notes({"cdcs": url + "2"}, KEY), [there], {})) == 1


def test_a_late_link_is_a_text_of_its_own() -> None:
    [note] = link_notes({"cdcs": "https://c/1"}, KEY)
    assert "View in CDCS" in note.html
    assert not missing([note], [Entry("1", "text entry", plain_text(note.html))], {})
    assert missing([NOTE], [Entry("1", "text entry", plain_text(note.html))], {})


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_name_breaks_out_of_the_text(file_name: str, user: str) -> None:
    summary = Summary("s", "i", user, "", "", None, None, (), (), (file_name,), ())
    note = record_note(summary, {}, KEY, file_name, SHA)
    assert missing([note], [Entry("1", "text entry", plain_text(note.html))], {}) == []


def test_a_long_list_of_files_is_cut() -> None:
    files = tuple(f"/data/{'ä' * 100}/{number}.dm4" for number in range(5000))
    note = record_note(Summary("s", "i", None, "", "", None, None, (), (), files, ()), {}, KEY, "r.xml", SHA)
    assert len(note.html.encode()) < 3 * FILES_BYTES
    assert "more, see the attached record" in note.html
    assert KEY in note.html


def test_previews_are_named_after_what_they_show() -> None:
    paths = [Path(f"/p/{number}.png") for number in range(4)]
    activities = [
        SimpleNamespace(files=("/d/a.dm4", "/d/a.dm4", "/d/b.tif"), previews=(paths[0], None, paths[2])),
        SimpleNamespace(files=("/d/c.tif",), previews=(paths[3], paths[0])),
    ]
    assert preview_captions(activities) == {paths[0]: "a.dm4 (1 of 2)", paths[2]: "b.tif", paths[3]: "3.png"}
    file = preview_file(paths[0], "a.dm4 (1 of 2)", b"PNG")
    assert isinstance(file, File)
    assert file.caption.startswith("a.dm4 (1 of 2): ")
    assert file.mark in file.caption
    assert (file.size, file.file_name) == (3, "0.png")


def test_blanks_and_entities_of_an_editor_change_nothing() -> None:
    text = plain_text(f"<div><p>Record&nbsp;key:\n <b>{KEY}</b>&#32;sha256:{SHA}</p></div>")
    assert text == f"Record key: {KEY} sha256:{SHA}"


@given(st.text(alphabet=string.printable + "é\0<&", max_size=200))
def test_any_text_of_a_page_can_be_read(fragment: str) -> None:
    assert isinstance(plain_text(fragment), str)


# --- people and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "is_json"), [
    ("username,uid\nAda,u1\n grace , u2 \n\n# nobody\n", False),
    ('Ada,u1\n"grace","u2"', False),
    ('{"Ada": "u1", "grace": "u2"}', True),
])  # fmt: skip
def test_users_files(text: str, *, is_json: bool) -> None:
    assert read_users(text, is_json=is_json) == {"ada": "u1", "grace": "u2"}


@pytest.mark.parametrize(("text", "is_json"), [
    ("ada", False), ("ada,u1,x", False), ("ada,", False), (",u1", False), ("[]", True), ('{"ada": 1}', True),
    ("{", True), ('{"ada": ""}', True),
])  # fmt: skip
def test_users_files_that_are_none(text: str, *, is_json: bool) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read_users(text, is_json=is_json)


def test_the_reservation_s_user_comes_first() -> None:
    assert username_of(context(user="a", reservation_event=SimpleNamespace(username="b"))) == "b"
    assert username_of(context(user="a", reservation_event=SimpleNamespace(username=None))) == "a"
    assert username_of(context()) is None


@pytest.mark.parametrize(("last", "remembered", "page"), [
    (None, {}, None),
    (None, {"page": "p"}, "p"),
    (None, {"record_id": "p"}, "p"),
    (LastExport("p", "https://w/nb/page/p", None, None), {"page": "q"}, "p"),
    (LastExport("eid", "https://mynotebook.labarchives.com/#/nb/cGFnZQ%3D%3D", None, None), {}, "cGFnZQ=="),
    (LastExport("eid", "https://mynotebook.labarchives.com/#/nb/cGFnZQ==", None, None), {}, "cGFnZQ=="),
    (LastExport("eid", None, None, None), {}, "eid"),
])  # fmt: skip
def test_which_page_is_known(last: LastExport | None, remembered: dict[str, Any], page: str | None) -> None:
    assert known_page(context(last_export=last, remembered=remembered)) == page


def test_what_is_remembered_of_entries() -> None:
    assert known_entries(context(remembered={"entries": {"note x": "1"}})) == {"note x": "1"}
    assert known_entries(context(remembered={"entries": "broken"})) == {}
    assert known_entries(context()) == {}


def test_times_are_those_of_the_instrument() -> None:
    assert page_name(NOW, "s", KEY).startswith("2026-03-01 ")
    assert page_name(NOW.astimezone(UTC), "s", KEY).startswith("2026-03-02 ")
