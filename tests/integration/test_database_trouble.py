"""A database that is locked, full or restarted, and disks without room: everything waits and nothing is lost."""

import errno
import json
import os
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.integration.harness import DEAD_QUEUE, WORKS, Bus, Service, Site, built, inline, site, small
from tools.servers.postgresql import PostgresServer
from tools.servers.process import wait_for
from tools.servers.rabbitmq import RabbitServer

LOCKED_SECONDS = 20.0
#: What waited must be through in this time once the trouble is over.
MENDED_SECONDS = 15.0
PAGE_BYTES = 4096

#: Begins, and ends only when the test says so; what it notes as ``export`` is its effect.
HELD = """
settle_seconds = 0

async def export(self, context):
    import asyncio
    note("begin", context)
    while not LEDGER.with_suffix(".go").exists():
        await asyncio.sleep(0.02)
    note("export", context)
    return done(context)

async def verify(self, context):
    return Present(context.session_identifier) if noted("export", context) else Absent()
"""


def publish(bus: Bus, what: str, count: int, **data: Any) -> list[str]:
    """Publish small records inside their events; returns the event ids, which are their sessions too."""
    ids = [f"{what} {number}" for number in range(count)]
    for number, name in enumerate(ids):
        record = small(number)
        bus.publish(built(name, inline(f"{what}-{number}.xml", record.content), event_id=name, **data))
    return ids


def hold(service: Service, here: Site, count: int) -> None:
    """Wait until so many exports have begun."""
    service.wait_for(lambda: len(here.ledger("held", "begin")) >= count, "the exports that are held")


def release(here: Site) -> None:
    """Let held exports end."""
    (here.plugins / "held.go").touch()


def unsent(here: Site) -> int:
    """Count the messages that are not marked as sent."""
    return len(here.sql("SELECT seq FROM outbox WHERE sent_at IS NULL"))


def exported_once(here: Site, bus: Bus, service: Service, ids: Sequence[str], plugin: str = "held") -> None:
    """Check that every event gets its outcome in time, and that each had one effect and one outcome."""
    ends_at = time.monotonic() + MENDED_SECONDS
    for event_id in ids:
        outcome = bus.outcome(event_id, seconds=max(0.1, ends_at - time.monotonic()), log=service.log)
        assert outcome.data["status"] == "COMPLETED", outcome.data
    assert Counter(entry["session"] for entry in here.ledger(plugin)) == Counter(ids)
    # a message may come again after a database error, but then it is the same one
    assert len({item.body for item in bus.heard}) == len(ids)
    rows = here.sql("SELECT session_identifier, destination_name FROM upload_log WHERE success")
    wanted = [(event_id, name) for event_id in ids for name in (plugin, "local_archive")]
    assert Counter((row["session_identifier"], row["destination_name"]) for row in rows) == Counter(wanted)
    wait_for(lambda: unsent(here) == 0, 5, "an empty outbox", service.log)
    assert (bus.depth(), bus.depth(DEAD_QUEUE)) == (0, 0)


# --- another program holds the lock of SQLite ------------------------------------------------------------------


