"""Starts, stops, crashes and lost servers: work goes on where it was, and nothing is done twice."""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import (
    DEAD_QUEUE,
    WORK_QUEUE,
    WORKS,
    Bus,
    Heard,
    Service,
    Site,
    built,
    inline,
    job_of,
    outcome_id,
    site,
    small,
)
from tools.servers.postgresql import PostgresServer
from tools.servers.process import send, wait_for
from tools.servers.rabbitmq import RabbitServer

#: Async, slow, and can be asked; what it notes is its effect.
CHECKED = """
settle_seconds = 0
limits = Limits(concurrency=4)

async def export(self, context):
    import asyncio
    await asyncio.sleep(0.02)
    note("export", context)
    await asyncio.sleep(0.02)
    return done(context)

async def verify(self, context):
    return Present(context.session_identifier) if noted("export", context) else Absent()
"""

#: Begins, and ends only when the test says so.
HELD = """
settle_seconds = 0

{kind} export(self, context):
    note("begin", context)
    while not LEDGER.with_suffix(".go").exists():
        {wait}
    note("export", context)
    return done(context)

def verify(self, context):
    return Present(context.session_identifier) if noted("export", context) else Absent()
"""
HELD_ASYNC = HELD.format(kind="async def", wait="await __import__('asyncio').sleep(0.02)")
HELD_THREAD = HELD.format(kind="def", wait="time.sleep(0.02)")

STUBBORN = """
async def export(self, context):
    note("export", context)
    if not LEDGER.with_suffix(".ok").exists():
        raise Permanent("no such project", code="no_project")
    return done(context)
"""


def publish(bus: Bus, count: int, **data: Any) -> list[str]:
    """Publish so many small records; returns their event ids, which are their sessions too."""
    ids = [f"record {number}" for number in range(count)]
    for number, name in enumerate(ids):
        record = small(number)
        bus.publish(built(name, inline(f"{number}-{record.name}", record.content), event_id=name, **data))
    return ids


def exported_once(here: Site, plugin: str, ids: list[str]) -> None:
    """Check that each record had one effect."""
    assert Counter(entry["session"] for entry in here.ledger(plugin)) == Counter(ids)


def release(here: Site, *plugins: str) -> None:
    """Let held exports end."""
    for plugin in plugins:
        (here.plugins / f"{plugin}.go").touch()


def hold(service: Service, here: Site, plugin: str, count: int = 1) -> None:
    """Wait until so many exports have begun."""
    service.wait_for(lambda: len(here.ledger(plugin, "begin")) >= count, f"the exports of {plugin}")


# --- stops -----------------------------------------------------------------------------------------------------


def test_sigterm_cuts_a_slow_export_and_the_next_start_goes_on(tmp_path: Path, amqp_url: str) -> None:
    plugins = {"held_async": HELD_ASYNC, "held_thread": HELD_THREAD, "works": WORKS}
    with site(tmp_path, amqp_url, plugins=plugins, NX_WORKS_TIMEOUT_SECONDS="5") as (here, bus):
        for name in ("held_async", "held_thread"):
            here.plugin(name, plugins[name], priority=50)
        service = here.start()
        (event_id,) = publish(bus, 1)
        hold(service, here, "held_async")
        hold(service, here, "held_thread")
        began = time.monotonic()
        service.shut_down()  # within 10 s, exit code 0
        assert time.monotonic() - began < 10
        states = {name: step["state"] for name, step in here.steps(event_id).items()}
        assert states["held_async"] == states["held_thread"] == "unsettled"
        assert (here.job(event_id) or {})["state"] == "open"
        assert bus.heard == []
        assert bus.depth() == 0  # it is in the database

        release(here, "held_async", "held_thread")
        again = here.start()
        outcome = bus.outcome(event_id, log=again.log)
        assert outcome.data["status"] == "COMPLETED"
        for plugin in plugins:
            exported_once(here, plugin, [event_id])
        codes = [(row["destination_name"], row["error_code"]) for row in here.log_rows(event_id)]
        assert codes.count(("held_async", "interrupted")) == 1
        assert codes.count(("held_async", None)) == 1


def test_a_quick_export_may_end_before_the_stop(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url, plugins={"held": HELD_ASYNC}) as (here, bus):
        service = here.start()
        (event_id,) = publish(bus, 1, destinations=["held"])
        hold(service, here, "held")
        send(service.pid, signal.SIGTERM)
        service.wait_for_log('"stopping"')
        release(here, "held")
        assert service.wait_for_exit() == 0
        # even its outcome went out
        assert bus.outcome(event_id).data["status"] == "COMPLETED"
        exported_once(here, "held", [event_id])


