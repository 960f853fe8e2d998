"""What is taken for a record.built, what is refused and how the sentence says why, and what goes out."""

import json
import uuid
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from consumer.errors import PoisonEventError
from consumer.events import (
    BUILT,
    EXPORT_FAILED,
    EXPORTED,
    BuiltEvent,
    Cause,
    DestinationResult,
    Outcome,
    RecordBuilt,
    RecordByPath,
    RecordInline,
    built_body,
    job_id,
    outcome_body,
    outcome_id,
    outcome_type,
    parse_built,
    read_moment,
    restore_built,
)
from tests.unit.builders import NOW, SHA, built, document, record

STRUCTURED = "application/cloudevents+json"
Headers = dict[str, Any]


def parse(event: Any, content_type: str | None = STRUCTURED, headers: Headers | None = None) -> BuiltEvent:
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    return parse_built(body, content_type=content_type, headers=headers or {})


def refused(event: Any, content_type: str | None = STRUCTURED, headers: Headers | None = None) -> PoisonEventError:
    with pytest.raises(PoisonEventError) as caught:
        parse(event, content_type, headers)
    return caught.value


def headers_of(event: dict[str, Any], prefix: str) -> Headers:
    return {prefix + name: value for name, value in event.items() if name != "data"}


# --- content modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content_type", [STRUCTURED, f"{STRUCTURED}; charset=utf-8", "application/json", None, "x"])
def test_structured_mode_needs_no_content_type(content_type: str | None) -> None:
    event = parse(document(), content_type)
    assert (event.source, event.id) == ("urn:test:builder", "event-1")
    assert event.time == datetime(2026, 11, 24, 11, tzinfo=UTC)
    assert event.data.session_identifier == "session-1"
    assert event.data.record == RecordByPath(path="2026/titan.xml", sha256=SHA, size=7)
    assert event.traceparent is None


def test_a_structured_body_is_kept_as_it_came() -> None:
    body = json.dumps(document(extension="kept"), indent=3, ensure_ascii=False).encode()
    assert parse(body).text == body.decode()


@pytest.mark.parametrize("prefix", ["cloudEvents_", "cloudEvents:"])
@pytest.mark.parametrize("content_type", ["application/json", None])
def test_binary_mode_is_the_same_event(prefix: str, content_type: str | None) -> None:
    whole = document(traceparent="00-ab-cd-01", subject="session-1")
    event = parse(whole["data"], content_type, headers_of(whole, prefix))
    same = parse(whole)
    assert (event.source, event.id, event.time, event.data) == (same.source, same.id, same.time, same.data)
    assert (event.data_sha256, event.traceparent) == (same.data_sha256, "00-ab-cd-01")
    assert json.loads(event.text) == whole, "stored as one structured document"


def test_binary_mode_with_a_time_of_amqp() -> None:
    whole = document(time=NOW)
    assert parse(whole["data"], None, headers_of(whole, "cloudEvents_")).time == NOW


def test_headers_beside_a_structured_event_do_not_count() -> None:
    other = headers_of(document(id="other"), "cloudEvents_")
    assert parse(document(), None, other).id == "event-1"


def test_the_routing_key_is_not_asked() -> None:
    assert refused(document(type="record.deleted")).code == "unknown_type"


# --- what data may hold ------------------------------------------------------------------------------------------


def test_everything_that_data_may_hold() -> None:
    data = {
        "instrument_pid": "FEI-Titan-TEM",
        "dt_from": "2026-11-24T09:00:00+01:00",
        "dt_to": "2026-11-24T17:00:00.5Z",
        "user": "ada",
        "metadata": {"a": [1, {"b": None}]},
        "activities": [
            {"files": ["a.dm3"], "previews": ["a.png", None], "start": "2026-11-24T09:00:00Z", "setup": {"kV": 200}}
        ],
        "reservation": {"username": "ada", "samples": [{"id": 1}], "purpose": "x"},
        "destinations": ["cdcs"],
        "strategy": "best_effort",
    }
    event = built(data)
    assert event.data.dt_from == datetime(2026, 11, 24, 9, tzinfo=timezone(timedelta(hours=1)))
    assert event.data.activities[0].previews == ("a.png", None)
    assert event.data.activities[0].setup == {"kV": 200}
    assert event.data.reservation is not None
    assert event.data.reservation.samples == ({"id": 1},)
    assert event.data.destinations == ("cdcs",)


