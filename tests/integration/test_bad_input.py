"""What is wrong with an event or a record ends where somebody sees it, and never in another record's way.

All cases go through one running consumer, each with a good event right behind it.
"""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import (
    SOURCE,
    STRUCTURED,
    WORKS,
    Bus,
    Heard,
    Service,
    Site,
    built,
    by_path,
    inline,
    job_of,
    outcome_id,
    site,
    small,
)
from tools.records import Record
from tools.servers.process import wait_for
from tools.servers.rabbitmq import RabbitServer

MAX_BYTES = 20_000
GOOD = "good"


@dataclass
class Running:
    """One consumer that takes everything this file can think of."""

    site: Site
    bus: Bus
    service: Service
    #: events and records that must arrive, by the name of the case before them
    good: dict[str, tuple[str, Record]] = field(default_factory=dict)

    def outcome(self, event_id: str) -> Heard:
        """Wait for an outcome."""
        return self.bus.outcome(event_id, log=self.service.log)


# --- poison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poison:
    """A delivery that is no valid event; ``named``: id and session can be read, so the builder is told."""

    code: str
    body: bytes
    event_id: str
    named: bool = True
    content_type: str | None = STRUCTURED
    headers: Mapping[str, Any] = field(default_factory=dict)


def broken(name: str, code: str, change: Callable[[dict[str, Any]], object], *, named: bool = True) -> Poison:
    """Make a valid event and spoil it."""
    document = built(f"session {name}", by_path("never-read.xml", b"<x/>"), event_id=f"poison {name}")
    change(document)
    return Poison(code, json.dumps(document).encode(), f"poison {name}", named)


def headers_of(name: str) -> dict[str, Any]:
    """Return the attributes of an event in binary mode."""
    return {
        "cloudEvents_specversion": "1.0",
        "cloudEvents_id": f"poison {name}",
        "cloudEvents_source": SOURCE,
        "cloudEvents_type": "record.built",
        "cloudEvents_subject": f"session {name}",
    }


def nested(depth: int) -> bytes:
    """Return an event with arrays in arrays."""
    return b'{"specversion": "1.0", "id": "deep", "data": ' + b"[" * depth + b"]" * depth + b"}"


REUSED = built("session reused", inline("reused.xml", small(900).content), event_id="reused id")

POISON = {
    "not JSON": Poison("not_json", b"\x89PNG not at all", "-", named=False),
    "empty": Poison("not_json", b"", "-", named=False, content_type=None),
    "not JSON under good headers": Poison(
        "not_json", b"{", "poison headers", content_type="application/json", headers=headers_of("headers")
    ),
    "JSON but no object": Poison("not_cloudevent", b"[1, 2]", "-", named=False),
    "no CloudEvent": broken("plain", "not_cloudevent", lambda event: event.pop("specversion")),
    "another CloudEvents": broken("v0", "not_cloudevent", lambda event: event.update(specversion="0.3")),
    "no id": broken("anonymous", "not_cloudevent", lambda event: event.pop("id"), named=False),
    "an outcome": broken("type", "unknown_type", lambda event: event.update(type="record.exported")),
    "no data": broken("no data", "invalid_data", lambda event: event.pop("data")),
    "no record": broken("no record", "invalid_data", lambda event: event["data"].pop("record")),
    "no session": broken("no session", "invalid_data", lambda event: event["data"].pop("session_identifier")),
    "size as text": broken("size", "invalid_data", lambda event: event["data"]["record"].update(size="12")),
    "user is a list": broken("user", "invalid_data", lambda event: event["data"].update(user=["a"])),
    "sha256 too short": broken("sha", "invalid_data", lambda event: event["data"]["record"].update(sha256="ab")),
    "naive date": broken("naive", "invalid_data", lambda event: event["data"].update(dt_from="2026-11-24T10:00:00")),
    "naive build time": broken("built", "not_cloudevent", lambda event: event.update(time="2026-11-24T10:00:00")),
    "number as date": broken("number", "invalid_data", lambda event: event["data"].update(dt_to=0)),
    "no destinations": broken("nowhere", "invalid_data", lambda event: event["data"].update(destinations=[])),
    "NUL": broken("nul", "invalid_text", lambda event: event["data"].update(user="a\0b")),
    "NUL as key": broken("key", "invalid_text", lambda event: event["data"].update(metadata={"a": {"\0": 1}})),
    # the reader of JSON refuses the text as a whole, so nobody can be told
    "lone surrogate": broken("surrogate", "not_json", lambda event: event["data"].update(user="\ud800"), named=False),
    "200 kB of arrays": Poison("not_json", nested(100_000), "deep", named=False),
    "reused id": Poison(
        "id_reused",
        json.dumps(built("session reused", inline("reused.xml", b"<other/>"), event_id="reused id")).encode(),
        "reused id",
    ),
}


