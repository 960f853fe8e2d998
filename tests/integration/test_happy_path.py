"""Records go from the queue to the archive and the outcome goes back, on both databases."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.integration.harness import (
    SOURCE,
    STRUCTURED,
    WORKS,
    Bus,
    Heard,
    Site,
    built,
    by_path,
    inline,
    job_of,
    outcome_id,
    site,
    small,
)
from tools.records import Record, make_record
from tools.servers.postgresql import PostgresServer
from tools.servers.process import wait_for
from tools.servers.rabbitmq import RabbitServer

NOON = datetime(2025, 11, 24, 12, tzinfo=UTC)  # long ago: a build time ahead of the clock does not count

World = tuple[Site, Bus]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def world(
    request: pytest.FixtureRequest, rabbitmq: RabbitServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """Give a consumer with the archive and a plugin above it; each test has sessions of its own."""
    rabbitmq.start()
    name = f"happy-{request.param}"
    url = rabbitmq.create_vhost(name)
    folder = tmp_path_factory.mktemp(name)
    with ExitStack() as stack:
        stack.callback(rabbitmq.delete_vhost, name)
        database_url = None
        if request.param == "postgresql":
            postgres: PostgresServer = request.getfixturevalue("postgres")
            postgres.start()
            database_url = postgres.create_database("happy")
            stack.callback(postgres.drop_database, "happy")
        with site(folder, url, database_url, plugins={"works": WORKS}) as (here, bus):
            here.start()
            yield here, bus
            here.running[0].shut_down()
            assert bus.depth() == 0
            bus.fetch_letters()
            assert bus.letters == []
            assert len({item.event["id"] for item in bus.heard}) == len(bus.heard)


def at(minutes: float) -> str:
    return (NOON + timedelta(minutes=minutes)).isoformat()


def test_every_way_to_write_an_event_ends_in_the_archive(world: World) -> None:
    here, bus = world
    service = here.running[0]
    records = {name: make_record(number, size=30_000) for number, name in enumerate(("path", "inline", "folder"))}
    records |= {name: small(number) for number, name in enumerate(("binary", "colon", "json", "uploaded"), 10)}
    data: dict[str, dict[str, Any]] = {
        name: here.write(record) for name, record in records.items() if name not in {"inline", "folder", "uploaded"}
    }
    data["inline"] = inline(records["inline"].name, records["inline"].content)
    data["folder"] = here.write(records["folder"], "2026/ünïcode folder")
    # NexusLIMS has moved it there in the meantime
    here.write(records["uploaded"], "uploaded")
    data["uploaded"] = by_path(records["uploaded"].name, records["uploaded"].content)
    events = {name: built(records[name].session, data[name], event_id=name) for name in records}

    for name in ("path", "inline", "folder", "uploaded"):
        bus.publish(events[name])
    bus.publish_binary(events["binary"])
    bus.publish_binary(events["colon"], prefix="cloudEvents:")
    bus.publish(events["json"], content_type="application/json")

    for name, record in records.items():
        outcome = bus.outcome(name, log=service.log)
        assert outcome.data["status"] == "COMPLETED", name
        assert here.archived(record).read_bytes() == record.content
        manifest = json.loads(here.archived(record).with_suffix(".json").read_bytes())
        assert manifest["session_identifier"] == record.session
        assert manifest["links"] == {"works": f"https://works.test/{record.session}"}
        rows = here.log_rows(record.session)
        assert [(row["destination_name"], bool(row["success"])) for row in rows] == [
            ("works", True),
            ("local_archive", True),
        ]
        assert {(row["event_id"], row["source"], row["attempt"], row["purpose"]) for row in rows} == {
            (name, SOURCE, 1, "create")
        }
        assert all(row["duration_s"] >= 0 and row["error_code"] is None for row in rows)


def test_the_outcome_says_what_the_design_promises(world: World) -> None:
    here, bus = world
    record = small(201)
    given: dict[str, Any] = {"user": "ada", "metadata": {"a": [1, None]}, "strategy": "best_effort"}
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    event = {**built(record.session, here.write(record), event_id="told", **given), "traceparent": traceparent}
    before = datetime.now(UTC)
    bus.publish(event)
    outcome = bus.outcome("told", log=here.running[0].log)

    envelope = outcome.event
    assert outcome.routing_key == envelope["type"] == "record.exported"
    assert envelope["specversion"] == "1.0"
    assert envelope["id"] == outcome.message_id == outcome_id("told")
    assert envelope["source"] == "urn:nexus-export"
    assert envelope["subject"] == record.session
    assert envelope["traceparent"] == traceparent
    assert envelope["dataschema"].endswith("record.exported:1")
    assert before <= datetime.fromisoformat(envelope["time"]) <= datetime.now(UTC)
    assert outcome.persistent
    assert outcome.content_type == STRUCTURED

    data = outcome.data
    assert set(data) >= {
        "session_identifier", "status", "revision", "strategy", "cause", "superseded_by", "user", "instrument_pid",
        "dt_from", "dt_to", "record", "results",
    }  # fmt: skip
    assert data["session_identifier"] == record.session
    assert (data["status"], data["revision"], data["strategy"]) == ("COMPLETED", 1, "best_effort")
    assert data["cause"] == {"source": SOURCE, "id": "told"}
    assert data["superseded_by"] is None
    assert data["user"] == "ada"
    # read from the record, since the event does not say it
    assert data["instrument_pid"] == record.instrument_pid
    assert datetime.fromisoformat(data["dt_from"]) == record.dt_from
    assert datetime.fromisoformat(data["dt_to"]) == record.dt_to
    assert data["record"] == by_path(record.name, record.content)

    assert [result["destination"] for result in data["results"]] == ["works", "local_archive"]  # as tried
    for result in data["results"]:
        assert set(result) == {
            "destination", "success", "skipped", "action", "record_id", "record_url", "error_code", "error_message",
            "next_action", "attempts", "timestamp", "metadata",
        }  # fmt: skip
        assert (result["success"], result["skipped"], result["action"]) == (True, False, "created")
        assert (result["error_code"], result["error_message"]) == (None, None)
        assert (result["next_action"], result["attempts"]) == ("none", 1)
        assert before <= datetime.fromisoformat(result["timestamp"]) <= datetime.now(UTC)
    works, archive = data["results"]
    assert works["record_id"] == record.session
    assert works["record_url"] == f"https://works.test/{record.session}"
    assert Path(unquote(urlsplit(archive["record_url"]).path)) == here.archived(record)
    assert here.archive / archive["record_id"] == here.archived(record)


def test_an_inline_record_does_not_come_back_in_the_outcome(world: World) -> None:
    here, bus = world
    record = small(301)
    bus.publish(built(record.session, inline(record.name, record.content), event_id="not back"))
    told = bus.outcome("not back", log=here.running[0].log).data["record"]
    assert told == {
        "name": record.name,
        "sha256": hashlib.sha256(record.content).hexdigest(),
        "size": len(record.content),
    }


def test_the_same_event_again_has_no_effect(world: World) -> None:
    here, bus = world
    record, behind = small(401), small(402)
    event = built(record.session, here.write(record), event_id="twice")
    for _ in range(3):
        bus.publish(event)
    bus.outcome("twice", log=here.running[0].log)
    # the same event in another mode and with its keys in another order
    bus.publish_binary(event)
    bus.publish(json.dumps(dict(reversed(event.items()))).encode())
    bus.publish(built(behind.session, here.write(behind), event_id="behind"))
    bus.outcome("behind", log=here.running[0].log)
    assert len(bus.outcomes("twice")) == 1
    assert calls(here, record) == 1
    assert len(here.log_rows(record.session)) == 2
    assert len(here.sql("SELECT id FROM jobs WHERE session = ?", record.session)) == 1


def calls(here: Site, record: Record) -> int:
    """Return how often the plugin has exported a session."""
    return sum(entry["session"] == record.session for entry in here.ledger("works"))


def publish_builds(world: World, record: Record, contents: list[bytes]) -> list[Heard]:
    """Publish builds of one session, each when the one before is exported; returns their outcomes."""
    here, bus = world
    outcomes = []
    for number, content in enumerate(contents):
        (here.records / record.name).write_bytes(content)
        event_id = f"{record.session} {number}"
        bus.publish(built(record.session, by_path(record.name, content), event_id=event_id, time=at(number)))
        outcomes.append(bus.outcome(event_id, log=here.running[0].log))
    return outcomes


def versions(here: Site, record: Record) -> list[bytes]:
    """Return the bytes of the earlier versions that the archive keeps, oldest first."""
    path = here.archived(record)
    manifest = json.loads(path.with_suffix(".json").read_bytes())
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    return [path.with_name(version["file"]).read_bytes() for version in manifest["versions"]]


def test_a_new_build_updates_the_copy_and_the_old_version_stays(world: World) -> None:
    here, _ = world
    first, second = small(501), small(501, size=5_000)
    assert first.session == second.session
    outcomes = publish_builds(world, first, [first.content, second.content])
    assert here.archived(first).read_bytes() == second.content
    assert versions(here, first) == [first.content]
    results = outcomes[1].data["results"]
    assert [result["action"] for result in results] == ["updated", "updated"]
    assert outcomes[0].result("local_archive")["record_id"] == results[1]["record_id"]
    assert [row["purpose"] for row in here.log_rows(first.session)] == ["create", "create", "update", "update"]
    latest = here.sql("SELECT event_id FROM upload_log_latest WHERE session_identifier = ?", first.session)
    assert [row["event_id"] for row in latest] == [f"{first.session} 1"] * 2


def test_content_that_comes_back_is_current_again(world: World) -> None:
    here, _ = world
    first, second = small(601), small(601, size=5_000)
    outcomes = publish_builds(world, first, [first.content, second.content, first.content])
    assert here.archived(first).read_bytes() == first.content
    assert first.content in versions(here, first)
    assert second.content in versions(here, first)
    assert [outcome.data["status"] for outcome in outcomes] == ["COMPLETED"] * 3
    assert outcomes[2].result("local_archive")["action"] == "updated"


def test_an_older_build_that_comes_late_changes_nothing_and_repeats_the_outcome(world: World) -> None:
    here, bus = world
    newer, older = small(701), small(701, size=5_000)
    bus.publish(built(newer.session, inline(newer.name, newer.content), event_id="newer", time=at(10)))
    answer = bus.outcome("newer", log=here.running[0].log)
    bus.publish(built(older.session, inline(older.name, older.content), event_id="older", time=at(5)))
    late = bus.outcome("older", log=here.running[0].log)

    assert late.event["id"] == outcome_id("older")
    assert late.data["status"] == "COMPLETED"
    assert late.data["superseded_by"] == {"source": SOURCE, "id": "newer"}
    assert late.data["cause"] == {"source": SOURCE, "id": "older"}
    assert late.data["results"] == answer.data["results"]
    assert here.archived(newer).read_bytes() == newer.content
    assert versions(here, newer) == []
    assert calls(here, newer) == 1
    job = here.job("older")
    assert job is not None
    assert (job["state"], job["superseded_by"]) == ("superseded", str(job_of("newer")))


def test_without_a_time_the_order_of_arrival_decides(world: World) -> None:
    here, bus = world
    first, second = small(801), small(801, size=5_000)
    far = (datetime.now(UTC) + timedelta(days=3)).isoformat()  # a clock that is wrong decides nothing
    for number, (record, time) in enumerate(((first, far), (second, None), (first, None))):
        event_id = f"no time {number}"
        bus.publish(built(first.session, inline(first.name, record.content), event_id=event_id, time=time))
        assert bus.outcome(event_id, log=here.running[0].log).data["superseded_by"] is None
    assert here.archived(first).read_bytes() == first.content
    assert second.content in versions(here, first)


def test_a_build_that_waits_is_superseded_by_a_newer_one(tmp_path: Path, amqp_url: str, database_url: str) -> None:
    slow = """