def test_an_inline_record() -> None:
    event = built({"record": {"name": "a.xml", "content": "<a/>", "sha256": SHA.upper(), "size": 4}})
    assert event.data.record == RecordInline(name="a.xml", content="<a/>", sha256=SHA, size=4)


def test_what_nobody_knows_is_ignored_and_kept() -> None:
    event = built({"colour": "red", "record": record(owner="ada")}, partitionkey="7")
    assert not hasattr(event.data, "colour")
    kept = json.loads(event.text)
    assert (kept["partitionkey"], kept["data"]["colour"]) == ("7", "red")


def test_other_data_has_another_digest_and_the_same_data_the_same() -> None:
    plain = built({"metadata": {"a": 1, "b": 2}})
    assert plain.data_sha256 == built({"metadata": {"b": 2, "a": 1}}, id="other").data_sha256
    assert plain.data_sha256 != built({"metadata": {"a": 1, "b": 3}}).data_sha256
    assert plain.data_sha256 != built({"metadata": {"a": 1, "b": 2}, "unknown": 1}).data_sha256


@pytest.mark.parametrize("length", [1, 255])
def test_a_session_may_be_this_long(length: int) -> None:
    assert built({"session_identifier": "é" * length}).data.session_identifier == "é" * length


# --- what is refused ---------------------------------------------------------------------------------------------

WRONG_DATA = [
    ({"session_identifier": None}, "data.session_identifier: "),
    ({"session_identifier": ""}, "data.session_identifier: "),
    ({"session_identifier": "x" * 256}, "data.session_identifier: "),
    ({"session_identifier": 7}, "data.session_identifier: "),
    ({"record": None}, "data.record: "),
    ({"record": "a.xml"}, "data.record: "),
    ({"record": {"sha256": SHA, "size": 1}}, "data.record.path: Field required"),
    ({"record": {"path": "a.xml", "size": 1}}, "data.record.sha256: Field required"),
    ({"record": {"path": "a.xml", "sha256": SHA}}, "data.record.size: Field required"),
    ({"record": record(path="")}, "data.record.path: "),
    ({"record": record(path=["a"])}, "data.record.path: "),
    ({"record": record(sha256="ab" * 31)}, "data.record.sha256: "),
    ({"record": record(sha256="xy" * 32)}, "data.record.sha256: "),
    ({"record": record(size=-1)}, "data.record.size: "),
    ({"record": record(size="7")}, "data.record.size: "),
    ({"record": record(size=7.0)}, "data.record.size: "),
    ({"record": record(size=True)}, "data.record.size: "),
    ({"record": {"content": "<a/>", "sha256": SHA, "size": 4}}, "data.record.name: Field required"),
    ({"record": {"content": 4, "name": "a.xml", "sha256": SHA, "size": 4}}, "data.record.content: "),
    ({"dt_from": "2026-11-24T09:00:00"}, "data.dt_from: Input should have timezone info"),
    ({"dt_from": "2026-11-24"}, "data.dt_from: must be an RFC 3339 text with a zone"),
    ({"dt_from": 0}, "data.dt_from: must be an RFC 3339 text with a zone"),
    ({"dt_from": "0"}, "data.dt_from: must be an RFC 3339 text with a zone"),
    ({"dt_to": 1.5}, "data.dt_to: must be an RFC 3339 text with a zone"),
    ({"dt_to": "2026-13-24T09:00:00Z"}, "data.dt_to: "),
    ({"user": 7}, "data.user: "),
    ({"metadata": []}, "data.metadata: "),
    ({"activities": {}}, "data.activities: "),
    ({"activities": [{"files": ["a", 7]}]}, "data.activities.0.files.1: "),
    ({"activities": [{}, {"previews": [{}]}]}, "data.activities.1.previews.0: "),
    ({"activities": [{"start": "soon"}]}, "data.activities.0.start: must be an RFC 3339 text with a zone"),
    ({"activities": [{"path": 1, "setup": 7}]}, "data.activities.0.setup: "),
    ({"reservation": {"username": 7}}, "data.reservation.username: "),
    ({"destinations": []}, "data.destinations: "),
    ({"destinations": "cdcs"}, "data.destinations: "),
    ({"destinations": [""]}, "data.destinations.0: "),
    ({"strategy": 7}, "data.strategy: "),
]


