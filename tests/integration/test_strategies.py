"""Plugins as people write them, good and bad ones, in every strategy: one consumer runs them all."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import WORKS, Bus, Heard, Service, Site, built, inline, outcome_id, site, small
from tools.servers.rabbitmq import RabbitServer

SETTLE_SECONDS = 2.0
RETRY_AFTER_SECONDS = 2.0

PLUGINS = {
    "broken": """
async def export(self, context):
    note("export", context)
    raise Permanent("no", code="never")
""",
    "first": WORKS,
    "second": WORKS,
    "seeing": """
def export(self, context):
    results = {
        name: [context.has_successful_export(name), context.get_result(name) and context.get_result(name).record_url]
        for name in ("broken", "first", "second", "unknown")
    }
    note("export", context, results=results)
    return done(context)
""",
    "linking": """
links_to = ("second",)

def export(self, context):
    note("export", context, results=sorted(context.previous_results), url=context.get_result("second").record_url)
    return done(context)
""",
    "depending": """
depends_on = ("second",)

def export(self, context):
    note("export", context, second=context.has_successful_export("second"))
    return done(context)
""",
    "orphan": """
depends_on = "broken"

def export(self, context):
    note("export", context)
    return done(context)
""",
    "wild": """
def export(self, context):
    note("export", context)
    raise ZeroDivisionError("what a plugin may do\\0")
""",
    "leaving": """
def export(self, context):
    note("export", context)
    raise SystemExit(3)
""",
    "nothing": """
async def export(self, context):
    note("export", context)
""",
    "refusing": """
def export(self, context):
    note("export", context)
    return ExportResult(success=False, destination_name="refusing", error_message="not today")
""",
    "hanging": """
def export(self, context):
    note("export", context)
    time.sleep(4)
    return done(context)
""",
    "sleeping": """
async def export(self, context):
    import asyncio
    note("export", context)
    await asyncio.sleep(3600)
""",
    "found": """
async def export(self, context):
    note("export", context)
    raise UnknownOutcome("the connection was reset")

async def verify(self, context):
    note("verify", context)
    if len(noted("verify", context)) < 2:
        return Unsure("ask again")
    return Present("found-" + context.session_identifier, "https://found.test/")
""",
    "absent": """
async def export(self, context):
    note("export", context)
    if len(noted("export", context)) == 1:
        raise UnknownOutcome("the connection was reset")
    return done(context)

async def verify(self, context):
    note("verify", context)
    return Absent()
""",
    "halved": """
async def export(self, context):
    note("export", context, page=context.remembered.get("page"))
    if "page" not in context.remembered:
        await context.remember(page="17")
        raise UnknownOutcome("before the attachment")
    return done(context)

async def verify(self, context):
    return Partial("17")
""",
    "late": """
async def export(self, context):
    note("export", context)
    raise UnknownOutcome("the connection was reset")

async def verify(self, context):
    note("verify", context, purpose=context.purpose, last=context.last_export and context.last_export.record_id)
    return Present("1", None, ("2", "3") if context.purpose == "recheck" else ())
""",
    "vanished": """
async def export(self, context):
    note("export", context)
    raise UnknownOutcome("the connection was reset")

async def verify(self, context):
    note("verify", context, purpose=context.purpose)
    return Absent() if context.purpose == "recheck" else Present("1")
""",
    "choosy": """
def accepts(self, context):
    return False

def export(self, context):
    note("export", context)
    return done(context)
