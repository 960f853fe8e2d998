"""The rules about CDCS that need no CDCS: titles, texts, messages, what is picked from its lists."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from consumer.config import Environment, Value
from consumer.destinations.cdcs import Cdcs
from consumer.destinations.cdcs_rules import (
    TITLE_LENGTH,
    Record,
    choose_template,
    find_user,
    known_id,
    lacks_right,
    our_hashes,
    record_text,
    record_title,
    refusal_code,
    said,
    stored_record,
)
from consumer.destinations.contract import ExportContext, LastExport
from consumer.errors import Misconfigured, Permanent

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def context(**changes: Any) -> ExportContext:
    return ExportContext(Path("a.xml"), "session", "instrument", NOW, NOW, **changes)


@pytest.mark.parametrize("stem", ["2026-11-24_FEI-Titan_00001", "a b", "Ångström (2)", "x" * 200, "v1.2"])
def test_an_ordinary_title_is_the_file_name(stem: str) -> None:
    assert record_title(stem) == stem


def test_a_title_is_trimmed_as_cdcs_does_it() -> None:
    assert record_title(" padded ") == "padded"


@pytest.mark.parametrize("stem", ["x" * 201, "ü" * 120, "cost$", "a\\..\\b", "two\nlines", "...", "?", "\udcff"])
def test_a_title_that_cdcs_could_not_keep_or_find_gets_a_digest(stem: str) -> None:
    title = record_title(stem)
    assert title != stem
    assert title == record_title(stem)
    assert len(title.encode()) <= TITLE_LENGTH
    assert "$" not in title


def test_long_titles_with_the_same_beginning_stay_apart() -> None:
    assert record_title("x" * 210 + "a") != record_title("x" * 210 + "b")
    assert record_title("a$b") != record_title("a_b") != record_title("a\\b")


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=300))
def test_every_title_is_one_that_cdcs_keeps(stem: str) -> None:
    title = record_title(stem)
    assert 0 < len(title.encode()) <= TITLE_LENGTH
    assert title == title.strip()
    assert title.isprintable()
    assert not set(title) & set("$/\\")


@pytest.mark.parametrize("content", ["<a/>\r\n", "\ufeff<a>µ</a>", '<?xml version="1.0" encoding="utf-8"?><a/>'])
def test_the_text_has_the_bytes_of_the_record(content: str) -> None:
    assert record_text(content.encode()).encode() == content.encode()


def test_another_declared_encoding_of_plain_text_is_kept() -> None:
    content = b"<?xml version='1.0' encoding='ISO-8859-1'?><a/>"
    assert record_text(content).encode() == content


@pytest.mark.parametrize(
    "content",
    [
        "<a>µ</a>".encode("latin-1"),
        "<a/>".encode("utf-16"),
        b'<?xml version="1.0" encoding="UTF-16"?><a/>',
        b'\xef\xbb\xbf<?xml version="1.0" encoding = "utf-16le"?><a/>',
    ],
)
def test_what_is_no_utf8_is_refused(content: bytes) -> None:
    with pytest.raises(Permanent) as caught:
        record_text(content)
    assert caught.value.code == "record_encoding"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Element '{ns}x': This element is not expected. Expected is ( {ns}summary )., line 5", "record_invalid"),
        ("Element '{ns}a': 'x' is not a valid value of the atomic type 'xs:dateTime'., line 8", "record_invalid"),
        ("Element 'a', attribute 'b': The attribute 'b' is not allowed., line 1", "record_invalid"),
        ("Element 'a': No matching global declaration available for the validation root., line 1", "record_invalid"),
        ("expected '>', line 13, column 44 (<string>, line 13)", "record_malformed"),
        ("Document is empty, line 1, column 1 (<string>, line 1)", "record_malformed"),
        ("entities are disabled", "rejected"),
        ('invalid input syntax for type json\nDETAIL:  Token "NaN" is invalid.', "rejected"),
        ("CHECK constraint failed: JSON_VALID", "rejected"),
        ("string is too long for tsvector (1048610 bytes, max 1048575 bytes)", "rejected"),
        ("JSON parse error - Expecting value: line 1 column 2 (char 1)", "rejected"),
        ("Could not derive file name from '..'", "rejected"),
    ],
)
def test_a_message_about_the_record_is_a_refusal(message: str, code: str) -> None:
    assert refusal_code(message) == code
    assert not lacks_right(message)


@pytest.mark.parametrize(
    "message",
    [
        "",
        "server closed the connection unexpectedly\n\tThis probably means the server terminated abnormally",
        "[Errno 28] No space left on device",
        "database is locked",
        "could not connect: Connection refused",
    ],
)
def test_other_messages_are_no_refusal(message: str) -> None:
    assert refusal_code(message) is None
    assert not lacks_right(message)


def test_a_missing_right_is_known_by_its_message() -> None:
    assert lacks_right("The user doesn't have enough rights to publish.")
    assert lacks_right("The user does not have the permission to write into this workspace.")
    assert lacks_right("You do not have permission to perform this action.")
    assert not lacks_right("Invalid token.")


def test_what_an_error_answer_says() -> None:
    assert said(b'{"detail": "Invalid token."}') == {"detail": "Invalid token."}
    assert said(b'{"message": {"title": ["too long"]}}') == {"message": '{"title": ["too long"]}'}
    assert said(b"<html>") == said(b"[1]") == said(b"\xff") == said(b"") == {}


def template(title: str, current: str | None, *versions: str, disabled: bool = False) -> dict[str, Any]:
    return {"id": 1, "title": title, "current": current, "versions": list(versions), "is_disabled": disabled}


def test_the_template_is_chosen_by_title_and_never_by_place() -> None:
    chosen = choose_template([template("Another", "1", "1"), template("Nexus", "3", "2", "3")], "Nexus")
    assert (chosen.current, chosen.versions) == ("3", ("2", "3"))


def test_a_missing_template_is_told_with_those_there_are() -> None:
    with pytest.raises(Misconfigured, match=r"'Nexus' in use; there are: 'Another', 'B'.*NX_CDCS_TEMPLATE_TITLE"):
        choose_template([template("B", "1"), template("Another", "2")], "Nexus")
    with pytest.raises(Misconfigured, match="none at all"):
        choose_template([template("Nexus", "1", disabled=True), template("Nexus", None)], "Nexus")


def test_users_are_found_by_name_and_else_by_address() -> None:
    users = [
        {"id": 1, "username": "admin", "email": ""},
        {"id": 2, "username": "other", "email": "Jo@X.org"},
        {"id": 3, "username": "jo", "email": "z@x.org"},
    ]
    assert find_user(users, "jo", "jo@x.org") == 3
    assert find_user(users, "joanna", "jo@x.org") == 2
    assert find_user(users, "joanna", "") is None
    assert find_user(users, "joanna", None) is None


def test_a_record_as_cdcs_answers_it() -> None:
    sha256 = "961b6dd3ede3cb8ecbaacbd68de040cd78eb2ed5889130cceb4c49268ea4d506"
    answer = {"id": 7, "title": "t", "template": 3, "workspace": 1, "xml_content": "aa"}
    assert stored_record(answer) == Record("7", "t", "3", 1, sha256)
    newer = {"id": "7", "title": "t", "template": "3", "workspace": None, "content": "aa"}
    assert stored_record(newer) == Record("7", "t", "3", None, sha256)
    without = stored_record({"id": 7, "xml_content": None})
    assert without is not None
    assert without.sha256 is None
    nothings: list[Any] = [{"title": "t"}, {"id": ""}, {"id": None}, [], None]
    assert [stored_record(nothing) for nothing in nothings] == [None] * len(nothings)


def test_our_record_is_the_one_last_exported_or_remembered() -> None:
    last = LastExport("7", None, "sent", "stored")
    assert known_id(context()) is None
    assert known_id(context(remembered={"record_id": 9})) == "9"
    assert known_id(context(remembered={"record_id": "9"}, last_export=last)) == "7"
    assert our_hashes(context(last_export=last, sent_hashes=frozenset({"x"}))) == {"sent", "stored"}
    assert our_hashes(context(last_export=LastExport("7", None, None, None))) == frozenset()
    assert our_hashes(context(sent_hashes=frozenset({"x"}))) == {"x"}


def test_settings_come_from_nexuslims_names() -> None:
    names = {"NX_CDCS_URL": "https://cdcs.example.org", "NX_CDCS_TOKEN": " abc ", "NX_CERT_BUNDLE": "pem"}
    names["NX_CDCS_USERS_FILE"] = "/etc/nexus/users.csv"
    settings = Environment({name: Value(text, "test") for name, text in names.items()}).read(
        Cdcs.Settings, "NX_CDCS_"
    )
    assert settings.url == "https://cdcs.example.org/"
    assert settings.token == SecretStr("abc")
    assert settings.cert_bundle == "pem"
    assert settings.users_file == Path("/etc/nexus/users.csv")
    assert (settings.user_owned_records, settings.assign_to_public_workspace) == (False, True)
    assert Cdcs(settings).enabled


def test_a_token_with_more_in_it_is_refused_without_showing_it() -> None:
    with pytest.raises(ValidationError, match="give the token alone") as caught:
        Cdcs.Settings(token=SecretStr("Token secret"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (Cdcs.Settings(), "NX_CDCS_TOKEN not configured"),
        (Cdcs.Settings(token=SecretStr(" ")), "NX_CDCS_TOKEN is empty"),
        (Cdcs.Settings(token=SecretStr("t")), "NX_CDCS_URL not configured"),
        (Cdcs.Settings(token=SecretStr("t"), url=""), "NX_CDCS_URL is empty"),
    ],
)
async def test_what_is_not_configured_is_named(settings: Cdcs.Settings, missing: str) -> None:
    destination = Cdcs(settings)
    assert not destination.enabled
    assert await destination.validate_config() == (False, missing)
    with pytest.raises(Misconfigured, match=missing):
        await destination.export(context())
    with pytest.raises(Misconfigured, match=missing):
        await destination.verify(context())