@pytest.mark.parametrize(("data", "sentence"), WRONG_DATA, ids=[f"{d}"[:60] for d, _ in WRONG_DATA])
def test_wrong_data_is_named(data: dict[str, Any], sentence: str) -> None:
    error = refused(document(data))
    assert error.code == "invalid_data"
    assert str(error).startswith(sentence)
    assert "\n" not in str(error)
    assert (error.source, error.event_id) == ("urn:test:builder", "event-1")


WRONG_ENVELOPES: list[tuple[dict[str, Any], str]] = [
    ({"specversion": "0.3"}, "specversion: "),
    ({"specversion": 1.0}, "specversion: "),
    ({"id": None}, "id: "),
    ({"id": ""}, "id: "),
    ({"id": 7}, "id: "),
    ({"id": "x" * 513}, "id: "),
    ({"source": ""}, "source: "),
    ({"source": "x" * 1025}, "source: "),
    ({"type": ""}, "type: "),
    ({"type": None}, "type: "),
    ({"time": "2026-11-24T11:00:00"}, "time: Input should have timezone info"),
    ({"time": 1700000000}, "time: must be an RFC 3339 text with a zone"),
    ({"time": "1700000000"}, "time: must be an RFC 3339 text with a zone"),
    ({"time": ""}, "time: must be an RFC 3339 text with a zone"),
    ({"time": "0001-01-01T00:00:00+23:59"}, "time: must be a time between the years 1 and 9999 in UTC"),
    ({"time": "9999-12-31T23:59:59-23:59"}, "time: must be a time between the years 1 and 9999 in UTC"),
    ({"subject": 7}, "subject: "),
    ({"traceparent": {}}, "traceparent: "),
]


@pytest.mark.parametrize(("envelope", "sentence"), WRONG_ENVELOPES, ids=[f"{e}"[:60] for e, _ in WRONG_ENVELOPES])
def test_a_wrong_envelope_is_named(envelope: dict[str, Any], sentence: str) -> None:
    error = refused(document(**envelope))
    assert error.code == "not_cloudevent"
    assert str(error).startswith(sentence)
    assert error.session == "session-1"


@pytest.mark.parametrize("name", ["id", "source", "type"])
def test_a_missing_attribute_is_named(name: str) -> None:
    whole = document()
    del whole[name]
    assert str(refused(whole)) == f"{name}: Field required"


@pytest.mark.parametrize("data", [None, "text", 7, [], [document()]])
def test_data_must_be_an_object(data: Any) -> None:
    error = refused({**document(), "data": data})
    assert error.code == "invalid_data"
    assert str(error).startswith("data: Input should be a valid dictionary")
    error = refused({name: value for name, value in document().items() if name != "data"})
    assert str(error).startswith("data: ")


def test_an_unknown_type_says_what_is_taken() -> None:
    error = refused(document(type="record.exported"))
    assert error.code == "unknown_type"
    assert str(error) == "type is 'record.exported'; this queue takes 'record.built'"
    assert error.session == "session-1"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0",
        b"{",
        b"not JSON",
        b"\xff\xfe",
        "ünïcode".encode("latin-1"),
        b"{} {}",
        b"\xef\xbb\xbf{}",
        b'{"a":1,}',
    ],
)
def test_what_is_no_json(body: bytes) -> None:
    error = refused(body)
    assert error.code == "not_json"
    assert str(error).startswith("the body is not JSON: ")
    assert (error.source, error.event_id, error.session) == (None, None, None)


