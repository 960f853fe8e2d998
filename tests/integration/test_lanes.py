"""Lanes beside each other: one that is broken waits by itself, is tried with one record, and goes on by itself."""

from pathlib import Path
from typing import Any

from tests.integration.harness import QUICK, WORKS, Bus, Service, Site, built, inline, site, small

COUNT = 30
#: The breaker opens after ten failures in a row; what was under way then may fail too.
FAILURES = 10 + 8
#: An open lane is probed after 5 s at first.
PROBE_SECONDS = 20.0

#: Cannot be reached as long as a file lies beside it.
BROKEN = """
async def export(self, context):
    note("export", context)
    if (LEDGER.parent / "closed").exists():
        raise Transient("no route to the server", code="cannot_connect")
    return done(context)
"""


def publish(bus: Bus, count: int, first: int = 0, **data: Any) -> list[str]:
    """Publish records; returns their sessions, which name the events too."""
    names = [f"record-{number}" for number in range(first, first + count)]
    for name in names:
        bus.publish(built(name, inline(f"{name}.xml", small(1).content), event_id=name, **data))
    return names


def lane(here: Site) -> dict[str, Any]:
    """Return what the store knows of the broken destination."""
    rows = here.sql("SELECT * FROM lanes WHERE destination = 'broken'")
    return rows[0] if rows else {"state": "active"}


def wait_until_open(service: Service, here: Site) -> None:
    """Wait until the breaker has opened."""
    service.wait_for(lambda: lane(here)["state"] == "open", "the open lane")


def test_a_breaker_opens_and_closes_by_itself(tmp_path: Path, amqp_url: str, database_url: str) -> None:
    plugins = {"broken": BROKEN, "works": WORKS}
    with site(tmp_path, amqp_url, database_url, plugins=plugins, **QUICK, NX_LOCAL_ARCHIVE_PATH="") as (here, bus):
        (here.plugins / "closed").touch()
        service = here.start()
        names = publish(bus, COUNT)
        wait_until_open(service, here)
        # the other one has not waited for it
        service.wait_for(lambda: len(here.ledger("works")) == COUNT, "the exports elsewhere")
        tried = len(here.ledger("broken"))
        assert tried <= FAILURES
        assert "in a row, the last: no route to the server" in lane(here)["reason"]
        status = here.run("status")
        assert status.returncode == 1
        assert "broken is open since" in status.stdout
        # it knows so after a restart, and tries with one record
        service.shut_down()
        service = here.start()
        service.wait_for(lambda: len(here.ledger("broken")) == tried + 1, "the probe", PROBE_SECONDS)
        assert lane(here)["state"] == "open"
        (here.plugins / "closed").unlink()
        for name in names:
            assert bus.outcome(name, log=service.log, seconds=PROBE_SECONDS).data["status"] == "COMPLETED"
        assert lane(here)["state"] == "active"


#: The first attempt of old records fails; the second takes long.
OLD_AND_NEW = """
limits = Limits(concurrency=2)

async def export(self, context):
    import asyncio
    note("export", context)
    if context.metadata.get("old"):
        if len(noted("export", context)) == 1:
            raise Transient("not yet", retry_after=0)
        await asyncio.sleep(0.5)
    return done(context)
"""


def test_retries_do_not_starve_first_attempts(tmp_path: Path, amqp_url: str) -> None:
    plugins = {"mixed": OLD_AND_NEW}
    with site(tmp_path, amqp_url, plugins=plugins, **QUICK, NX_LOCAL_ARCHIVE_PATH="") as (here, bus):
        service = here.start()
        publish(bus, COUNT, metadata={"old": True})
        service.wait_for(lambda: len(here.ledger("mixed")) > COUNT, "the first retry")
        (new,) = publish(bus, 1, first=COUNT)
        bus.outcome(new, log=service.log)
        # thirty retries of half a second at two slots last 7 s
        assert len(bus.heard) < COUNT / 2
