"""The tables of faults, and the parts of the conformance kit that need no server."""

import asyncio
import re
from pathlib import Path

import pytest

from consumer.commands.new_destination import files_of
from consumer.telemetry import get_logger
from consumer.testing.conformance import GRADES, Report
from consumer.testing.conformance_cases import Done, Shape, known_faults, plan
from consumer.testing.conformance_play import Problem
from consumer.testing.conformance_subject import Probe, filled, make_context, make_record
from consumer.testing.conformance_watch import Secrets, case_name
from consumer.testing.conformance_wire import Seen as Request
from consumer.testing.disk_faults import _INJECTED, DISK_FAULTS
from consumer.testing.fault_strikes import STRIKES
from consumer.testing.faults import BY_NAME, FAULTS, Fault, Seen
from consumer.testing.wire import HEAD_LIMIT, Answer, NotHttpError, parse_answer, read_request

ENDINGS = {Seen.SUCCESS, Seen.TRANSIENT, Seen.UNKNOWN, Seen.PERMANENT, Seen.MISCONFIGURED}
ANSWERS = {Seen.PRESENT, Seen.PARTIAL, Seen.ABSENT, Seen.UNSURE, *(ENDINGS - {Seen.SUCCESS})}
SHAPE = Shape(
    [
        Request("GET", "/templates", "read", "", 200, ""),
        Request("POST", "/items", "write", "", 201, ""),
        Request("GET", "/items/17", "read", "", 200, ""),
        Request("GET", "/items/18", "read", "", 200, ""),
        Request("GET", "/items/19", "read", "", 200, ""),
        Request("POST", "/items/17/files", "write", "", 201, ""),
    ],
    [Request("POST", "/search", "write", "", 200, "")],
    [Request("GET", "/items/17", "read", "", 200, ""), Request("PUT", "/items/17", "write", "", 200, "")],
)


def test_there_are_forty_wire_faults_and_twelve_disk_faults() -> None:
    assert len(FAULTS) == len(BY_NAME) == 40
    assert len(DISK_FAULTS) == len({fault.name for fault in DISK_FAULTS}) == 12


def test_each_fault_of_the_table_is_done_by_something() -> None:
    on_connections = {fault.name for fault in FAULTS if fault.stage == "connection"}
    assert on_connections == {"connection_refused", "closed_at_accept"}
    assert {*STRIKES, *on_connections} == set(BY_NAME)
    assert {fault.name for fault in DISK_FAULTS} - set(_INJECTED) == {
        "folder_missing", "target_is_folder", "target_is_link", "other_bytes"
    }  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_table_keeps_its_own_rule(fault: Fault) -> None:
    assert fault.writes <= ENDINGS
    assert fault.reads <= ENDINGS
    assert fault.looks <= ANSWERS
    assert re.fullmatch(r"[a-z0-9_]+", fault.name)
    assert set(fault.wish) <= set(fault.variants)
    if fault.stage == "after" and fault.name not in {"closed_idle", "duplicate_answer"}:
        # the server has done it: whoever says "not taken" or "never" is wrong
        assert fault.writes <= {Seen.UNKNOWN, Seen.SUCCESS}
    if fault.name != "not_found_404":
        assert not fault.looks & {Seen.ABSENT, Seen.PARTIAL}
    assert Seen.UNKNOWN in fault.writes or fault.stage != "after"


def test_every_request_is_struck_and_of_equal_reads_the_first_and_the_last() -> None:
    cases = [case for case in plan(SHAPE) if case.fault.name == "reset_before_forward"]
    assert [case.at for case in cases] == [
        "2: POST /items",
        "6: POST /items/#/files",
        "1: GET /templates",
        "3: GET /items/#",
        "5: GET /items/#",
        "look-up 1: POST /search",
        "update 2: PUT /items/#",
    ]
    assert [(case.strike.kind, case.strike.number, case.strike.position) for case in cases] == [
        ("write", 1, 2), ("write", 2, 6), ("read", 1, 1), ("read", 2, 3), ("read", 4, 5), ("any", 1, 1),
        ("write", 1, 2),
    ]  # fmt: skip
    assert [case.expected for case in cases][-2] == BY_NAME["reset_before_forward"].looks
    variants = [fault for fault in FAULTS for _ in fault.variants]
    assert len({case.name for case in plan(SHAPE)}) == 7 * len(variants) - sum(fault.heavy for fault in variants)


def test_a_plan_may_be_cut_to_some_faults() -> None:
    assert {case.fault.name for case in plan(SHAPE, ["tls_alert"])} == {"tls_alert"}
    assert known_faults(["tls_alert", "disk_full", "tls_alart"]) == ["tls_alart"]