""",
}

#: Written for NexusLIMS: nothing is imported from here, and the result is a class of its own.
NEXUSLIMS = '''
from dataclasses import dataclass, field
from datetime import datetime


@dataclass
class OwnResult:
    success: bool
    destination_name: str
    record_id: str | None = None
    record_url: str | None = None
    error_message: str | None = None
    timestamp: datetime = field(default_factory=datetime.now)
    metadata: dict = field(default_factory=dict)


class FileDestination:
    """Writes a line for each record."""

    name = "nexuslims_style"
    priority = 20

    @property
    def enabled(self):
        return True

    def validate_config(self):
        return True, None

    def export(self, context):
        names = [context.xml_file_path.name, context.session_identifier, context.instrument_pid, context.user]
        names += [context.dt_from.isoformat(), context.dt_to.isoformat(), str(context.reservation_event.title)]
        names += [str(activity.files) for activity in context.activities]
        with open("nexuslims.txt", "a") as file:
            file.write(context.xml_file_path.read_text()[:5] + "|".join(map(str, names)) + "\\n")
        return OwnResult(True, self.name, record_id="n-1", record_url="https://own.test/1", metadata={"a": {1, 2}})
'''

EVENTS: dict[str, dict[str, Any]] = {
    "first success": {"strategy": "first_success", "destinations": ["broken", "first", "second"]},
    "first success in vain": {"strategy": "first_success", "destinations": ["broken", "refusing"]},
    "best effort": {"strategy": "best_effort", "destinations": ["broken", "first", "second"]},
    "best effort in vain": {"strategy": "best_effort", "destinations": ["broken"]},
    "all": {"strategy": "all", "destinations": ["broken", "first", "second"]},
    "all well": {"strategy": "all", "destinations": ["second", "first"]},
    "seeing": {"destinations": ["broken", "first", "second", "seeing"]},
    "linking": {"destinations": ["linking", "second", "refusing"]},
    "depending": {"destinations": ["depending", "second"]},
    "orphan": {"destinations": ["orphan", "broken", "first"]},
    "alone": {"destinations": ["depending"]},
    "nexuslims": {"destinations": ["nexuslims_style"], "reservation": {"title": "A title"}},
    "wild": {"destinations": ["wild", "first"]},
    "leaving": {"destinations": ["leaving", "first"]},
    "nothing": {"destinations": ["nothing", "first"]},
    "refusing": {"destinations": ["refusing", "first"]},
    "hanging": {"destinations": ["hanging", "first"]},
    "sleeping": {"destinations": ["sleeping", "first"]},
    "found": {"destinations": ["found"]},
    "absent": {"destinations": ["absent"]},
    "halved": {"destinations": ["halved"]},
    "late": {"destinations": ["late"]},
    "vanished": {"destinations": ["vanished"]},
    "choosy": {"destinations": ["choosy", "first"]},
    "only choosy": {"destinations": ["choosy"]},
}


@dataclass
class Running:
    """The consumer with all plugins."""

    site: Site
    bus: Bus
    service: Service

    def outcome(self, name: str) -> Heard:
        """Wait for the outcome of an event."""
        return self.bus.outcome(name, log=self.service.log)

    def succeeded(self, name: str) -> dict[str, bool]:
        """Return what became of an event at each destination, in the order tried."""
        return {result["destination"]: result["success"] for result in self.outcome(name).data["results"]}

    def calls(self, plugin: str, name: str, what: str = "export") -> list[dict[str, Any]]:
        """Return the calls of a plugin for an event."""
        return [entry for entry in self.site.ledger(plugin, what) if entry["session"] == name]


@pytest.fixture(scope="module")
def running(rabbitmq: RabbitServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Publish all events to one consumer."""
    rabbitmq.start()
    url = rabbitmq.create_vhost("strategies")
    settings: dict[str, Any] = {
        "NX_REFUSING_MAX_ATTEMPTS": "3",
        "NX_HANGING_TIMEOUT_SECONDS": "1",
        "NX_SLEEPING_TIMEOUT_SECONDS": "1",
        "NX_ABSENT_SETTLE_SECONDS": f"{SETTLE_SECONDS:g}",
        "NX_HALVED_SETTLE_SECONDS": "1",
        "NX_LATE_SETTLE_SECONDS": f"{SETTLE_SECONDS:g}",
        "NX_VANISHED_SETTLE_SECONDS": f"{SETTLE_SECONDS:g}",
    }
    with site(tmp_path_factory.mktemp("strategies"), url, **settings) as (here, bus):
        for position, (name, text) in enumerate(PLUGINS.items()):
            here.plugin(name, text, priority=900 - position)
        (here.plugins / "nexuslims_style.py").write_text(NEXUSLIMS, encoding="utf-8")
        found = Running(here, bus, here.start())
        for number, (name, data) in enumerate(EVENTS.items()):
            bus.publish(built(name, inline(f"{number}.xml", small(number).content), event_id=name, **data))
        yield found
    rabbitmq.start()
    rabbitmq.delete_vhost("strategies")


def test_first_success_tries_one_after_the_other_and_skips_the_rest(running: Running) -> None:
    outcome = running.outcome("first success")
    assert outcome.data["status"] == "COMPLETED"
    assert running.succeeded("first success") == {"broken": False, "first": True, "second": False}
    second = outcome.result("second")
    assert (second["skipped"], second["next_action"], second["attempts"]) == (True, "none", 0)
    assert running.calls("second", "first success") == []
    broken, first = (running.calls(name, "first success")[0]["at"] for name in ("broken", "first"))
    assert broken < first


def test_first_success_fails_when_all_have_failed(running: Running) -> None:
    outcome = running.outcome("first success in vain")
    assert outcome.data["status"] == "BUILT_NOT_EXPORTED"
    assert running.succeeded("first success in vain") == {"broken": False, "refusing": False}
    assert len(running.calls("refusing", "first success in vain")) == 3


def test_best_effort_tries_all_and_needs_one(running: Running) -> None:
    outcome = running.outcome("best effort")
    assert outcome.data["status"] == "COMPLETED"
    assert running.succeeded("best effort") == {"broken": False, "first": True, "second": True}
    assert outcome.result("broken")["error_code"] == "never"
    assert outcome.result("broken")["next_action"] == "fix_record"
    assert running.outcome("best effort in vain").data["status"] == "BUILT_NOT_EXPORTED"


