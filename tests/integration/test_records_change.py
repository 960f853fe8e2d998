"""Record files that go, come, move or change while their export is under way: only announced bytes arrive."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import (
    DEAD_QUEUE,
    WORKS,
    Bus,
    Heard,
    Site,
    built,
    by_path,
    inline,
    job_of,
    sha256,
    site,
    small,
)
from tools.records import Record
from tools.servers.process import wait_for

WAIT_SECONDS = 3.0

#: Notes the bytes it is given, and is busy until the test says otherwise.
BUSY = """
def export(self, context):
    import hashlib
    note("export", context, sha256=hashlib.sha256(context.xml_file_path.read_bytes()).hexdigest())
    if not LEDGER.with_suffix(".go").exists():
        raise Transient("busy")
    return done(context)
"""
PATIENT: dict[str, Any] = {"NX_BUSY_MAX_ATTEMPTS": "1000"}

MORNING, NOON = "2026-11-24T08:00:00Z", "2026-11-24T12:00:00Z"


@pytest.fixture
def world(tmp_path: Path, amqp_url: str) -> Iterator[tuple[Site, Bus]]:
    """Give an installation with an archive and a plugin that works; files may be missing for a short while."""
    settings: dict[str, Any] = {"NX_RECORD_WAIT_SECONDS": f"{WAIT_SECONDS:g}"}
    with site(tmp_path, amqp_url, plugins={"works": WORKS}, **settings) as (here, bus):
        yield here, bus


def tried(here: Site, event_id: str) -> int:
    """Return how often the file of an event was missing."""
    return int((here.job(event_id) or {"snapshot_tries": 0})["snapshot_tries"])


def letter_of(bus: Bus, event_id: str, revision: int = 1) -> Heard:
    """Wait for the dead letter of an event."""
    wanted = f"{job_of(event_id)}/{revision}"
    return bus.letter(lambda item: item.headers.get("nexus-replay-of") == wanted)


def whole(record: Record, here: Site) -> bool:
    """Tell whether the archive has the record as it was announced."""
    return here.archived(record).read_bytes() == record.content


def calls(here: Site, plugin: str, session: str) -> list[dict[str, Any]]:
    """Return the calls of a plugin for a session."""
    return [entry for entry in here.ledger(plugin) if entry["session"] == session]


# --- after the snapshot ----------------------------------------------------------------------------------------


def test_retries_send_the_announced_bytes_whatever_becomes_of_the_file(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url, plugins={"busy": BUSY}, **PATIENT) as (here, bus):
        service = here.start()
        deleted, replaced, linked = (small(number) for number in range(3))
        for record in (deleted, replaced, linked):
            bus.publish(built(record.session, here.write(record), event_id=record.session))
        for record in (deleted, replaced, linked):
            service.wait_for(lambda r=record: calls(here, "busy", r.session), "the first attempt")  # type: ignore[misc]
        (here.records / deleted.name).unlink()
        (here.records / replaced.name).write_bytes(small(7).content)
        (here.records / linked.name).unlink()
        (here.records / linked.name).symlink_to("/etc/hostname")
        before = len(here.ledger("busy"))
        service.wait_for(lambda: len(here.ledger("busy")) >= before + 6, "retries after the change")
        service.shut_down()
        (here.plugins / "busy.go").touch()
        again = here.start()  # what was kept outlives the process
        for record in (deleted, replaced, linked):
            assert bus.outcome(record.session, log=again.log).data["status"] == "COMPLETED"
            seen = {entry["sha256"] for entry in calls(here, "busy", record.session)}
            assert seen == {sha256(record.content)}
            assert whole(record, here)


# --- before the snapshot ---------------------------------------------------------------------------------------


def test_a_file_that_was_replaced_before_it_was_read_is_not_exported(world: tuple[Site, Bus]) -> None:
    here, bus = world
    service = here.start()
    record, other = small(1), small(2)
    data = here.write(record)
    (here.records / record.name).write_bytes(other.content)
    bus.publish(built(record.session, data, event_id="replaced"))
    outcome = bus.outcome("replaced", log=service.log)
    assert outcome.data["status"] == "BUILT_NOT_EXPORTED"
    for destination in ("works", "local_archive"):
        result = outcome.result(destination)
        assert (result["error_code"], result["next_action"], result["attempts"]) == (
            "record_changed",
            "fix_record",
            0,
        )
    assert here.ledger("works") == []
    assert [path for path in here.archive.rglob("*") if path.is_file()] == []


def test_of_two_builds_in_one_file_only_the_newer_is_exported(world: tuple[Site, Bus]) -> None:
    here, bus = world
    here.start().shut_down()  # the queue is there, nobody takes from it
    record = small(1)
    before = here.write(record)
    newer = record.content + b"<!-- built again -->"
    (here.records / record.name).write_bytes(newer)
    bus.publish(built(record.session, before, event_id="older", time=MORNING))
    bus.publish(built(record.session, by_path(record.name, newer), event_id="newer", time=NOON))
    service = here.start()
    outcomes = [bus.outcome(event_id, log=service.log) for event_id in ("older", "newer")]
    assert [outcome.data["status"] for outcome in outcomes] == ["COMPLETED", "COMPLETED"]
    assert (outcomes[0].data["superseded_by"] or {})["id"] == "newer"
    assert here.archived(record).read_bytes() == newer
    assert len(here.ledger("works")) == 1
    assert bus.depth(DEAD_QUEUE) == 0


def test_an_older_build_that_failed_and_is_replayed_overwrites_nothing(world: tuple[Site, Bus]) -> None:
    here, bus = world
    service = here.start()
    record = small(1)
    newer = record.content + b"<!-- built again -->"
    before = here.write(record)
    (here.records / record.name).write_bytes(newer)  # and the event of that build is late
    bus.publish(built(record.session, before, event_id="older", time=MORNING))
    assert bus.outcome("older", log=service.log).result("works")["error_code"] == "record_changed"
    bus.publish(built(record.session, by_path(record.name, newer), event_id="newer", time=NOON))
    assert bus.outcome("newer", log=service.log).data["status"] == "COMPLETED"
    here.write(record)  # somebody takes the old file out of a backup, and replays its event
    bus.requeue(letter_of(bus, "older"))
    answer = bus.outcome("older", revision=2, log=service.log)
    assert (answer.data["status"], answer.data["superseded_by"]["id"]) == ("COMPLETED", "newer")
    assert here.archived(record).read_bytes() == newer
    assert len(here.ledger("works")) == 1


STRICT = """
def export(self, context):
    import hashlib
    note("export", context, sha256=hashlib.sha256(context.xml_file_path.read_bytes()).hexdigest())
    if not LEDGER.with_suffix(".go").exists():
        raise Permanent("no such project", code="no_project")
    return done(context)
