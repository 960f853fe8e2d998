"""Outcomes that go out once more: the same bytes and id, of each record the newest, and nothing else."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aio_pika
import pytest

from tests.integration.harness import (
    DEAD_QUEUE,
    EXCHANGE,
    STRUCTURED,
    WORKS,
    Bus,
    Service,
    Site,
    built,
    inline,
    outcome_id,
    site,
    small,
)
from tools.servers.ports import free_port

UNSENT = "SELECT seq FROM outbox WHERE sent_at IS NULL"

STUBBORN = """
async def export(self, context):
    note("export", context)
    if context.session_identifier == "bad" and not LEDGER.with_suffix(".ok").exists():
        raise Permanent("no such project", code="no_project")
    return done(context)
"""


def event(name: str, number: int = 1) -> dict[str, Any]:
    """Write the built event of a session of that name, and with that id."""
    return built(name, inline(f"{number}.xml", small(number).content), event_id=name)


async def publish_unheard(url: str, *events: dict[str, Any]) -> None:
    """Publish as a builder does in a laboratory where nobody listens yet."""
    async with await aio_pika.connect(url) as connection, connection.channel(on_return_raises=True) as channel:
        exchange = await channel.get_exchange(EXCHANGE, ensure=False)
        for item in events:
            message = aio_pika.Message(json.dumps(item).encode(), content_type=STRUCTURED)
            await exchange.publish(message, "record.built")


def sent(here: Site, service: Service, count: int) -> list[dict[str, Any]]:
    """Wait until so many messages were confirmed; returns the outcomes, oldest first."""
    query = "SELECT * FROM outbox WHERE sent_at IS NOT NULL ORDER BY seq"
    service.wait_for(lambda: len(here.sql(query)) == count, f"{count} messages sent")
    return [row for row in here.sql(query) if row["kind"] == "outcome"]


def republish(here: Site, *options: str) -> int:
    """Run the command; returns how many outcomes it says go out."""
    done = here.run("republish", "--json", *options)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["outcomes"])


def all_sent(here: Site, service: Service) -> None:
    """Wait until nothing in the outbox waits."""
    service.wait_for(lambda: not here.sql(UNSENT), "an empty outbox")


def heard(bus: Bus) -> list[str]:
    """Return the events that outcomes were heard of, in order, and forget them."""
    found = [item.cause for item in bus.heard]
    bus.heard.clear()
    return found


def test_what_no_queue_took_comes_to_the_first_listener(tmp_path: Path, amqp_url: str, database_url: str) -> None:
    here = Site(tmp_path, amqp_url, database_url)
    service = here.start()
    try:
        asyncio.run(publish_unheard(amqp_url, event("one", 1), event("two", 2)))
        rows = sent(here, service, 2)
        assert all(row["unrouted"] for row in rows)
        with Bus(amqp_url) as bus:
            done = here.run("republish", "--unrouted")
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith("2 outcomes on the way again")
            for row in rows:
                name = json.loads(bytes(row["body"]))["data"]["session_identifier"]
                outcome = bus.outcome(name, log=service.log)
                assert outcome.body == bytes(row["body"])
                assert (outcome.message_id, outcome.event["id"]) == (row["message_id"], outcome_id(name))
                assert (outcome.routing_key, outcome.content_type) == (row["routing_key"], row["content_type"])
                assert outcome.persistent
            all_sent(here, service)
            after = here.sql("SELECT * FROM outbox ORDER BY seq")
            assert [row["unrouted"] for row in after] == [False, False]
            kept = ("seq", "kind", "message_id", "headers", "body", "created_at")
            assert [[row[name] for name in kept] for row in after] == [[row[name] for name in kept] for row in rows]
            assert republish(here, "--unrouted") == 0  # they have arrived
            assert sorted(heard(bus)) == ["one", "two"]
        service.shut_down()
    finally:
        if service.exit_code is None:
            service.kill()


def test_time_and_session_choose_what_goes_out(tmp_path: Path, amqp_url: str) -> None:
    today = datetime.now(UTC).date()
    yesterday, later = today - timedelta(days=1), today + timedelta(days=2)
    choices: list[tuple[list[str], list[str]]] = [
        (["--since", f"{yesterday}"], ["a", "b", "c"]),
        (["--since", f"{today}T00:00:00+00:00", "--until", f"{later}"], ["a", "b", "c"]),
        (["--since", "1h", "--session", "b", "--session", "c"], ["b", "c"]),
        (["--session", "a"], ["a"]),
        (["--session", "A"], []),
        (["--session", "a", "--until", f"{yesterday}"], []),
        (["--session", "a", "--since", f"{later}"], []),
        (["--unrouted"], []),
    ]
    with site(tmp_path, amqp_url) as (here, bus):
        service = here.start()
        for number, name in enumerate("abc"):
            bus.publish(event(name, number))
            first = bus.outcome(name, log=service.log)
            assert first.event["id"] == outcome_id(name)
        sent(here, service, 3)
        bodies = {item.cause: item.body for item in bus.heard}
        heard(bus)
        for options, expected in choices:
            assert republish(here, *options) == len(expected), options
            for name in expected:
                assert bus.outcome(name, log=service.log).body == bodies[name]
            all_sent(here, service)
            assert heard(bus) == expected, options

        middle = here.sql("SELECT created_at FROM outbox ORDER BY seq")[1]["created_at"]
        assert republish(here, "--since", middle, "--dry-run") == 2  # from then on
        assert republish(here, "--since", "1d", "--until", middle, "--dry-run") == 1  # before then


def test_only_the_newest_revision_goes_out_and_no_dead_letter(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url, plugins={"stubborn": STUBBORN}) as (here, bus):
        service = here.start()
        broken = event("poison")
        broken["data"]["dt_from"] = "yesterday"
        bus.publish(broken)
        bus.publish(event("bad"))
        poison, failed = bus.outcome("poison", log=service.log), bus.outcome("bad", log=service.log)
        assert failed.data["status"] == "BUILT_NOT_EXPORTED"
        service.wait_for(lambda: bus.depth(DEAD_QUEUE) == 2, "the dead letters")
        all_sent(here, service)
        heard(bus)
        assert republish(here, "--since", "1h") == 2
        assert bus.outcome("poison", log=service.log).body == poison.body
        assert bus.outcome("bad", log=service.log).body == failed.body
        all_sent(here, service)
        assert bus.depth(DEAD_QUEUE) == 2

        (here.plugins / "stubborn.ok").touch()
        letter = bus.letter(lambda item: "nexus-replay-of" in item.headers)
        bus.requeue(letter)
        mended = bus.outcome("bad", revision=2, log=service.log)
        all_sent(here, service)
        heard(bus)
        # the outcome of a poison event has no job, and is found by its session all the same
        assert republish(here, "--session", "bad", "--session", "poison") == 2
        assert bus.outcome("bad", revision=2, log=service.log).body == mended.body
        assert bus.outcome("poison", log=service.log).body == poison.body
        all_sent(here, service)
        assert len(bus.heard) == 2
        assert bus.depth(DEAD_QUEUE) == 0  # both were fetched, and none was sent again


def test_a_dry_run_sends_nothing(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url, plugins={"works": WORKS}) as (here, bus):
        service = here.start()
        bus.publish(event("dry"))
        bus.outcome("dry", log=service.log)
        all_sent(here, service)
        before = here.sql("SELECT * FROM outbox")
        done = here.run("republish", "--since", "1h", "--dry-run")
        assert done.returncode == 0
        assert done.stdout == "1 outcome would go out again; nothing was changed\n"
        answer = json.loads(here.run("republish", "--since", "1h", "--dry-run", "--json").stdout)
        assert answer == {"outcomes": 1, "dry_run": True, "consumer_running": True}
        assert here.sql("SELECT * FROM outbox") == before
        assert len(bus.heard) == 1


def test_without_a_consumer_it_goes_out_at_the_next_start(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url) as (here, bus):
        service = here.start()
        bus.publish(event("later"))
        first = bus.outcome("later", log=service.log)
        all_sent(here, service)
        service.shut_down()
        heard(bus)
        done = here.run("republish", "--since", "1h")
        assert done.returncode == 0
        assert "1 outcome will go out when a consumer starts" in done.stdout
        assert "nexus-export run" in done.stdout
        assert republish(here, "--since", "1h") == 0  # it is on its way already
        again = here.start()
        assert bus.outcome("later", log=again.log).body == first.body
        assert len(here.log_rows("later")) == 1  # nothing was exported again


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing chosen": ([], "say which outcomes"),
    "until alone": (["--until", "1h"], "say which outcomes"),
    "no time": (["--since", "yesterday"], "--since 'yesterday' is no time"),
    "empty": (["--since", ""], "--since '' is no time"),
    "no zone": (["--since", "2026-01-31T12:00:00"], "is no time"),
    "a number": (["--since", "1700000000"], "is no time"),
    "no such day": (["--since", "2026-02-30"], "is no time"),
    "too old": (["--since", "999999w"], "is no time"),
    "after the calendar": (["--since", "1h", "--until", "9999-12-31"], "--until '9999-12-31' is no time"),
    "backwards": (["--since", "1h", "--until", "2h"], "--since 1h is not before --until 2h"),
    "unit": (["--since", "2y"], "is no time"),
    "no text": (["--session", "\udcff"], "is no UTF-8 text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_end_with_2_and_a_sentence(tmp_path: Path, name: str) -> None:
    options, said = WRONG[name]
    done = Site(tmp_path, f"amqp://127.0.0.1:{free_port()}/").run("republish", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "test.db").exists()


def test_an_empty_database_ends_with_1_and_a_sentence(tmp_path: Path) -> None:
    done = Site(tmp_path, f"amqp://127.0.0.1:{free_port()}/").run("republish", "--unrouted")
    assert done.returncode == 1
    assert "nexus-export run" in done.stderr
    assert not (tmp_path / "test.db").exists()