def test_killed_again_and_again_each_record_is_exported_once(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url, plugins={"checked": CHECKED}) as (here, bus):
        service = here.start()
        ids = publish(bus, 50)
        for reached in (5, 20, 35):
            service.wait_for(lambda reached=reached: len(here.ledger("checked")) >= reached, f"{reached} exports")  # type: ignore[misc]
            service.kill()
            service = here.start()
        outcomes = {event_id: bus.outcome(event_id, seconds=30, log=service.log) for event_id in ids}
        assert {outcome.data["status"] for outcome in outcomes.values()} == {"COMPLETED"}
        exported_once(here, "checked", ids)
        # a message may be sent again after a crash, but then it is the same one
        for event_id in ids:
            assert {item.body for item in bus.outcomes(event_id)} == {outcomes[event_id].body}
        service.shut_down()
        assert bus.depth() == 0
        assert len(list(here.archive.rglob("*.xml"))) == 50
        assert here.sql("SELECT seq FROM outbox WHERE sent_at IS NULL") == []


def test_a_database_that_is_away_does_not_hold_up_the_stop(
    tmp_path: Path, amqp_url: str, postgres: PostgresServer
) -> None:
    postgres.start()
    url = postgres.create_database("away")
    with site(tmp_path, amqp_url, url, plugins={"held": HELD_ASYNC}) as (here, bus):
        service = here.start()
        publish(bus, 1)
        hold(service, here, "held")
        postgres.kill()
        release(here, "held")
        service.wait_for_log('"result_not_written"')
        service.shut_down()
        postgres.start()
    postgres.drop_database("away")


def test_a_second_engine_on_one_sqlite_file_is_refused(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url) as (here, _bus):
        service = here.start()
        for arguments in (("run",), ("export", str(tmp_path / "none.xml"))):
            second = here.run(*arguments)
            assert second.returncode == 2
            assert f"process {service.pid}" in second.stderr
            assert "PostgreSQL" in second.stderr
            assert "Traceback" not in second.stderr


def test_two_services_on_one_postgresql_share_the_work(
    tmp_path: Path, amqp_url: str, postgres: PostgresServer
) -> None:
    postgres.start()
    url = postgres.create_database("shared")
    limits: dict[str, Any] = {"NX_COUNTED_CONCURRENCY": "2"}
    counted = WORKS.replace("    return", '    __import__("time").sleep(0.03)\n    return').replace("async ", "")
    try:
        with site(tmp_path, amqp_url, url, plugins={"counted": counted}, **limits) as (here, bus):
            first, second = here.start(ready=False), here.start(ready=False)
            for service in (first, second):
                service.wait_for_log('"broker_connected"')
            ids = publish(bus, 60)
            for event_id in ids:
                assert bus.outcome(event_id, log=first.log).data["status"] == "COMPLETED"
            exported_once(here, "counted", ids)
            assert {entry["pid"] for entry in here.ledger("counted")} == {first.pid, second.pid}
            assert len(bus.heard) == 60
            rows = here.sql("SELECT destination_name, count(*) AS n FROM upload_log GROUP BY destination_name")
            assert {row["destination_name"]: row["n"] for row in rows} == {"counted": 60, "local_archive": 60}
            first.shut_down()
            second.shut_down()
            assert bus.depth() == 0
    finally:
        postgres.drop_database("shared")


# --- the broker ------------------------------------------------------------------------------------------------


#: RabbitMQ writes the votes of a new quorum queue to the disk only after 5 s. When it is killed before that, the
#: queue has no leader afterwards (rabbitmq-server issue 10070), whoever asks for it.
VOTED_SECONDS = 6.0


@pytest.fixture(scope="module", autouse=True)
def aged(rabbitmq: RabbitServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, float]]:
    """Give a virtual host whose queues are declared before everything else here, and when that was."""
    rabbitmq.start()
    url = rabbitmq.create_vhost("aged")
    with site(tmp_path_factory.mktemp("aged"), url) as (here, _bus):
        here.start()
    yield url, time.monotonic()
    rabbitmq.start()
    rabbitmq.delete_vhost("aged")