def export(self, context):
    note("export", context, sha256=context.record_sha256)
    while not LEDGER.with_suffix(".go").exists():
        time.sleep(0.02)
    return done(context)
"""
    settings: dict[str, Any] = {"NX_SLOW_CONCURRENCY": "1"}
    with site(tmp_path, amqp_url, database_url, plugins={"slow": slow}, **settings) as (here, bus):
        service = here.start()
        builds = [small(1, size=2_000 + 1_000 * number) for number in range(4)]
        for number, record in enumerate(builds):
            event_id = f"build {number}"
            bus.publish(
                built(record.session, inline(record.name, record.content), event_id=event_id, time=at(number))
            )
            service.wait_for(lambda event_id=event_id: here.job(event_id), f"the job of {event_id}")  # type: ignore[misc]
            if number == 0:
                service.wait_for(lambda: here.ledger("slow"), "the first export")
        (here.plugins / "slow.go").touch()
        outcomes = [bus.outcome(f"build {number}", log=service.log) for number in range(4)]
        assert [outcome.data["superseded_by"] for outcome in outcomes] == [
            {"source": SOURCE, "id": "build 3"},
            {"source": SOURCE, "id": "build 3"},
            {"source": SOURCE, "id": "build 3"},
            None,
        ]
        digests = [hashlib.sha256(record.content).hexdigest() for record in builds]
        assert [entry["sha256"] for entry in here.ledger("slow")] == [digests[0], digests[3]]
        assert here.archived(builds[3]).read_bytes() == builds[3].content
        wait_for(lambda: bus.depth() == 0, 5, "an empty work queue")
        assert len(bus.heard) == 4