# --- bad records -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """An event that is valid and cannot be exported as it is."""

    code: str
    next_action: str
    #: makes the event's data; what it writes lies below the folder of records
    make: Callable[[Site, Record], Mapping[str, Any]]


def written(code: str, content: Callable[[bytes], bytes] = bytes, **announced: Any) -> Refused:
    """Make a case of a file with other content, or announced as another one than it is."""

    def make(here: Site, record: Record) -> Mapping[str, Any]:
        changed = content(record.content)
        (here.records / record.name).write_bytes(changed)
        return {"record": by_path(record.name, changed, **announced)}

    return Refused(code, "fix_record", make)


def elsewhere(path: Callable[[Site, Record], str], code: str = "path_refused") -> Refused:
    """Make a case of a path that must not be followed."""

    def make(here: Site, record: Record) -> Mapping[str, Any]:
        return {"record": by_path(path(here, record), record.content)}

    return Refused(code, "fix_record", make)


def outside(here: Site, record: Record) -> Path:
    """Write the record where the consumer must not read it."""
    path = here.folder / "secrets" / record.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(record.content)
    return path


def link_to_file(here: Site, record: Record) -> str:
    (here.records / record.name).symlink_to(outside(here, record))
    return record.name


def link_to_folder(here: Site, record: Record) -> str:
    (here.records / "linked").symlink_to(outside(here, record).parent)
    return f"linked/{record.name}"


def link_inside(here: Site, record: Record) -> str:
    """Even a link that stays inside is refused: it could be changed between check and use."""
    (here.records / f"real-{record.name}").write_bytes(record.content)
    (here.records / record.name).symlink_to(f"real-{record.name}")
    return record.name


def directory(here: Site, record: Record) -> str:
    (here.records / record.name).mkdir()
    return record.name


def fifo(here: Site, record: Record) -> str:
    os.mkfifo(here.records / record.name)
    return record.name


def wanting(**data: Any) -> Callable[[Site, Record], Mapping[str, Any]]:
    return lambda here, record: {"record": here.write(record), **data}


def with_doctype(text: str) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(b"<Experiment", text.encode() + b"\n<Experiment", 1)