@pytest.mark.parametrize(("kind", "mark"), [(kind, mark) for mark, kinds in GRADES.items() for kind in sorted(kinds)])
def test_each_kind_of_problem_takes_its_mark(kind: str, mark: str) -> None:
    good = Report("x", ("a", "b"), (Done("a at 1", "a"), Done("b at 1", "b")), ())
    assert good.good
    assert good.score == "2/2"
    bad = Report("x", ("a", "b"), (Done("a at 1", "a", problems=[Problem(kind, "why")]), Done("b at 1", "b")), ())
    assert not bad.good
    assert bad.score == "1/2"
    assert [name for name, earned in bad.grades.items() if not earned] == [mark]


def test_what_did_not_run_has_not_passed_and_what_cannot_be_asked_is_not_verifiable() -> None:
    assert not Report("x", ("a", "b"), (Done("a at 1", "a"),), ()).good
    assert not Report("x", ("a",), (Done("a at 1", "a"),), (), can_verify=False).good
    cut = Done("cut 1 after 5 ms", "", problems=[Problem("duplicate", "2")])
    assert not Report("x", ("a",), (Done("a at 1", "a"),), (cut,)).grades["cancel-safe"]


def test_a_secret_is_found_in_an_error_that_led_to_another_and_in_a_log_line() -> None:
    secrets = Secrets(frozenset({"s3cret"}))
    error = ValueError("all is well")
    error.__cause__ = OSError("no answer from http://x/?key=s3cret")
    assert secrets.within(error)
    assert not secrets.within(ValueError("all is well"), {"a": 1})
    case_name.set("this case")
    with secrets.watched_logs():
        get_logger().warning("odd", address="http://x/?key=s3cret")
        get_logger().warning("fine", address="http://x/")
    assert secrets.leaks == {"this case": ["odd"]}


async def test_records_differ_and_what_is_remembered_is_kept(tmp_path: Path) -> None:
    first, second = make_record(tmp_path, None), make_record(tmp_path, b"<Experiment/>")
    assert first.session != second.session
    assert second.path.read_bytes() == b"<Experiment/>"
    kept: dict[str, object] = {}
    context = make_context(first, "shelf", None, kept)
    await context.remember(page="17")
    assert kept == {"page": "17"}
    assert make_context(first, "shelf", None, kept).record_key == context.record_key


def test_a_count_command_gets_the_record() -> None:
    probe = Probe("s 1", "title", "key", "sha")
    assert filled("count {session} {title}-{key} {sha256} {else}", probe) == "count s 1 title-key sha {else}"


async def request_of(*pieces: bytes) -> object:
    reader = asyncio.StreamReader(limit=HEAD_LIMIT)
    for piece in pieces:
        reader.feed_data(piece)
    reader.feed_eof()
    return await read_request(reader)


async def test_requests_are_read_whole() -> None:
    plain = await request_of(b"POST /a?b=c HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
    chunked = await request_of(
        b"POST /a?b=c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\nab\r\n1;x\r\nc\r\n0\r\n\r\n"
    )
    encoded = b"POST /a?b=c HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"
    for request in (plain, chunked):
        assert request.path == "/a"  # type: ignore[attr-defined]
        assert request.encode() == encoded  # type: ignore[attr-defined]
    assert await request_of(b"GET / HTTP/1.1\r\n") is None
    assert await request_of(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc") is None
    with pytest.raises(NotHttpError):
        await request_of(b"nonsense\r\n\r\n")


def test_answers_are_read_whole_and_framed_anew() -> None:
    raw = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nA: b\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    answer = parse_answer(raw)
    assert answer == Answer(201, "Created", (("A", "b"), ("Transfer-Encoding", "chunked")), b"abc")
    assert (
        answer.encode() == b"HTTP/1.1 201 Created\r\nA: b\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\nabc"
    )
    assert b"Content-Length" not in Answer(204, "No Content", (), b"").encode(close=True)
    for nonsense in (b"", b"HTTP/1.1\r\n\r\n", b"SSH-2.0\r\n\r\n"):
        with pytest.raises(NotHttpError):
            parse_answer(nonsense)


@pytest.mark.parametrize("name", ["", "Shelf", "1shelf", "my-shelf", "class", "a" * 101])
def test_a_new_destination_needs_a_name_that_settings_can_hold(name: str) -> None:
    with pytest.raises(ValueError, match="must be lower-case letters"):
        files_of(name)


def test_a_new_destination_is_at_most_sixty_lines_and_parses() -> None:
    texts = files_of("my_shelf")
    assert set(texts) == {"my_shelf.py", "my_shelf_server.py", "test_my_shelf.py"}
    assert len(texts["my_shelf.py"].splitlines()) <= 60
    assert "class MyShelf:" in texts["my_shelf.py"]
    for text in texts.values():
        compile(text, "x", "exec")
        assert not re.search(r"\b(NAME|UPPER|CLASS)\b", text)


def test_the_page_shows_the_destination_that_the_command_writes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "write-a-destination.md").read_text(encoding="utf-8")
    assert f"```python\n{files_of('shelf')['shelf.py']}```" in page