@contextmanager
def locked(here: Site) -> Iterator[None]:
    """Hold the write lock, as a backup or a person's shell may."""
    with closing(sqlite3.connect(here.folder / "test.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_events_and_results_wait_for_a_locked_database(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url, plugins={"held": HELD}) as (here, bus):
        service = here.start()
        ids = publish(bus, "running", 4)
        hold(service, here, 4)
        with locked(here):
            began = time.monotonic()
            release(here)
            while (passed := time.monotonic() - began) < LOCKED_SECONDS:
                ids += publish(bus, f"after {passed:.0f} s", 2)
                service.wait_for(lambda until=began + passed + 1: time.monotonic() > until, "the next second")  # type: ignore[misc]
            # the attempts are over, but nobody may hear so before it is written down
            assert len(here.ledger("held")) == 4
            assert bus.heard == []
            assert here.sql("SELECT count(*) AS n FROM jobs") == [{"n": 4}]
        exported_once(here, bus, service, ids)
        assert len(bus.heard) == len(ids)


def test_a_service_stops_and_starts_while_the_database_is_locked(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url, plugins={"held": HELD}) as (here, bus):
        service = here.start()
        ids = publish(bus, "running", 2)
        hold(service, here, 2)
        with locked(here):
            release(here)
            ids += publish(bus, "waiting", 3)
            service.wait_for(lambda: len(here.ledger("held")) == 2 and bus.depth() == 0, "the deliveries")
            service.shut_down()  # in its time, whatever its database does
            wait_for(lambda: bus.depth() == 3, 5, "what was not acked, back in the queue", service.log)
            again = here.start(ready=False)
            lock_file = here.folder / "test.db.lock"
            again.wait_for(lambda: lock_file.read_text() == str(again.pid), "the new engine before the database")
        exported_once(here, bus, again, ids)


# --- no room on a disk -----------------------------------------------------------------------------------------


@contextmanager
def disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """Put a small file system of its own on a folder; as a plain user with the help of sudo."""
    folder.mkdir(parents=True)
    owner = f"size={kilobytes}k,mode=0755,uid={os.getuid()},gid={os.getgid()}"
    before = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    try:
        command = [*before, "mount", "-t", "tmpfs", "-o", owner, "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a full disk needs a small file system, which this user may not mount: {error}")
    try:
        yield folder
    finally:
        subprocess.run([*before, "umount", "--lazy", folder], check=True)


def fill(folder: Path, *, spare_bytes: int = 0) -> None:
    """Leave no more than ``spare_bytes`` on the disk of a folder."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * PAGE_BYTES)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - the loop has no other end
    os.truncate(filler, filler.stat().st_size - spare_bytes)


def make_room(folder: Path) -> None:
    """Give the disk back what ``fill`` took."""
    (folder / "filler").unlink()


def logged(service: Service, event: str) -> list[dict[str, Any]]:
    """Return the whole lines of one kind in the log of a service."""
    lines = [line for line in service.logged().splitlines() if line.startswith("{") and line.endswith("}")]
    return [entry for entry in map(json.loads, lines) if entry.get("event") == event]


def test_events_and_results_wait_for_room_on_the_disk_of_the_database(
    tmp_path: Path, amqp_url: str, rabbitmq: RabbitServer
) -> None:
    # a delivery that went back so often would be a dead letter; the queue's own limit is only larger
    vhost = urlsplit(amqp_url).path.strip("/")
    policy = {"pattern": "export$", "definition": {"delivery-limit": 3}, "apply-to": "queues"}
    with (
        disk(tmp_path / "disk", 4096) as folder,
        site(tmp_path, amqp_url, f"sqlite:///{folder}/test.db", plugins={"held": HELD}) as (here, bus),
    ):
        service = here.start()
        rabbitmq.api("PUT", f"policies/{vhost}/few", policy)
        ids = publish(bus, "running", 3)
        hold(service, here, 3)
        fill(folder)
        release(here)
        ids += publish(bus, "waiting", 5)
        bus.publish(b"{")  # no event at all: it has to wait too
        service.wait_for(lambda: len(logged(service, "database_away")) >= 6, "six tries to take the events")
        service.wait_for_log('"result_not_written"')
        for event in ("database_away", "result_not_written"):
            assert all("disk is full" in entry["reason"] for entry in logged(service, event))
        assert len(here.ledger("held")) == 3
        assert bus.heard == []
        assert here.sql("SELECT count(*) AS n FROM jobs") == [{"n": 3}]
        assert bus.depth(DEAD_QUEUE) == 0
        make_room(folder)
        letter = bus.letter(lambda item: item.body == b"{", log=service.log)
        assert letter.headers["nexus-error-code"] == "not_json"
        exported_once(here, bus, service, ids)
        assert len(bus.letters) == 1


def test_an_outcome_is_not_sent_for_ever_when_the_database_cannot_say_so(tmp_path: Path, amqp_url: str) -> None:
    with (
        disk(tmp_path / "disk", 4096) as folder,
        site(tmp_path, amqp_url, f"sqlite:///{folder}/test.db", plugins={"works": WORKS}) as (here, bus),
        ExitStack() as stack,
    ):
        assert here.run("db", "upgrade").returncode == 0
        reader = stack.enter_context(closing(sqlite3.connect(folder / "test.db")))
        reader.execute("SELECT * FROM outbox")  # what SQLite needs for an open database stays on the disk then
        record = small(1)
        (tmp_path / record.name).write_bytes(record.content)
        assert here.run("export", tmp_path / record.name).returncode == 0  # its outcome waits for a broker
        fill(folder)
        service = here.start()
        service.wait_for(lambda: len(logged(service, "outbox_database_away")) >= 4, "four tries to write it down")
        assert all("disk is full" in entry["reason"] for entry in logged(service, "outbox_database_away"))
        assert len(bus.heard) == 1
        make_room(folder)
        service.wait_for(lambda: unsent(here) == 0, "the mark")
        service.shut_down()
        assert len(bus.heard) == 1


def test_records_wait_for_room_on_the_disk_of_the_spool(tmp_path: Path, amqp_url: str) -> None:
    with (
        disk(tmp_path / "spool", 128) as folder,
        site(tmp_path, amqp_url, plugins={"held": HELD}) as (here, bus),
    ):
        service = here.start()
        ids = publish(bus, "kept", 1)
        hold(service, here, 1)
        fill(folder)
        records = [small(number, size=9_000) for number in range(3)]
        for record in records:
            bus.publish(built(record.session, here.write(record), event_id=record.session))
        service.wait_for_log('"records_unreadable"')
        (told,) = logged(service, "records_unreadable")
        assert str(folder) in told["reason"]
        assert "No space left" in told["reason"]
        for record in records:
            job = here.job(record.session)
            assert job is not None
            assert (job["state"], job["snapshot_tries"]) == ("open", 0)
        # what was kept before goes on
        release(here)
        assert bus.outcome(*ids, log=service.log).data["status"] == "COMPLETED"
        assert len(bus.heard) == 1
        make_room(folder)
        exported_once(here, bus, service, [*ids, *(record.session for record in records)])
        assert all(here.archived(record).read_bytes() == record.content for record in records)
        assert len(logged(service, "records_readable_again")) == 1
        assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == sorted(
            ["kept-0.xml", *(record.name for record in records)]
        )


def test_a_full_archive_shows_nothing_that_is_not_whole(tmp_path: Path, amqp_url: str) -> None:
    with (
        disk(tmp_path / "archive", 256) as folder,
        site(tmp_path, amqp_url, plugins={"works": WORKS}) as (here, bus),
    ):
        service = here.start()
        first = small(1)
        bus.publish(built(first.session, inline(first.name, first.content), event_id="first"))
        assert bus.outcome("first", log=service.log).data["status"] == "COMPLETED"
        before = files(folder)
        fill(folder, spare_bytes=3 * PAGE_BYTES)  # room for the file of a check, a folder and the half of a record
        other, newer = small(2, size=30_000), first.content + b"<!--" + b"x" * 30_000 + b"-->"
        bus.publish(built(other.session, inline(other.name, other.content), event_id="other"))
        bus.publish(built(first.session, inline(first.name, newer), event_id="newer"))
        service.wait_for(lambda: here.sql("SELECT * FROM lanes WHERE state = 'paused'"), "the pause of the archive")
        (lane,) = here.sql("SELECT * FROM lanes WHERE destination = 'local_archive'")
        assert "disk full" in lane["reason"]
        service.wait_for(lambda: len(here.ledger("works")) == 3, "the other destination")
        # the check has room, so the lane goes on and meets the full disk again
        service.wait_for(lambda: '"lane_resumed"' in service.logged(), "a probe of the archive")
        service.wait_for(lambda: here.sql("SELECT * FROM lanes WHERE state = 'paused'"), "the second pause")
        # the version that is to be replaced has its second name already, and nothing else is new
        kept = str(here.archived(first).with_suffix(".v1.xml").relative_to(folder))
        assert files(folder) == {**before, kept: first.content}
        assert len(bus.heard) == 1
        make_room(folder)
        for event_id in ("other", "newer"):
            outcome = bus.outcome(event_id, log=service.log)
            assert outcome.data["status"] == "COMPLETED"
            assert outcome.result("local_archive")["attempts"] == 1  # the wait for room is no attempt
        assert here.archived(other).read_bytes() == other.content
        assert here.archived(first).read_bytes() == newer
        assert here.archived(first).with_suffix(".v1.xml").read_bytes() == first.content
        assert len(here.ledger("works")) == 3


def files(folder: Path) -> dict[str, bytes]:
    """Return everything in an archive that is not the filler, also what is hidden."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name != "filler"}


# --- PostgreSQL is restarted in order --------------------------------------------------------------------------


def test_postgresql_may_be_restarted_while_events_come(
    tmp_path: Path, amqp_url: str, postgres: PostgresServer
) -> None:
    postgres.start()
    url = postgres.create_database("restarted")
    try:
        with site(tmp_path, amqp_url, url, plugins={"held": HELD}) as (here, bus):
            service = here.start()
            ids = publish(bus, "running", 4)
            hold(service, here, 4)
            for number in (1, 2):
                ids += publish(bus, f"before restart {number}", 10)
                postgres.stop()
                ids += publish(bus, f"during restart {number}", 10)
                release(here)
                service.wait_for(lambda n=number: len(logged(service, "database_away")) >= n, "the missing database")  # type: ignore[misc]
                postgres.start()
                ids += publish(bus, f"after restart {number}", 10)
                service.wait_for(lambda: bus.depth() == 0, "the deliveries")
            exported_once(here, bus, service, ids)
    finally:
        postgres.drop_database("restarted")
