"""What is sent to eLabFTW, how its answers are read, and what an experiment lacks."""

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from consumer.destinations.contract import ExportContext, ExportResult
from consumer.destinations.elabftw_entry import (
    RECORD_KEY,
    RECORD_SHA256,
    field_value,
    has_key,
    is_ours,
    location_id,
    metadata_of,
    notes_of,
    page_digest,
    said,
    state_of,
    stored_digest,
    uploads_of,
)
from consumer.destinations.elabftw_people import match_user, read_users, session_names, version_of, with_user
from consumer.destinations.elabftw_rules import (
    MAX_PREVIEW_BYTES,
    MAX_PREVIEWS,
    PREVIEW_COMMENT,
    XML_COMMENT,
    File,
    Known,
    Lacks,
    Plan,
    Wanted,
    additions,
    comment_of,
    fields_of,
    file_name,
    is_attached,
    lacking,
    link_field,
    links_of,
    merged,
    missing_tags,
    obstacle,
    payload,
    plan,
    replacements,
    search,
    tags_of,
    title_of,
    wanted_of,
)
from consumer.errors import Misconfigured
from consumer.events import Reservation
from consumer.pipeline.attempt import ContextActivity

TOKYO = timezone(timedelta(hours=9))
XML = b'<Experiment xmlns="https://data.nist.gov/od/dm/nexus/experiment/v1.0"><title>Iron</title></Experiment>'
OLD, SHA = "0" * 64, hashlib.sha256(XML).hexdigest()
CDCS_URL = "https://cdcs.example.org/data?id=5"
KEY = "0f3a" * 8


def context_in(folder: Path, **changes: Any) -> ExportContext:
    path = folder / "titan.xml"
    path.write_bytes(XML)
    values: dict[str, Any] = {
        "xml_file_path": path,
        "session_identifier": "session 1",
        "instrument_pid": "Titan-TEM",
        "dt_from": datetime(2026, 9, 14, 8, 15, 30, tzinfo=TOKYO),
        "dt_to": datetime(2026, 9, 14, 10, 45, tzinfo=UTC),
        "record_key": "0f3a0f3a-0f3a-0f3a-0f3a-0f3a0f3a0f3a",
    }
    return ExportContext(**{**values, **changes})


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    return wanted_of(context_in(tmp_path, user="Ada"))


def entry_of(wanted: Wanted, **changes: Any) -> dict[str, Any]:
    """Return the experiment as the server has it after the create."""
    sent = payload(wanted, None, None)
    return {**sent, "id": 17, "state": 1, "locked": 0, "metadata": json.dumps(sent["metadata"]), **changes}


def linked(folder: Path) -> Wanted:
    return wanted_of(context_in(folder, user="Ada", links={"cdcs": CDCS_URL}))


def upload(number: int = 1, **changes: Any) -> dict[str, Any]:
    comment = comment_of(XML_COMMENT, SHA)
    values = {
        "id": number,
        "real_name": "titan.xml",
        "hash": SHA,
        "filesize": len(XML),
        "comment": comment,
        "state": 1,
    }
    return {**values, **changes}


# --- what is sent ----------------------------------------------------------------------------------------------


def test_a_wanted_state_from_a_context(wanted: Wanted) -> None:
    assert wanted.key == KEY
    assert wanted.title == "NexusLIMS Experiment - titan"
    assert wanted.tags == ("NexusLIMS", "Titan-TEM", "Ada")
    assert wanted.body.startswith("<h1>NexusLIMS Microscopy Session</h1><h2>Session Details</h2>")
    assert (wanted.record.name, wanted.record.sha256, wanted.record.size) == ("titan.xml", SHA, len(XML))
    assert (wanted.previews, wanted.links, wanted.warnings) == ((), {}, ())


def test_no_record_is_without_a_key(tmp_path: Path) -> None:
    keys = {wanted_of(context_in(tmp_path, record_key="", session_identifier=name)).key for name in "aab"}
    assert len(keys) == 2
    assert {len(key) for key in keys} == {32}