BILLION = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
FAILED = {
    "unknown destination": Refused("unknown_destination", "fix_config", wanting(destinations=["nowhere"])),
    "one of two destinations": Refused(
        "unknown_destination", "fix_config", wanting(destinations=["local_archive", "nowhere"])
    ),
    "unknown strategy": Refused("unknown_strategy", "fix_config", wanting(strategy="some")),
    "dots": elsewhere(lambda here, record: f"../secrets/{outside(here, record).name}"),
    "dots inside": elsewhere(lambda here, record: f"a/../../secrets/{outside(here, record).name}"),
    "absolute path": elsewhere(lambda here, record: str(outside(here, record))),
    "the folder itself": elsewhere(lambda _here, _record: "."),
    "link to a file": elsewhere(link_to_file),
    "link to a folder": elsewhere(link_to_folder),
    "link inside": elsewhere(link_inside),
    "file as a folder": elsewhere(lambda here, record: f"{here.write(record)['path']}/inner.xml"),
    "directory": elsewhere(directory, "record_not_a_file"),
    "FIFO": elsewhere(fifo, "record_not_a_file"),
    "missing file": elsewhere(lambda _here, record: record.name, "record_missing"),
    "missing folder": elsewhere(lambda _here, record: f"never/{record.name}", "record_missing"),
    "wrong sha256": written("record_changed", sha256="0" * 64),
    "wrong size": written("record_changed", size=1),
    "cut off": written("record_malformed", lambda content: content[: len(content) // 2]),
    "too large": written("record_too_large", lambda content: content + b"<!--" + b"x" * MAX_BYTES + b"-->"),
    "malformed": written("record_malformed", lambda content: content.replace(b"</title>", b"", 1)),
    "no XML at all": written("record_malformed", lambda _content: b"PK\x03\x04"),
    "empty file": written("record_malformed", lambda _content: b""),
    "DOCTYPE": written("record_doctype", with_doctype("<!DOCTYPE Experiment>")),
    "entity from outside": written(
        "record_doctype", with_doctype('<!DOCTYPE Experiment [<!ENTITY x SYSTEM "file:///etc/hostname">]>')
    ),
    "wrong root": written("record_wrong_root", lambda _content: b"<Sample/>"),
    "root of another namespace": written(
        "record_wrong_root", lambda content: content.replace(b"experiment/v1.0", b"experiment/v9.9")
    ),
    "invalid against the schema": written(
        "record_invalid", lambda content: content.replace(b'role="Experimental"', b'role="Guess"')
    ),
}


# --- the consumer that takes them all --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(
    rabbitmq: RabbitServer, tmp_path_factory: pytest.TempPathFactory, nexus_schema: Path
) -> Iterator[Running]:
    """Publish all cases, each with a good event behind it, to one consumer."""
    rabbitmq.start()
    url = rabbitmq.create_vhost("bad-input")
    settings: dict[str, Any] = {
        "NX_RECORD_SCHEMA": str(nexus_schema),
        "NX_RECORD_MAX_BYTES": str(MAX_BYTES),
        "NX_RECORD_WAIT_SECONDS": "2",
    }
    with site(tmp_path_factory.mktemp("bad-input"), url, **settings) as (here, bus):
        found = Running(here, bus, here.start())
        bus.publish(REUSED)
        # known before its id is used again: a batch of deliveries is one commit
        found.outcome("reused id")
        for name, poison in POISON.items():
            bus.publish(poison.body, content_type=poison.content_type, headers=poison.headers)
            publish_good(found, name)
        for number, (name, refused) in enumerate(FAILED.items(), 100):
            record = small(number)
            data = refused.make(here, record)
            bus.publish(built(record.session, event_id=f"failed {name}", **data))
            publish_good(found, name)
        yield found
    rabbitmq.start()
    rabbitmq.delete_vhost("bad-input")


def publish_good(found: Running, name: str) -> None:
    """Publish an event that must arrive."""
    record = small(len(found.good))
    found.good[name] = (f"{GOOD} behind {name}", record)
    found.bus.publish(built(record.session, found.site.write(record), event_id=found.good[name][0]))


@pytest.mark.parametrize("name", POISON)
def test_poison_ends_in_the_dead_letters_and_its_builder_is_told(running: Running, name: str) -> None:
    poison = POISON[name]
    letter = running.bus.letter(lambda item: item.body == poison.body, log=running.service.log)
    assert letter.headers["nexus-error-code"] == poison.code
    assert letter.headers["nexus-error-message"]
    assert "nexus-replay-of" not in letter.headers
    assert letter.persistent
    if poison.content_type:
        assert letter.content_type == poison.content_type
    if not poison.named:
        return
    wait_for(lambda: invalid(running, poison), 10, "the outcome of a poison event", running.service.log)
    (outcome,) = invalid(running, poison)
    assert outcome.routing_key == outcome.event["type"] == "record.export_failed"
    assert outcome.data["status"] == "BUILT_NOT_EXPORTED"
    assert outcome.data["cause"] == {"source": SOURCE, "id": poison.event_id}
    assert outcome.event["subject"].startswith("session ")
    assert poison.code in outcome.data["error_message"]
    assert outcome.data["results"] == []


def invalid(running: Running, poison: Poison) -> list[Heard]:
    """Return the outcomes that say that an event was not valid."""
    found = running.bus.outcomes(poison.event_id)
    return [item for item in found if item.data["error_code"] == "invalid_event"]


def test_nobody_is_told_of_an_event_without_a_name(running: Running) -> None:
    named = {poison.event_id for poison in POISON.values() if poison.named}
    told = {item.cause for item in running.bus.heard if item.data["error_code"] == "invalid_event"}
    assert told <= named


def test_a_reused_id_leaves_the_first_event_alone(running: Running) -> None:
    first = running.bus.outcomes("reused id")[0]
    assert first.routing_key == "record.exported"
    assert first.event["id"] == outcome_id("reused id")
    poison = POISON["reused id"]
    wait_for(lambda: invalid(running, poison), 10, "the outcome of the reused id", running.service.log)
    assert invalid(running, poison)[0].event["id"] != first.event["id"]
    job = running.site.job("reused id")
    assert job is not None
    assert (job["state"], job["revision"]) == ("exported", 1)
    assert running.site.archived(small(900)).with_name("reused.xml").read_bytes() == small(900).content


@pytest.mark.parametrize("name", FAILED)
def test_what_cannot_be_exported_fails_with_its_reason_and_goes_nowhere(running: Running, name: str) -> None:
    refused, event_id = FAILED[name], f"failed {name}"
    outcome = running.outcome(event_id)
    assert outcome.routing_key == "record.export_failed"
    assert outcome.event["id"] == outcome_id(event_id)
    assert outcome.data["status"] == "BUILT_NOT_EXPORTED"
    wanted = json.loads((running.site.job(event_id) or {})["event"])["data"].get("destinations", ["local_archive"])
    assert {result["destination"] for result in outcome.data["results"]} == set(wanted)
    for result in outcome.data["results"]:
        assert (result["success"], result["error_code"]) == (False, refused.code)
        assert result["next_action"] == refused.next_action
        assert result["attempts"] == 0
        assert result["error_message"]

    replay_of = f"{job_of(event_id)}/1"
    letter = running.bus.letter(
        lambda item: item.headers.get("nexus-replay-of") == replay_of, log=running.service.log
    )
    assert letter.event["id"] == event_id
    assert letter.headers["nexus-error-code"] == refused.code
    assert letter.headers["nexus-error-message"]
    assert running.site.log_rows(outcome.data["session_identifier"]) == []


@pytest.mark.parametrize("name", [*POISON, *FAILED])
def test_a_good_event_behind_it_arrives(running: Running, name: str) -> None:
    event_id, record = running.good[name]
    assert running.outcome(event_id).routing_key == "record.exported"
    assert running.site.archived(record).read_bytes() == record.content


def test_nothing_else_is_in_the_archive_nor_left_in_the_queue(running: Running) -> None:
    for event_id, _ in running.good.values():
        running.outcome(event_id)
    for name in FAILED:
        running.outcome(f"failed {name}")
    files = {path.name for path in running.site.archive.rglob("*.xml")}
    assert files == {record.name for _, record in running.good.values()} | {"reused.xml"}
    assert running.bus.depth() == 0


# --- what a person mends waits, and does not fail --------------------------------------------------------------

PICKY = """
async def export(self, context):
    note("export", context)
    if not LEDGER.with_suffix(".token").exists():
        raise Misconfigured("the token has run out")
    return done(context)

def validate_config(self):
    there = LEDGER.with_suffix(".token").exists()
    return (True, None) if there else (False, "the token has run out")
"""


@dataclass
class Waiting:
    """A consumer whose world was broken and then mended; ``before`` is what the database said in between."""

    site: Site
    outcomes: dict[str, Heard]
    before: dict[str, dict[str, Any]]
    lanes: dict[str, dict[str, Any]]


def fill(folder: Path) -> None:
    """Leave no room on the file system of a folder."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - the loop has no other end


@pytest.fixture(scope="module")
def mended(rabbitmq: RabbitServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    """Break three things, wait until each holds its record up, and mend them all."""
    rabbitmq.start()
    url = rabbitmq.create_vhost("mended")
    folder = tmp_path_factory.mktemp("mended")
    records = {name: small(number) for number, name in enumerate(("by path", "archive", "picky"))}
    with (
        ExitStack() as stack,
        site(folder, url, plugins={"picky": PICKY, "plain": WORKS}, NX_RECORD_WAIT_SECONDS="1") as (here, bus),
    ):
        here.archive.mkdir()
        can_mount = mount(here.archive, stack)
        here.records.rmdir()
        service = here.start()
        if can_mount:
            fill(here.archive)
        by_path_data = by_path(records["by path"].name, records["by path"].content)
        events = {
            "by path": built("by path", by_path_data, event_id="by path", destinations=["plain"]),
            "picky": in_event(records["picky"], "picky", ["picky", "plain"]),
        }
        if can_mount:
            events["archive"] = in_event(records["archive"], "archive", ["local_archive"])
        for event in events.values():
            bus.publish(event)
        service.wait_for_log('"records_unreadable"')
        service.wait_for(lambda: len(paused(here)) == len(events) - 1, "the pause of the lanes")
        service.wait_for(lambda: here.steps("picky")["plain"]["state"] == "done", "the neighbour of a paused lane")
        before = {name: {**(here.job(name) or {}), "steps": here.steps(name)} for name in events}
        lanes = paused(here)
        assert bus.heard == []
        (here.plugins / "picky.token").touch()
        (here.archive / "filler").unlink(missing_ok=True)
        here.records.mkdir()
        here.write(records["by path"])
        outcomes = {name: bus.outcome(name, log=service.log) for name in events}
        if can_mount:
            assert here.archived(records["archive"]).read_bytes() == records["archive"].content
        yield Waiting(here, outcomes, before, lanes)
        service.shut_down()
    rabbitmq.start()
    rabbitmq.delete_vhost("mended")


def in_event(record: Record, name: str, destinations: list[str]) -> dict[str, Any]:
    return built(record.session, inline(record.name, record.content), event_id=name, destinations=destinations)


def mount(folder: Path, stack: ExitStack) -> bool:
    """Put a small file system of its own on a folder, if this user may."""
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        return False
    stack.callback(lambda: subprocess.run(["umount", "--lazy", str(folder)], check=True))
    return True


def paused(here: Site) -> dict[str, dict[str, Any]]:
    """Return the lanes that wait for a person."""
    return {row["destination"]: row for row in here.sql("SELECT * FROM lanes WHERE state = 'paused'")}


def test_records_wait_for_a_root_that_is_gone(mended: Waiting) -> None:
    before = mended.before["by path"]
    assert (before["state"], before["steps"]["plain"]["state"]) == ("open", "blocked")
    assert before["snapshot_tries"] == 0  # not counted as a missing file, whose wait was over long ago
    assert mended.outcomes["by path"].data["status"] == "COMPLETED"


def test_records_wait_for_a_full_archive(mended: Waiting) -> None:
    if "archive" not in mended.before:
        pytest.skip("this user may not mount a small file system")
    step = mended.before["archive"]["steps"]["local_archive"]
    assert (step["state"], step["attempts"]) == ("due", 0)
    assert "disk full" in mended.lanes["local_archive"]["reason"]
    assert mended.outcomes["archive"].data["status"] == "COMPLETED"


def test_records_wait_for_a_destination_that_is_misconfigured(mended: Waiting) -> None:
    before = mended.before["picky"]["steps"]
    assert (before["picky"]["state"], before["picky"]["attempts"]) == ("due", 0)
    assert before["plain"]["state"] == "done"  # a paused lane holds nobody up
    assert "token has run out" in mended.lanes["picky"]["reason"]
    outcome = mended.outcomes["picky"]
    assert outcome.data["status"] == "COMPLETED"
    assert outcome.result("picky")["attempts"] == 1
    assert len(mended.site.ledger("picky")) == 2  # asked by validate_config meanwhile, not by sending again


def test_without_any_destination_the_service_refuses_to_start(tmp_path: Path, amqp_url: str) -> None:
    here = Site(tmp_path, amqp_url)
    done = here.run("run", NX_LOCAL_ARCHIVE_PATH="")
    assert done.returncode == 2
    assert "no destination is enabled" in done.stderr
    assert "NX_LOCAL_ARCHIVE_PATH" in done.stderr
    assert "Traceback" not in done.stderr