def test_a_binary_event_whose_body_is_no_json_can_still_be_named() -> None:
    error = refused(b"{", None, headers_of(document(subject="session-1"), "cloudEvents_"))
    assert error.code == "not_json"
    assert (error.source, error.event_id, error.session) == ("urn:test:builder", "event-1", "session-1")


def test_json_without_specversion_is_no_event_but_can_be_named() -> None:
    whole = document()
    del whole["specversion"]
    error = refused(whole, "application/json")
    assert error.code == "not_cloudevent"
    assert "specversion" in str(error)
    assert (error.source, error.event_id, error.session) == ("urn:test:builder", "event-1", "session-1")
    assert refused(document()["data"], "application/json").session == "session-1"


@pytest.mark.parametrize("body", [b"[]", b"7", b'"text"', b"null", b"true"])
def test_json_that_is_no_object(body: bytes) -> None:
    assert refused(body).code == "not_cloudevent"


def test_a_batch_is_no_event() -> None:
    assert refused([document()], "application/cloudevents-batch+json").code == "not_cloudevent"
    headers = headers_of(document(), "cloudEvents_")
    assert refused([document()], "application/cloudevents-batch+json", headers).code == "not_cloudevent"


def test_a_builder_is_told_by_the_subject_when_the_session_cannot_be_read() -> None:
    error = refused(document({"session_identifier": 7}, subject="session-9"))
    assert error.session == "session-9"


@pytest.mark.parametrize(
    ("data", "envelope"),
    [
        ({"session_identifier": "a\0b"}, {}),
        ({"metadata": {"a": ["b", {"c": "\0"}]}}, {}),
        ({"metadata": {"a\0": 1}}, {}),
        ({"unknown": "\0"}, {}),
        ({}, {"id": "a\0"}),
        ({}, {"extension": "a\0"}),
    ],
)
def test_nul_is_refused_wherever_it_is(data: dict[str, Any], envelope: dict[str, Any]) -> None:
    error = refused(document(data, **envelope))
    assert (error.code, str(error)) == ("invalid_text", "a text holds a NUL character")
    for known in (error.source, error.event_id, error.session):
        assert known is None or "\0" not in known


def test_nul_in_a_header_of_a_binary_event_is_refused() -> None:
    whole = document(id="a\0b")
    assert refused(whole["data"], None, headers_of(whole, "cloudEvents_")).code == "invalid_text"


def test_a_raw_nul_is_no_json() -> None:
    assert refused(json.dumps(document()).replace("session-1", "a\0b").encode()).code == "not_json"


def test_a_backslash_before_u0000_is_ordinary_text() -> None:
    assert built({"session_identifier": "a\\u0000"}).data.session_identifier == "a\\u0000"


@pytest.mark.parametrize("escape", ["\\ud800", "\\udfff", "\\ud800\\ud800", "\\ud800x"])
def test_a_lone_surrogate_is_refused(escape: str) -> None:
    assert refused(json.dumps(document()).replace("session-1", escape).encode()).code == "not_json"