def test_the_create_has_what_must_be_written_at_once(wanted: Wanted) -> None:
    body = payload(wanted, 3, None)
    assert list(body) == ["title", "body", "content_type", "category", "metadata"]
    assert (body["content_type"], body["category"]) == (1, 3)
    fields = body["metadata"]["extra_fields"]
    assert fields[RECORD_KEY]["value"] == KEY
    assert fields[RECORD_KEY]["readonly"] is True
    assert fields[RECORD_KEY]["blank_value_on_duplicate"] is True
    assert fields[RECORD_SHA256]["value"] == SHA
    assert body["metadata"]["elabftw"] == {
        "display_main_text": True,
        "extra_fields_groups": [{"id": 1, "name": "Session Information"}],
    }
    assert "null" not in json.dumps(body)


def test_extra_fields(tmp_path: Path) -> None:
    links = {"cdcs": CDCS_URL, "other": "https://other.example.org/1"}
    fields = fields_of(context_in(tmp_path), links, KEY, SHA)
    assert fields["Session ID"] == {"type": "text", "value": "session 1", "position": 1, "group_id": 1}
    assert fields["Instrument"] == {"type": "text", "value": "Titan-TEM", "position": 2, "group_id": 1}
    times = {name: fields[name] for name in ("Start Time", "End Time")}
    assert {(t["type"], t["value"], t["position"], t["description"]) for t in times.values()} == {
        ("datetime-local", "2026-09-14T08:15", 3, "UTC+09:00"),
        ("datetime-local", "2026-09-14T10:45", 4, "UTC+00:00"),
    }
    assert "User" not in fields
    assert fields["CDCS Record"] == {"type": "url", "value": CDCS_URL, "position": 10, "group_id": 2}
    assert fields["other record"]["position"] == 11
    assert fields_of(context_in(tmp_path, user="Ada"), {}, KEY, SHA)["User"]["position"] == 5


@pytest.mark.parametrize(
    ("stem", "title"),
    [
        ("a", "NexusLIMS Experiment - a"),
        (" a\n\tb ", "NexusLIMS Experiment - a b"),
        ("é" * 300, "NexusLIMS Experiment - " + "é" * 232),
    ],
)
def test_titles_are_what_the_server_keeps(stem: str, title: str) -> None:
    assert title_of(stem) == title


def test_tags_are_texts_that_are_different() -> None:
    assert tags_of("NexusLIMS", None) == ("NexusLIMS",)
    assert tags_of("a|b", " ") == ("NexusLIMS", "a b")


def test_file_names_pass_a_form_unchanged() -> None:
    assert file_name('a"b\\c/d\ne é.xml') == "a_b_c_d_e é.xml"


def test_a_link_may_come_from_a_result_of_this_job(tmp_path: Path) -> None:
    good = ExportResult(success=True, destination_name="cdcs", record_url=CDCS_URL)
    bad = ExportResult(success=False, destination_name="cdcs", record_url=CDCS_URL)
    other = ExportResult(success=True, destination_name="labarchives", record_url=CDCS_URL)
    assert links_of(context_in(tmp_path, previous_results={"cdcs": good})) == {"cdcs": CDCS_URL}
    assert links_of(context_in(tmp_path, previous_results={"cdcs": bad})) == {}
    assert links_of(context_in(tmp_path, previous_results={"labarchives": other})) == {}
    assert links_of(context_in(tmp_path, previous_results={"cdcs": good}, links={"cdcs": "x"})) == {"cdcs": "x"}
    assert link_field("cdcs") == "CDCS Record"