def test_the_broker_may_be_killed_and_come_back(
    tmp_path: Path, aged: tuple[str, float], rabbitmq: RabbitServer
) -> None:
    amqp_url, declared_at = aged
    late_url = rabbitmq.create_vhost("late")
    with site(tmp_path / "first", amqp_url, plugins={"held": HELD_ASYNC}) as (here, bus):
        bus.declare("listener")
        with Bus(amqp_url, queue="listener"):
            service = here.start()
            wait_for(lambda: time.monotonic() > declared_at + VOTED_SECONDS, VOTED_SECONDS + 1, "votes on the disk")
            ids = publish(bus, 5)
            hold(service, here, "held", 5)
            rabbitmq.kill()
        release(here, "held")
        # what was accepted goes on without the broker, and another service waits for it to come
        late = Site(tmp_path / "late", late_url)
        patient = late.start(ready=False)
        here.running.append(patient)
        service.wait_for(lambda: all(state(here, name) == "exported" for name in ids), "the exports")
        service.wait_for_log('"broker_lost"')
        patient.wait_for_log('"broker_lost"')
        rabbitmq.start()
        with Bus(amqp_url, queue="listener") as again, Bus(late_url) as beside:
            for event_id in ids:
                assert again.outcome(event_id, log=service.log).data["status"] == "COMPLETED"
            exported_once(here, "held", ids)
            wait_for(again.consumers, 10, "the consumer of the work queue", service.log)
            record = small(9)
            again.publish(built(record.session, inline("a.xml", record.content), event_id="after"))
            assert again.outcome("after", log=service.log).data["status"] == "COMPLETED"

            patient.wait_for_log('"broker_connected"')
            beside.publish(built(record.session, inline("a.xml", record.content), event_id="late"))
            assert beside.outcome("late", log=patient.log).data["status"] == "COMPLETED"
    rabbitmq.delete_vhost("late")


def state(here: Site, event_id: str) -> str:
    return str((here.job(event_id) or {"state": "none"})["state"])


@pytest.mark.parametrize("queue", [WORK_QUEUE, DEAD_QUEUE])
def test_a_queue_that_was_deleted_is_declared_again(tmp_path: Path, amqp_url: str, queue: str) -> None:
    with site(tmp_path, amqp_url) as (here, bus):
        service = here.start()
        wait_for(bus.consumers, 5, "a consumer", service.log)
        bus.delete(queue)
        if queue == WORK_QUEUE:
            wait_for(bus.consumers, 10, "the work queue and its consumer", service.log)
            wait_for(lambda: here.sql("SELECT at FROM notices"), 10, "the notice of the loss", service.log)
        doctor = here.run("doctor").stdout
        assert ("was declared again" in doctor) == (queue == WORK_QUEUE)
        good, bad = small(1), small(2)
        bus.publish(built(good.session, inline("a.xml", good.content), event_id="ok"))
        bus.publish(built(bad.session, inline("b.xml", bad.content), event_id="bad", destinations=["nowhere"]))
        assert bus.outcome("ok", log=service.log).data["status"] == "COMPLETED"
        assert bus.outcome("bad", log=service.log).data["status"] == "BUILT_NOT_EXPORTED"
        wait_for(lambda: bus.depth(DEAD_QUEUE) == 1, 10, "the dead letter", service.log)


def test_a_wrong_password_ends_with_a_sentence(tmp_path: Path, amqp_url: str) -> None:
    here = Site(tmp_path, amqp_url)
    done = here.run("run", NX_AMQP_URL=amqp_url.replace("guest:guest", "guest:wrong"))
    assert done.returncode == 2
    assert "refuses the user or password in NX_AMQP_URL" in done.stderr
    assert "guest:wrong" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_virtual_host_that_is_not_there_ends_with_a_sentence(tmp_path: Path, amqp_url: str) -> None:
    done = Site(tmp_path, amqp_url).run("run", NX_AMQP_URL=f"{amqp_url}-none")
    assert done.returncode == 2
    assert "no such virtual host" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("queue", [WORK_QUEUE, DEAD_QUEUE])
def test_a_queue_with_other_arguments_ends_with_a_sentence(tmp_path: Path, amqp_url: str, queue: str) -> None:
    with Bus(amqp_url) as bus:
        bus.declare(queue)
        done = Site(tmp_path, amqp_url).run("run")
        assert done.returncode == 2
        assert queue in done.stderr
        assert "exists with other arguments" in done.stderr
        assert "Traceback" not in done.stderr
        assert bus.depth(queue) == 0  # and it was not touched