"""


def test_an_older_build_that_was_exported_in_part_and_is_replayed_overwrites_nothing(
    tmp_path: Path, amqp_url: str, database_url: str
) -> None:
    with site(tmp_path, amqp_url, database_url, plugins={"strict": STRICT}) as (here, bus):
        service = here.start()
        record = small(1)
        newer = record.content + b"<!-- built again -->"
        bus.publish(built(record.session, inline(record.name, record.content), event_id="older", time=MORNING))
        assert bus.outcome("older", log=service.log).result("strict")["error_code"] == "no_project"
        assert whole(record, here)
        (here.plugins / "strict.go").touch()
        bus.publish(built(record.session, inline(record.name, newer), event_id="newer", time=NOON))
        assert bus.outcome("newer", log=service.log).data["status"] == "COMPLETED"
        bus.requeue(letter_of(bus, "older"))
        answer = bus.outcome("older", revision=2, log=service.log)
        assert (answer.data["status"], answer.data["superseded_by"]["id"]) == ("COMPLETED", "newer")
        assert here.archived(record).read_bytes() == newer
        assert [entry["sha256"] for entry in here.ledger("strict")] == [sha256(record.content), sha256(newer)]


# --- files that come late, or never ----------------------------------------------------------------------------


def test_a_file_is_waited_for_where_it_was_announced_and_where_nexuslims_moves_it(world: tuple[Site, Bus]) -> None:
    here, bus = world
    service = here.start()
    late, moved, never, good = (small(number) for number in range(4))
    began = time.monotonic()
    for record in (late, moved, never):
        bus.publish(built(record.session, by_path(record.name, record.content), event_id=record.session))
    for record in (late, moved, never):
        service.wait_for(lambda r=record: tried(here, r.session) > 0, "a look for the file")  # type: ignore[misc]
    here.write(late)
    here.write(moved, "uploaded")
    bus.publish(built(good.session, here.write(good), event_id=good.session))
    for record in (late, moved, good):
        assert bus.outcome(record.session, log=service.log).data["status"] == "COMPLETED"
        assert whole(record, here)
    assert bus.outcomes(never.session) == []  # its wait holds up nobody
    outcome = bus.outcome(never.session, log=service.log)
    assert WAIT_SECONDS <= time.monotonic() - began < WAIT_SECONDS + 5
    result = outcome.result("local_archive")
    assert (result["error_code"], result["next_action"], result["attempts"]) == ("record_missing", "fix_record", 0)
    assert never.name in result["error_message"]
    assert calls(here, "works", never.session) == []
    letter_of(bus, never.session)


@pytest.mark.parametrize("part", [0, 700])
def test_a_file_that_is_cut_is_not_exported_and_can_be_replayed_when_it_is_whole(
    world: tuple[Site, Bus], part: int
) -> None:
    here, bus = world
    service = here.start()
    record = small(1)
    data = here.write(record)
    (here.records / record.name).write_bytes(record.content[:part])
    bus.publish(built(record.session, data, event_id="cut"))
    outcome = bus.outcome("cut", log=service.log)
    assert outcome.result("local_archive")["error_code"] == "record_changed"
    assert f"{part} bytes" in outcome.result("local_archive")["error_message"]
    assert here.ledger("works") == []
    assert not here.archived(record).exists()
    here.write(record)
    bus.requeue(letter_of(bus, "cut"))
    assert bus.outcome("cut", revision=2, log=service.log).data["status"] == "COMPLETED"
    assert whole(record, here)
    assert len(here.ledger("works")) == 1


# --- the whole folder is gone ----------------------------------------------------------------------------------


def test_work_pauses_while_the_folder_of_records_is_away(tmp_path: Path, amqp_url: str) -> None:
    settings = {**PATIENT, "NX_RECORD_WAIT_SECONDS": "1"}
    with site(tmp_path, amqp_url, plugins={"busy": BUSY}, **settings) as (here, bus):
        service = here.start()
        kept, inside, *waiting = (small(number) for number in range(6))
        bus.publish(built(kept.session, here.write(kept), event_id="kept"))
        service.wait_for(lambda: calls(here, "busy", kept.session), "the first attempt")
        events = [
            built(record.session, here.write(record), event_id=record.session, destinations=["local_archive"])
            for record in waiting
        ]
        away = here.records.rename(tmp_path / "unmounted")
        gone_at = time.monotonic()
        for event in events:
            bus.publish(event)
        service.wait_for_log('"records_unreadable"')
        assert str(here.records) in service.logged()
        # what does not need the folder goes on: a record that was kept, and one inside of its event
        (here.plugins / "busy.go").touch()
        bus.publish(built(inside.session, inline(inside.name, inside.content), event_id="inside"))
        for event_id in ("kept", "inside"):
            assert bus.outcome(event_id, log=service.log).data["status"] == "COMPLETED"
        wait_for(lambda: time.monotonic() - gone_at > 2, 5, "twice the time that a file may be missing", service.log)
        for record in waiting:
            job = here.job(record.session)
            assert job is not None
            assert (job["state"], job["snapshot_tries"]) == ("open", 0)
        assert len(bus.heard) == 2
        assert '"records_readable_again"' not in service.logged()
        away.rename(here.records)
        for record in waiting:
            assert bus.outcome(record.session, log=service.log).data["status"] == "COMPLETED"
            assert whole(record, here)
        service.wait_for_log('"records_readable_again"')
        assert len(bus.heard) == len(waiting) + 2


def test_the_wait_for_the_folder_of_records_has_an_end(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url, NX_EXPORT_MAX_WAIT="3") as (here, bus):
        service = here.start()
        record = small(1)
        event = built(record.session, here.write(record), event_id="lost")
        here.records.rename(tmp_path / "unmounted")
        bus.publish(event)
        result = bus.outcome("lost", log=service.log).result("local_archive")
        assert (result["error_code"], result["next_action"]) == ("records_root_missing", "replay")
        assert str(here.records) in result["error_message"]