def test_all_needs_every_one(running: Running) -> None:
    assert running.outcome("all").data["status"] == "BUILT_NOT_EXPORTED"
    assert running.succeeded("all") == {"broken": False, "first": True, "second": True}
    assert running.outcome("all well").data["status"] == "COMPLETED"
    assert list(running.succeeded("all well")) == ["first", "second"]  # by priority, not as named


def test_a_lower_priority_sees_the_results_of_the_higher_ones(running: Running) -> None:
    running.outcome("seeing")
    (call,) = running.calls("seeing", "seeing")
    assert call["results"] == {
        "broken": [False, None],
        "first": [True, "https://first.test/seeing"],
        "second": [True, "https://second.test/seeing"],
        "unknown": [False, None],
    }


def test_a_link_waits_for_its_target_alone(running: Running) -> None:
    running.outcome("linking")
    (call,) = running.calls("linking", "linking")
    assert call["url"] == "https://second.test/linking"
    assert call["at"] > running.calls("second", "linking")[0]["at"]


def test_a_dependency_comes_first_whatever_the_priority(running: Running) -> None:
    assert running.outcome("depending").data["status"] == "COMPLETED"
    (call,) = running.calls("depending", "depending")
    assert call["second"] is True


@pytest.mark.parametrize(("name", "plugin"), [("orphan", "orphan"), ("alone", "depending")])
def test_a_dependency_that_fails_fails_what_depends_on_it(running: Running, name: str, plugin: str) -> None:
    result = running.outcome(name).result(plugin)
    assert (result["success"], result["error_code"], result["attempts"]) == (False, "dependency_failed", 0)
    assert running.calls(plugin, name) == []


def test_a_plugin_written_for_nexuslims_runs_as_it_is(running: Running) -> None:
    outcome = running.outcome("nexuslims")
    result = outcome.result("nexuslims_style")
    assert (result["success"], result["record_id"], result["record_url"]) == (True, "n-1", "https://own.test/1")
    (line,) = (running.site.folder / "nexuslims.txt").read_text(encoding="utf-8").splitlines()
    record = small(list(EVENTS).index("nexuslims"))
    assert line.startswith("<?xml")
    assert f"|nexuslims|{record.instrument_pid}|{record.user}|{record.dt_from.isoformat()}" in line
    assert "A title" in line


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("wild", "plugin_error"),
        ("leaving", "plugin_error"),
        ("nothing", "bad_result"),
        ("hanging", "timeout"),
        ("sleeping", "timeout"),
    ],
)
def test_an_unknown_outcome_that_cannot_be_asked_for_waits_for_a_person(
    running: Running, name: str, code: str
) -> None:
    outcome = running.outcome(name)
    assert outcome.data["status"] == "BUILT_NOT_EXPORTED"
    result = outcome.result(name)
    assert (result["success"], result["error_code"]) == (False, code)
    assert (result["next_action"], result["attempts"]) == ("replay", 1)
    assert outcome.result("first")["success"] is True  # it stops nobody else
    assert running.site.steps(name)[name]["state"] == "uncertain"
    assert len(running.calls(name, name)) == 1
    (row,) = [row for row in running.site.log_rows(name) if row["destination_name"] == name]
    assert (bool(row["success"]), row["error_code"]) == (False, code)


def test_a_refusal_is_tried_again_and_bounded(running: Running) -> None:
    result = running.outcome("refusing").result("refusing")
    assert (result["success"], result["error_code"], result["attempts"]) == (False, "refused", 3)
    assert "not today" in result["error_message"]
    assert result["next_action"] == "replay"
    assert len(running.calls("refusing", "refusing")) == 3
    rows = [row for row in running.site.log_rows("refusing") if row["destination_name"] == "refusing"]
    assert [row["attempt"] for row in rows] == [1, 2, 3]


def test_what_a_look_up_finds_is_done_and_not_sent_again(running: Running) -> None:
    outcome = running.outcome("found")
    assert outcome.data["status"] == "COMPLETED"
    result = outcome.result("found")
    assert (result["record_id"], result["record_url"]) == ("found-found", "https://found.test/")
    assert len(running.calls("found", "found")) == 1
    assert len(running.calls("found", "found", "verify")) == 2
    purposes = [(row["purpose"], bool(row["success"])) for row in running.site.log_rows("found")]
    assert purposes == [("create", False), ("verify", True)]


def test_what_is_absent_is_sent_again_only_when_the_server_has_settled(running: Running) -> None:
    assert running.outcome("absent").data["status"] == "COMPLETED"
    first, second = running.calls("absent", "absent")
    assert second["at"] - first["at"] >= SETTLE_SECONDS
    looked = [entry["at"] for entry in running.calls("absent", "absent", "verify")]
    assert any(at - first["at"] >= SETTLE_SECONDS for at in looked)