def test_previews_are_bounded_in_number_and_size(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(MAX_PREVIEWS + 3)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    paths[1].unlink()
    with paths[2].open("wb") as file:
        file.truncate(MAX_PREVIEW_BYTES + 1)
    activity = ContextActivity((), (), tuple(paths), None, None, {})
    found = wanted_of(context_in(tmp_path, activities=[activity]))
    assert [p.name for p in found.previews] == ["0.png", *(f"{number}.png" for number in range(3, MAX_PREVIEWS))]
    assert found.warnings == (
        f"3 of {MAX_PREVIEWS + 3} previews were left out",
        "preview 1.png cannot be read: No such file or directory",
        f"preview 2.png is too large ({MAX_PREVIEW_BYTES + 1} bytes)",
    )


def test_a_record_that_is_gone_is_an_error(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    context.xml_file_path.unlink()
    with pytest.raises(OSError, match="No such file"):
        wanted_of(context)


def test_the_search_is_exact_and_sees_everything() -> None:
    query = search("0f3a", 50)
    assert query["extended"] == 'extrafield:s:"Record key":"0f3a"'
    assert (query["scope"], query["state"], query["limit"], query["full"]) == (3, "1,2,3", 50, 1)
    assert (query["order"], query["sort"]) == ("id", "asc")


# --- what is there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        (None, {}),
        ('{"a": 1}', {"a": 1}),
        (json.dumps('{"a": 1}'), {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("[1]", {}),
        ("{", {}),
    ],
)
def test_metadata_in_every_shape(metadata: Any, found: dict[str, Any]) -> None:
    assert metadata_of({"metadata": metadata}) == found


def test_extra_fields_that_php_wrote_as_a_list() -> None:
    assert field_value({"metadata": '{"extra_fields": []}'}, "x") is None
    assert field_value({"metadata": '{"extra_fields": {"x": {"value": 7}}}'}, "x") == "7"
    assert field_value({"metadata": '{"extra_fields": {"x": []}}'}, "x") is None


def test_an_experiment_is_ours_by_key_and_bytes(wanted: Wanted) -> None:
    entry = entry_of(wanted)
    assert is_ours(entry, KEY, {SHA})
    assert not is_ours(entry, KEY, {OLD})
    assert not is_ours(entry, KEY[:-1] + "_", {SHA})
    assert has_key(entry, KEY)
    assert not has_key({**entry, "created_from_id": 3}, KEY)


@pytest.mark.parametrize(("state", "found"), [(1, 1), ("3", 3), (None, 1), ("x", 1)])
def test_states(state: Any, found: int) -> None:
    assert state_of({"state": state}) == found
    assert state_of({}) == 1


def test_a_purifier_changes_what_is_stored_and_not_what_is_said() -> None:
    sent = '<h1 id="x">A &amp; b</h1>\n<p>c\r\n  d <a href="https://x/?a=1&amp;b=2">e</a></p>'
    kept = '<h1>A &#38; b</h1><p>c d <a href="https://x/?a=1&amp;b=2">e</a></p>'
    assert page_digest("t", sent) == page_digest(" t ", kept)
    assert page_digest("t", sent) != page_digest("t", kept.replace("a=1", "a=2"))
    assert page_digest("t", sent) != page_digest("t", kept.replace("c d", "c"))
    assert page_digest("t", sent) != page_digest("u", sent)
    assert stored_digest({"title": "t", "body": sent}) != stored_digest({"title": "t", "body": kept})
    assert page_digest("t", None) == page_digest("t", " ")
    assert page_digest("t", "a\0b") == page_digest("t", "a\0b")


def test_attachments_that_are_live_oldest_first() -> None:
    uploads = [upload(3), upload(2, state=2), upload(1), "?", upload(4, state=3)]
    assert [u["id"] for u in uploads_of({"uploads": uploads})] == [1, 3]
    assert uploads_of({"uploads": None}) == uploads_of({}) == []


@pytest.mark.parametrize(
    ("location", "body", "found"),
    [
        ("https://other.example:444/api/v2/experiments/17", b"", "17"),
        ("https://other.example/api/v2/experiments/17/", b"", "17"),
        ("/api/v2/experiments/17?x=9", b"", "17"),
        ("", b'{"id": 17}', "17"),
        ("https://other.example/api/v2/experiments/new", b'{"id": "17"}', "17"),
        ("https://other.example/x/\u0661\u0667", b"", None),
        ("", b"", None),
        ("", b"[17]", None),
        ("", b'{"id": "x"}', None),
    ],
)
def test_the_id_of_what_was_created(location: str, body: bytes, found: str | None) -> None:
    assert location_id(location, body) == found


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"code": 400, "message": "Bad Request", "description": "No"}', ("Bad Request: No", 400)),
        (b'{"code": 422, "message": "No", "description": ""}', ("No", 422)),
        (b'{"message": "No", "description": "No"}', ("No", None)),
        (b"<html>", ("", None)),
        (b"[]", ("", None)),
        (b'{"code": "x"}', ("", None)),
    ],
)
def test_what_an_error_says(content: bytes, found: tuple[str, int | None]) -> None:
    assert said(content) == found


# --- what it lacks ---------------------------------------------------------------------------------------------


def test_an_experiment_that_was_just_made_lacks_no_page(wanted: Wanted) -> None:
    assert plan(entry_of(wanted), wanted, Known()) == Plan()