# --- the database ----------------------------------------------------------------------------------------------


def test_postgresql_may_be_killed_and_come_back(tmp_path: Path, amqp_url: str, postgres: PostgresServer) -> None:
    postgres.start()
    url = postgres.create_database("killed")
    with site(tmp_path, amqp_url, url, plugins={"held": HELD_ASYNC}) as (here, bus):
        service = here.start()
        ids = publish(bus, 3)
        hold(service, here, "held", 3)
        postgres.kill()
        record = small(9)
        bus.publish(built(record.session, inline("a.xml", record.content), event_id="meanwhile"))
        release(here, "held")
        service.wait_for_log('"result_not_written"')
        service.wait_for_log('"database_away"')
        postgres.start()
        for event_id in [*ids, "meanwhile"]:
            assert bus.outcome(event_id, seconds=30, log=service.log).data["status"] == "COMPLETED"
        assert len(here.ledger("held")) == 4
        service.shut_down()
        assert bus.depth() == 0
    postgres.drop_database("killed")


# --- replay ----------------------------------------------------------------------------------------------------


def test_a_dead_letter_that_is_moved_back_replays_its_job_once(
    tmp_path: Path, amqp_url: str, database_url: str
) -> None:
    plugins = {"works": WORKS, "stubborn": STUBBORN}
    with site(tmp_path, amqp_url, database_url, plugins=plugins) as (here, bus):
        service = here.start()
        (event_id,) = publish(bus, 1)
        failed = bus.outcome(event_id, log=service.log)
        assert (failed.data["status"], failed.data["revision"]) == ("BUILT_NOT_EXPORTED", 1)
        assert failed.result("stubborn")["error_code"] == "no_project"
        first = letter_of(bus, event_id, 1)

        # moved back too early: it fails again, as a new revision with a letter of its own
        bus.requeue(first)
        again = bus.outcome(event_id, revision=2, log=service.log)
        assert again.event["id"] == outcome_id(event_id, 2)
        assert again.data["status"] == "BUILT_NOT_EXPORTED"
        second = letter_of(bus, event_id, 2)

        (here.plugins / "stubborn.ok").touch()
        bus.requeue(first)  # stale: the job has moved on
        bus.requeue(second)
        mended = bus.outcome(event_id, revision=3, log=service.log)
        assert mended.event["id"] == outcome_id(event_id, 3)
        assert mended.data["status"] == "COMPLETED"
        assert mended.data["cause"] == failed.data["cause"]

        for letter in (second, second, first, second, second):
            bus.requeue(letter)
        record = small(7)
        bus.publish(built(record.session, inline("behind.xml", record.content), event_id="behind"))
        bus.outcome("behind", log=service.log)
        service.shut_down()
        assert [item.data["revision"] for item in bus.outcomes(event_id)] == [1, 2, 3]
        job = here.job(event_id)
        assert job is not None
        assert (job["state"], job["revision"]) == ("exported", 3)
        calls = Counter(entry["session"] for entry in here.ledger("stubborn"))
        assert calls[event_id] == 3
        # what had succeeded before was not sent again
        assert Counter(entry["session"] for entry in here.ledger("works"))[event_id] == 1
        bus.fetch_letters()
        assert len(bus.letters) == 2
        assert bus.depth() == 0


def letter_of(bus: Bus, event_id: str, revision: int) -> Heard:
    """Wait for the dead letter of a revision."""
    wanted = f"{job_of(event_id)}/{revision}"
    return bus.letter(lambda item: item.headers.get("nexus-replay-of") == wanted)


def test_a_record_that_was_mended_is_replayed(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url, NX_RECORD_WAIT_SECONDS="0") as (here, bus):
        service = here.start()
        record = small(1)
        data = here.write(record)
        (here.records / record.name).unlink()
        bus.publish(built(record.session, data, event_id="mended"))
        assert bus.outcome("mended", log=service.log).result("local_archive")["error_code"] == "record_missing"
        here.write(record)
        bus.requeue(letter_of(bus, "mended", 1))
        outcome = bus.outcome("mended", revision=2, log=service.log)
        assert outcome.event["id"] == outcome_id("mended", 2)
        assert outcome.data["status"] == "COMPLETED"
        assert here.archived(record).read_bytes() == record.content