def test_a_surrogate_pair_is_a_character() -> None:
    body = json.dumps(document()).replace("session-1", "\\ud83d\\ude00").encode()
    assert parse(body).data.session_identifier == "\N{GRINNING FACE}"


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"specversion":"1.0","data":{"metadata":{"a":' + b"["])
def test_200_kb_of_nesting(opening: bytes) -> None:
    assert refused(opening * (200_000 // len(opening))).code == "not_json"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have(number: str) -> None:
    body = json.dumps(document({"metadata": {"a": "here"}})).replace('"here"', number).encode()
    assert refused(body).code == "not_json"


@pytest.mark.parametrize("digits", [19, 20, 400, 4300])
def test_huge_integers_are_taken_where_they_are_allowed(digits: int) -> None:
    body = json.dumps(document({"metadata": {"a": "here"}})).replace('"here"', "9" * digits).encode()
    event = parse(body)
    assert event.data.metadata["a"] == int("9" * digits)
    assert restore_built(event.text).data == event.data


@pytest.mark.parametrize("digits", [4301, 100_000])
def test_integers_that_python_cannot_write_are_refused(digits: int) -> None:
    body = json.dumps(document({"metadata": {"a": "here"}})).replace('"here"', "9" * digits).encode()
    assert refused(body).code == "not_json"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*RecordBuilt.model_fields, "path", "content", "sha256", "size", "files", "start", "x"])
data_objects = st.dictionaries(fields, json_values, max_size=6)
odd_events = st.builds(
    lambda changes, data: {**document(), **changes, "data": {**document()["data"], **data}},
    st.dictionaries(st.sampled_from(["id", "source", "type", "time", "specversion", "subject"]), json_values),
    data_objects,
)


def never_raises_anything_else(body: bytes, content_type: str | None, headers: Headers) -> None:
    try:
        event = parse_built(body, content_type=content_type, headers=headers)
    except PoisonEventError as error:
        poison = error
    else:
        same_again(event)
        return
    assert poison.code in {"not_json", "not_cloudevent", "unknown_type", "invalid_text", "invalid_data"}
    assert str(poison)


def same_again(event: BuiltEvent) -> None:
    again = restore_built(event.text)
    assert (again.data, again.id, again.source, again.time) == (event.data, event.id, event.source, event.time)
    assert again.job_id == event.job_id


@given(st.binary(max_size=200))
def test_any_bytes_end_in_an_event_or_a_poison(body: bytes) -> None:
    never_raises_anything_else(body, None, {})


@settings(max_examples=200, deadline=None)
@given(odd_events | json_values)
def test_any_json_ends_in_an_event_or_a_poison(event: Any) -> None:
    never_raises_anything_else(json.dumps(event).encode(), STRUCTURED, {})


header_values: st.SearchStrategy[Any] = (
    st.none() | st.text(max_size=8) | st.binary(max_size=8) | st.integers() | st.datetimes() | st.just({})
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.builds(
            "".join,
            st.tuples(
                st.sampled_from(["cloudEvents_", "cloudEvents:", ""]),
                st.sampled_from(["id", "source", "type", "specversion", "time", "subject"]),
            ),
        ),
        header_values | st.sampled_from(["1.0", BUILT, "2026-11-24T11:00:00Z"]),
    ),
    json_values,
)
def test_any_headers_end_in_an_event_or_a_poison(headers: Headers, data: Any) -> None:
    never_raises_anything_else(json.dumps(data).encode(), None, headers)


zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@settings(max_examples=200, deadline=None)
@given(st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=zones), data_objects)  # noqa: DTZ001
def test_what_was_accepted_is_restored_equal(time: datetime, metadata: dict[str, Any]) -> None:
    assume("\\u0000" not in json.dumps(metadata))
    event = built({"metadata": metadata, "dt_from": time.isoformat()}, time=time.isoformat())
    assert event.time == event.data.dt_from == time
    same_again(event)


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-24t11:00:00z",
        "2026-11-24 11:00:00Z",
        "2026-11-24T11:00Z",
        "2026-11-24T11:00:00.123456789Z",
        "2026-11-24T12:00:00+0100",
        "2026-11-24T10:00:00\N{MINUS SIGN}01:00",
    ],
)
def test_every_way_to_write_a_time_that_is_taken_is_also_restored(text: str) -> None:
    event = built(time=text)
    assert event.time is not None
    assert event.time.replace(microsecond=0) == datetime(2026, 11, 24, 11, tzinfo=UTC)
    assert restore_built(event.text).time == event.time


def test_without_a_time() -> None:
    event = built(time=None)
    assert event.time is None
    assert restore_built(event.text).time is None


def test_a_long_event_is_restored_too() -> None:
    event = built({"metadata": {"long": "x" * 20_000}})
    assert restore_built(event.text).data == event.data


def test_read_moment() -> None:
    assert read_moment("2026-11-24T12:00:00Z") == NOW
    for text in ("2026-11-24T12:00:00", "12", "", "9999-12-31T23:59:59-01:00"):
        with pytest.raises(ValueError, match=r"zone|UTC"):
            read_moment(text)