def test_html_that_was_stored_as_markdown_is_turned_back_first(wanted: Wanted) -> None:
    todo = plan(entry_of(wanted, content_type=2), wanted, Known())
    assert list(todo.patch) == ["content_type", "body", "metadata"]
    assert todo.patch["content_type"] == 1


def test_our_own_page_is_written_anew_with_the_metadata_last(wanted: Wanted, tmp_path: Path) -> None:
    entry = entry_of(wanted)
    known = Known(frozenset({stored_digest(entry)}), notes_of(entry)["done"])
    todo = plan(entry, linked(tmp_path), known)
    assert list(todo.patch) == ["title", "body", "metadata"]
    assert isinstance(todo.patch["metadata"], str)
    assert not todo.kept


def test_our_own_page_that_was_set_to_markdown_becomes_html_first(wanted: Wanted, tmp_path: Path) -> None:
    entry = entry_of(wanted, content_type=2, body="# x")
    todo = plan(entry, linked(tmp_path), Known(frozenset({stored_digest(entry)}), notes_of(entry)["done"]))
    assert list(todo.patch) == ["content_type", "title", "body", "metadata"]


def test_a_page_is_ours_by_its_notes_when_no_answer_told_how_it_is_stored(wanted: Wanted, tmp_path: Path) -> None:
    entry = entry_of(wanted)
    entry["body"] = entry["body"].replace("</ul>", "</ul>\n")
    newer = linked(tmp_path)
    assert "body" in plan(entry, newer, Known()).patch
    # what we remember of these very notes is another page: a person has formatted it
    kept = plan(entry, newer, Known(frozenset({OLD}), notes_of(entry)["done"]))
    assert kept.kept
    assert list(kept.patch) == ["bodyappend", "metadata"]


def test_a_page_that_already_says_it_only_gets_its_notes(wanted: Wanted, tmp_path: Path) -> None:
    newer = linked(tmp_path)
    half = entry_of(wanted, title=newer.title, body=newer.body)
    todo = plan(half, newer, Known(frozenset({OLD}), notes_of(half)["done"]))
    assert list(todo.patch) == ["metadata"]
    written = json.loads(todo.patch["metadata"])["nexus_export"]
    assert (written["done"], written["page"]) == (newer.done, newer.page)


def test_a_persons_page_gets_additions_and_stays_theirs(wanted: Wanted, tmp_path: Path) -> None:
    entry = entry_of(wanted, body="<p>mine</p>")
    newer = replace(linked(tmp_path), record=replace(wanted.record, sha256="1" * 64))
    todo = plan(entry, newer, Known(frozenset({OLD}), notes_of(entry)["done"]))
    assert todo.kept
    assert todo.patch["bodyappend"].startswith("<p>NexusLIMS built this record anew: titan.xml is attached, sha256 1")
    assert todo.patch["bodyappend"].endswith(f'<p><a href="{CDCS_URL}">View in CDCS</a></p>')
    notes = json.loads(todo.patch["metadata"])["nexus_export"]
    assert (notes["done"], notes["page"]) == (newer.done, wanted.page)
    after = {**entry, "body": entry["body"] + todo.patch["bodyappend"], "metadata": todo.patch["metadata"]}
    assert plan(after, newer, Known()) == Plan(kept=True)


def test_an_experiment_without_our_notes_is_a_persons(wanted: Wanted) -> None:
    todo = plan(entry_of(wanted, body="<p>old</p>", metadata=None), wanted, Known())
    assert list(todo.patch) == ["bodyappend", "metadata"]
    assert todo.kept


def test_additions_say_nothing_twice(tmp_path: Path) -> None:
    newer = linked(tmp_path)
    assert additions(entry_of(newer), newer, markdown=False) == ""
    assert additions(entry_of(newer, body="<p>mine</p>"), newer, markdown=False) == ""
    told = f'<p>{SHA}</p><a href="{CDCS_URL.replace("&", "&amp;")}">x</a>'
    assert additions({"body": told}, newer, markdown=False) == ""
    text = additions({"body": ""}, newer, markdown=True)
    assert text == (
        f"\n\nNexusLIMS built this record anew: titan.xml is attached, sha256 {SHA}."
        f"\n\nRelated Records\n\nView in CDCS\n\n{CDCS_URL}"
    )