def test_a_copy_committed_late_is_found_by_a_last_look_up_and_reported(running: Running) -> None:
    assert running.outcome("late").data["status"] == "COMPLETED"
    running.service.wait_for(lambda: len(running.site.log_rows("late")) == 3, "the last look-up", seconds=20)
    row = running.site.log_rows("late")[-1]
    assert (row["error_code"], row["purpose"], row["record_id"]) == ("surplus_copy", "verify", "1")
    assert "2, 3" in row["error_message"]
    first, *_, last = running.calls("late", "late", "verify")
    assert (last["purpose"], last["last"]) == ("recheck", "1")
    assert last["at"] - first["at"] >= SETTLE_SECONDS
    assert len(running.calls("late", "late")) == 1
    assert len(running.bus.outcomes("late")) == 1


def test_a_copy_that_vanishes_after_its_outcome_is_reported(running: Running) -> None:
    assert running.outcome("vanished").data["status"] == "COMPLETED"
    running.service.wait_for(lambda: len(running.site.log_rows("vanished")) == 3, "the last look-up", seconds=20)
    row = running.site.log_rows("vanished")[-1]
    assert (row["error_code"], bool(row["success"])) == ("copy_missing", False)


def test_a_success_without_an_unknown_outcome_is_not_looked_at_again(running: Running) -> None:
    running.outcome("all well")
    assert not running.site.sql("SELECT 1 FROM copies WHERE recheck_at IS NOT NULL AND destination = 'first'")


def test_what_is_there_in_part_is_completed_from_what_was_remembered(running: Running) -> None:
    assert running.outcome("halved").data["status"] == "COMPLETED"
    assert [call["page"] for call in running.calls("halved", "halved")] == [None, "17"]


def test_a_destination_may_decline_a_record(running: Running) -> None:
    assert running.outcome("choosy").data["status"] == "COMPLETED"
    assert running.outcome("choosy").result("choosy")["skipped"] is True
    assert running.calls("choosy", "choosy") == []
    # nothing taken by anybody is no success
    assert running.outcome("only choosy").data["status"] == "BUILT_NOT_EXPORTED"


def test_each_event_has_one_outcome_and_nothing_runs_again_after_a_restart(running: Running) -> None:
    for name in EVENTS:
        running.outcome(name)
    looked = "SELECT 1 FROM copies WHERE recheck_at IS NOT NULL AND destination IN ('absent', 'late', 'vanished')"
    running.service.wait_for(lambda: not running.site.sql(looked), "the last look-ups")
    before = {plugin: len(running.site.ledger(plugin, None)) for plugin in PLUGINS}
    running.service.shut_down()
    running.service = running.site.start()
    running.bus.publish(
        built("behind", inline("b.xml", small(99).content), event_id="behind", destinations=["first"])
    )
    running.outcome("behind")
    after = {plugin: len(running.site.ledger(plugin, None)) for plugin in PLUGINS}
    assert after == {**before, "first": before["first"] + 1}
    assert sorted(item.cause for item in running.bus.heard) == sorted([*EVENTS, "behind"])
    assert all(item.event["id"] == outcome_id(item.cause) for item in running.bus.heard)


ASKING = """
async def export(self, context):
    note("export", context)
    if not LEDGER.with_suffix(".ok").exists():
        raise Transient("too many requests", retry_after={seconds})
    return done(context)
"""


def test_a_wish_to_wait_holds_for_the_whole_destination_and_across_a_restart(tmp_path: Path, amqp_url: str) -> None:
    plugins = {"asking": ASKING.format(seconds=RETRY_AFTER_SECONDS), "works": WORKS}
    with site(tmp_path, amqp_url, plugins=plugins) as (here, bus):
        service = here.start()
        bus.publish(built("one", inline("a.xml", small(1).content), event_id="one"))
        service.wait_for(lambda: here.log_rows("one"), "the end of the first attempt")
        (first,) = here.ledger("asking")
        (here.plugins / "asking.ok").touch()
        service.shut_down()
        again = here.start()
        bus.publish(built("two", inline("b.xml", small(2).content), event_id="two"))
        for name in ("one", "two"):
            assert bus.outcome(name, log=again.log).data["status"] == "COMPLETED"
        later = here.ledger("asking")[1:]
        assert {entry["session"] for entry in later} == {"one", "two"}
        assert all(entry["at"] - first["at"] >= RETRY_AFTER_SECONDS for entry in later)
        works = {entry["session"]: entry["at"] for entry in here.ledger("works")}
        assert works["one"] - first["at"] < RETRY_AFTER_SECONDS  # the neighbour did not wait
