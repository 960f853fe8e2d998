"""Late links: what is linked to comes after the copy that links to it. One consumer, real broker, both databases."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import QUICK, Bus, Service, Site, built, inline, site, small

SETTLE_SECONDS = 2.0
URL = "https://target.test/"

#: Fails as long as a file of the session's name lies beside it.
TARGET = """
async def export(self, context):
    note("export", context)
    if (LEDGER.parent / context.session_identifier).exists():
        raise Transient("closed", retry_after=0.3)
    return done(context)
"""

#: Writes links, except where its session says what goes wrong.
LINKING = """
links_to = ("target",)
settle_seconds = 2

async def export(self, context):
    last = context.last_export and context.last_export.record_id
    note("export", context, purpose=context.purpose, links=context.links, last=last)
    if context.purpose == "link" and context.session_identifier == "refused":
        raise Permanent("signed", code="locked")
    if context.purpose == "link" and context.session_identifier == "lost" and len(noted("export", context)) == 2:
        raise UnknownOutcome("the connection was reset")
    return done(context)

async def verify(self, context):
    note("verify", context, purpose=context.purpose)
    return Partial(context.session_identifier) if context.links else Present(context.session_identifier)
"""


@dataclass
class Running:
    """The consumer and the two destinations."""

    site: Site
    bus: Bus
    service: Service

    def publish(self, session: str, event_id: str | None = None, **data: Any) -> None:
        """Publish a record of a session."""
        record = inline(f"{session}.xml", small(len(session)).content)
        self.bus.publish(built(session, record, event_id=event_id or session, **data))

    def calls(self, session: str, what: str = "export") -> list[dict[str, Any]]:
        """Return what the linking destination was asked for a session."""
        return [entry for entry in self.site.ledger("linking", what) if entry["session"] == session]

    def close_target(self, session: str) -> Path:
        """Let the target refuse a session until the returned file is gone."""
        path = self.site.plugins / session
        path.touch()
        return path

    def linked_late(self, session: str) -> None:
        """Publish a record whose target opens after the copy was made; return when the link was asked for."""
        closed = self.close_target(session)
        self.publish(session)
        self.service.wait_for(lambda: self.calls(session), "the copy without a link")
        closed.unlink()
        self.service.wait_for(lambda: len(self.calls(session)) > 1, "the call for the link")

    def step(self, event_id: str) -> dict[str, Any]:
        """Return the step of the linking destination."""
        return self.site.steps(event_id)["linking"]

    def wait_until_done(self, event_id: str) -> dict[str, Any]:
        """Wait until the linking step is over again."""
        self.service.wait_for(
            lambda: self.step(event_id)["state"] == "done" and self.step(event_id)["purpose"] == "link", "the link"
        )
        return self.step(event_id)


@pytest.fixture
def running(tmp_path: Path, amqp_url: str, database_url: str) -> Iterator[Running]:
    """Run a consumer with a target and a destination that links to it."""
    plugins = {"target": TARGET, "linking": LINKING}
    with site(tmp_path, amqp_url, database_url, plugins=plugins, **QUICK) as (here, bus):
        yield Running(here, bus, here.start())


def test_a_copy_gets_its_link_when_the_target_comes_later(running: Running) -> None:
    running.linked_late("late")
    outcome = running.bus.outcome("late")
    assert outcome.data["status"] == "COMPLETED"
    assert (outcome.result("linking")["action"], outcome.result("linking")["attempts"]) == ("created", 1)
    running.wait_until_done("late")
    calls = [(call["purpose"], call["links"], call["last"]) for call in running.calls("late")]
    assert calls == [("create", {}, None), ("link", {"target": URL + "late"}, "late")]
    rows = [
        (r["purpose"], bool(r["success"]))
        for r in running.site.log_rows("late")
        if r["destination_name"] == "linking"
    ]
    assert rows == [("create", True), ("link", True)]
    assert len(running.bus.outcomes("late")) == 1


def test_a_link_that_was_there_from_the_start_is_not_written_again(running: Running) -> None:
    running.publish("prompt")
    running.bus.outcome("prompt")
    running.linked_late("late")
    running.wait_until_done("late")
    assert [call["links"] for call in running.calls("prompt")] == [{"target": URL + "prompt"}]


def test_a_link_that_cannot_be_added_is_shown_and_changes_no_outcome(running: Running) -> None:
    running.linked_late("refused")
    assert running.bus.outcome("refused").data["status"] == "COMPLETED"
    step = running.wait_until_done("refused")
    assert (step["error_code"], step["reason"]) == ("link_failed", "locked: signed")
    job = running.site.job("refused")
    assert job is not None
    assert (job["state"], job["revision"]) == ("exported", 1)
    assert "link_failed" in running.site.run("status").stdout
    assert len(running.bus.outcomes("refused")) == 1


def test_a_link_of_unknown_outcome_is_written_again_only_when_the_server_has_settled(running: Running) -> None:
    running.linked_late("lost")
    running.service.wait_for(lambda: len(running.calls("lost")) == 3, "the link again")
    running.wait_until_done("lost")
    _, first, second = running.calls("lost")
    assert second["at"] - first["at"] >= SETTLE_SECONDS
    assert {call["purpose"] for call in running.calls("lost", "verify")} == {"link"}


def test_a_target_that_comes_with_another_event_is_linked_too(running: Running) -> None:
    running.publish("apart", "apart-1", destinations=["linking"])
    running.bus.outcome("apart-1")
    assert [call["links"] for call in running.calls("apart")] == [{}]
    running.publish("apart", "apart-2", destinations=["target"])
    running.bus.outcome("apart-2")
    running.wait_until_done("apart-1")
    assert [call["links"] for call in running.calls("apart")] == [{}, {"target": URL + "apart"}]