def test_metadata_keeps_what_is_a_persons(wanted: Wanted) -> None:
    there = merged({}, wanted, wanted.page)
    there["extra_fields"]["Instrument"]["value"] = "mine"
    there["extra_fields"]["Start Time"]["description"] = "mine too"
    there["extra_fields"][RECORD_KEY]["value"] = "broken"
    there["extra_fields"]["Mine"] = {"type": "text", "value": "x"}
    del there["extra_fields"]["User"]
    there["elabftw"] = {"display_main_text": False, "extra_fields_groups": [{"id": 1, "name": "My own name"}]}
    there["more"] = [1]
    found = merged(there, wanted, wanted.page)
    fields = found["extra_fields"]
    assert (fields["Instrument"]["value"], fields["Mine"]["value"], "User" in fields) == ("mine", "x", False)
    assert fields["Start Time"]["description"] == "UTC+09:00"
    assert fields[RECORD_KEY]["value"] == KEY
    assert found["elabftw"] == {
        "display_main_text": False,
        "extra_fields_groups": [{"id": 1, "name": "My own name"}],
    }
    assert found["more"] == [1]


def test_metadata_follows_a_newer_record(wanted: Wanted, tmp_path: Path) -> None:
    there = merged({}, wanted, wanted.page)
    newer = wanted_of(context_in(tmp_path, instrument_pid="Other-SEM", user="Ada", links={"cdcs": CDCS_URL}))
    fields = merged(there, newer, newer.page)["extra_fields"]
    assert fields["Instrument"]["value"] == "Other-SEM"
    assert fields["CDCS Record"]["value"] == CDCS_URL
    assert fields == merged({}, newer, newer.page)["extra_fields"]


def test_metadata_that_php_wrote_as_lists(wanted: Wanted) -> None:
    found = merged({"elabftw": [], "extra_fields": []}, wanted, wanted.page)
    assert found == merged({}, wanted, wanted.page)


@pytest.mark.parametrize(
    ("there", "attached"),
    [
        (upload(), True),
        (upload(hash=SHA.upper()), True),
        (upload(hash=OLD), False),
        (upload(state=2), False),
        (upload(real_name="other.xml"), False),
        (upload(hash=None), True),
        (upload(hash=None, filesize=1), False),
        (upload(hash=None, comment="mine"), False),
    ],
)
def test_a_file_is_there_by_name_and_digest(wanted: Wanted, there: dict[str, Any], *, attached: bool) -> None:
    entry = {"uploads": [there]}
    assert is_attached(entry, wanted.record) is attached
    lacks = lacking({**entry, "tags": "nexuslims|Titan-TEM|ada"}, wanted, tags=True)
    assert lacks == (Lacks() if attached else Lacks(files=(wanted.record,)))


def test_tags_that_are_missing(wanted: Wanted) -> None:
    assert missing_tags({"tags": "NEXUSLIMS|x"}, wanted) == ["Titan-TEM", "Ada"]
    assert missing_tags({"tags": None}, wanted) == ["NexusLIMS", "Titan-TEM", "Ada"]
    assert lacking({"tags": None, "uploads": [upload()]}, wanted, tags=False) == Lacks()


@pytest.mark.parametrize(
    ("there", "replaced"),
    [
        (upload(7, hash=OLD, comment=comment_of(XML_COMMENT, OLD)), True),
        (upload(7, hash=OLD, comment=comment_of(XML_COMMENT, OLD), real_name="older.xml"), True),
        (upload(7, hash=None, comment=comment_of(XML_COMMENT, OLD)), True),
        (upload(7, hash="e3b0", filesize=0), True),
        (upload(7, hash="1" * 64), False),  # our comment, another's bytes
        (upload(7, hash="2" * 64, comment=comment_of(XML_COMMENT, "2" * 64)), False),  # never sent
        (upload(7, hash=OLD, comment="mine"), False),
        (upload(7, hash=OLD, comment=comment_of(XML_COMMENT, OLD), state=2), False),
    ],
)
def test_only_our_own_file_is_replaced(wanted: Wanted, there: dict[str, Any], *, replaced: bool) -> None:
    found = replacements({"uploads": [there]}, [wanted.record], wanted, {OLD, SHA})
    assert found == ({wanted.record: "7"} if replaced else {})