# --- names -------------------------------------------------------------------------------------------------------


def test_a_job_has_the_same_name_for_ever() -> None:
    """These are in databases and in dead letters: they may never change."""
    name = job_id("urn:nexuslims:titan", "7f3c")
    assert name == uuid.UUID("10c54ece-3522-5ee3-9569-e83207903013")
    assert name == uuid.uuid5(uuid.uuid5(uuid.NAMESPACE_URL, "urn:nexuslims:titan"), "7f3c")
    assert outcome_id(name, 1) == uuid.UUID("dc861ada-5077-59c5-b6c0-fc3e69ad9169")
    assert outcome_id(name, 2) == uuid.UUID("c92647a0-ddf0-5a61-a323-3b0d6bac9272")


def test_names_differ_by_source_and_id() -> None:
    names = {job_id(source, name) for source in ("a", "b", "ab") for name in ("a", "b", "ab")}
    assert len(names) == 9
    assert built().job_id == job_id("urn:test:builder", "event-1")


# --- what goes out -----------------------------------------------------------------------------------------------


def outcome(**changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "session_identifier": "session-1",
        "status": "COMPLETED",
        "revision": 2,
        "strategy": "all",
        "cause": Cause(source="urn:test:builder", id="event-1"),
        "user": "ada",
        "dt_from": NOW,
        "record": record(),
        "results": (
            DestinationResult(
                destination="cdcs", success=True, action="created", record_id="17", attempts=2, timestamp=NOW,
                metadata={"a": float("nan"), "b": ["ü", None]},
            ),
            DestinationResult(destination="labarchives", success=False, error_code="x", next_action="replay"),
        ),
    }  # fmt: skip
    return Outcome(**{**values, **changes})


def refuse_constant(name: str) -> None:
    pytest.fail(f"{name} is no JSON")


@pytest.mark.parametrize(("status", "kind"), [("COMPLETED", EXPORTED), ("BUILT_NOT_EXPORTED", EXPORT_FAILED)])
def test_an_outcome_is_a_structured_event(status: str, kind: str) -> None:
    told = outcome(status=status)
    body = outcome_body(told, event_id="id-1", source="urn:me", time=NOW, traceparent="00-ab-cd-01")
    event = json.loads(body, parse_constant=refuse_constant)
    assert outcome_type(told) == kind
    data = event.pop("data")
    assert event == {
        "specversion": "1.0",
        "id": "id-1",
        "source": "urn:me",
        "type": kind,
        "subject": "session-1",
        "time": "2026-11-24T12:00:00Z",
        "datacontenttype": "application/json",
        "dataschema": f"urn:nexus-export:schema:{kind}:1",
        "traceparent": "00-ab-cd-01",
    }
    assert set(data) == set(Outcome.model_fields)
    expected = told.model_copy(
        update={
            "results": (
                told.results[0].model_copy(update={"metadata": {"a": None, "b": ["ü", None]}}),
                told.results[1],
            )
        }
    )
    assert Outcome.model_validate(data) == expected


def test_the_same_outcome_is_the_same_bytes() -> None:
    first, second = (
        outcome_body(outcome(), event_id="id-1", source="urn:me", time=NOW, traceparent=None) for _ in range(2)
    )
    assert first == second
    assert b"traceparent" not in first


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_success_is_a_truth_value_and_nothing_like_one(value: Any) -> None:
    with pytest.raises(ValidationError):
        DestinationResult(destination="cdcs", success=value)


def test_what_a_builder_writes_is_taken() -> None:
    data = built({"user": "ada", "destinations": ["cdcs"], "activities": [{"files": ["a"]}]}).data
    body = built_body(data, event_id="7", source="urn:me", time=NOW, traceparent="00-ab-cd-01")
    event = parse(body)
    assert (event.data, event.id, event.source, event.time) == (data, "7", "urn:me", NOW)
    assert event.traceparent == "00-ab-cd-01"
    assert json.loads(body)["dataschema"] == "urn:nexus-export:schema:record.built:1"
    assert json.loads(body)["subject"] == "session-1"