def test_each_preview_takes_the_place_of_one() -> None:
    files = [File(Path("a.png"), "a.png", PREVIEW_COMMENT, digest * 64, 1) for digest in "abc"]
    record = File(Path("r.xml"), "r.xml", XML_COMMENT, SHA, 1)
    wanted = Wanted("k", "t", "b", (), {}, {}, record, tuple(files), "p", "d")

    def preview(number: int, digest: str) -> dict[str, Any]:
        comment = comment_of(PREVIEW_COMMENT, digest * 64)
        return upload(number, real_name="a.png", hash=digest * 64, comment=comment)

    entry = {"uploads": [preview(1, "a"), preview(2, "x"), upload(3, real_name="a.png", hash=OLD, comment="mine")]}
    assert replacements(entry, files[1:], wanted, {SHA}) == {files[1]: "2"}


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ({"state": 1, "locked": 0}, None),
        ({"state": 1, "locked": 1}, "locked"),
        ({"state": 1, "locked": "1"}, "locked"),
        ({"state": 2, "locked": 1}, "archived"),
        ({"state": 3}, "deleted"),
        ({}, None),
    ],
)
def test_what_stands_in_the_way(entry: dict[str, Any], code: str | None) -> None:
    found = obstacle(entry)
    assert (found[0] if found else None) == code


# --- people ----------------------------------------------------------------------------------------------------

USERS = [
    {"userid": 2, "email": "ada@example.org", "orgid": "al"},
    {"userid": 3, "email": "grace@example.org", "username": "ghopper"},
]


@pytest.mark.parametrize(
    ("names", "email", "found"),
    [
        ([], "ADA@example.org", 2),
        (["grace@example.org"], "ada@example.org", 2),
        (["GHOPPER"], None, 3),
        (["al"], "nobody@example.org", 2),
        (["grace@example.org"], None, 3),
        (["ada"], None, None),
        ([], None, None),
    ],
)
def test_a_user_is_found_by_address_then_by_name(names: list[str], email: str | None, found: int | None) -> None:
    assert match_user(USERS, names, email) == found


def test_the_names_of_the_sessions_user(tmp_path: Path) -> None:
    reserved = Reservation(username="al", user_email="ada@example.org")
    assert session_names(context_in(tmp_path, user="Ada", reservation_event=reserved)) == (
        ["al", "Ada"],
        "ada@example.org",
    )
    assert session_names(context_in(tmp_path)) == ([], None)


@pytest.mark.parametrize(
    "text",
    ["ada,2\ngrace, 3\n", "username,userid\nada,2\n\ngrace,3\n", '{"ada": 2, "grace": "3"}', "\ufeffada,2\ngrace,3"],
)
def test_users_of_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "users"
    path.write_text(text, encoding="utf-8")
    assert read_users(path) == {"ada": 2, "grace": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"ada\n", "the line 'ada' is not 'username,userid'"),
        (b"ada,2\ngrace,three\n", "'grace' has 'three' instead of the number"),
        (b'{"ada": true}', "'ada' has True instead of the number"),
        (b'{"ada": ', "is neither CSV nor JSON"),
        (b"\xff\xfe", "is neither CSV nor JSON in UTF-8"),
    ],
)
def test_a_users_file_that_is_wrong(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "users"
    path.write_bytes(content)
    with pytest.raises(Misconfigured, match="NX_ELABFTW_USERS_FILE") as caught:
        read_users(path)
    assert words in str(caught.value)


def test_rights_get_one_user_more() -> None:
    kept = json.loads(with_user('{"base": 30, "teams": [1], "users": [4]}', 2))
    assert kept == {"base": 30, "teams": [1], "users": [4, 2]}
    assert json.loads(with_user({"users": [2]}, 2))["users"] == [2]
    assert json.loads(with_user(None, 2)) == {"teams": [], "teamgroups": [], "users": [2]}
    assert json.loads(with_user("{", 2))["users"] == [2]


@pytest.mark.parametrize(
    ("text", "found"), [("5.3.6", (5, 3)), ("6.0.0-alpha4", (6, 0)), ("5.10.1", (5, 10)), ("", (0, 0))]
)
def test_versions(text: str, found: tuple[int, int]) -> None:
    assert version_of({"elabftw_version": text}) == found
