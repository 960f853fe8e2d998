"""What a finished job tells the world."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from consumer.errors import PoisonEventError
from consumer.events import DestinationResult, Outcome, job_id, outcome_id, restore_built
from consumer.pipeline.outcome import (
    Names,
    messages_of,
    outcome_of,
    poison_messages,
    reason_headers,
    results_of,
)
from consumer.store.rows import JobRow, JobState, Message, StepRow, StepState
from tests.unit.builders import NOW, SHA, built, job_row, step_row

NAMES = Names("nexuslims.records", "nexuslims.export.dead", "urn:nexus-export")
S = StepState


def told(job: JobRow, steps: Sequence[StepRow], answer: JobRow | None = None) -> Outcome:
    return outcome_of(job, restore_built(job.event), steps, answer or job)


def result(state: StepState, **changes: Any) -> DestinationResult:
    (one,) = results_of([step_row("cdcs", state, **changes)])
    return one


def data_of(message: Message) -> Any:
    return json.loads(message.body)["data"]


# --- results -----------------------------------------------------------------------------------------------------


def test_results_are_in_the_order_tried() -> None:
    later = NOW + timedelta(seconds=1)
    steps = [
        step_row("never_low", S.SKIPPED, priority=10),
        step_row("second", S.DONE, priority=100, first_attempt_at=later),
        step_row("never_high", S.FAILED, priority=90),
        step_row("also_second", S.DONE, priority=100, first_attempt_at=later),
        step_row("first", S.DONE, priority=10, first_attempt_at=NOW),
        step_row("also_never_high", S.FAILED, priority=90),
    ]
    assert [one.destination for one in results_of(steps)] == [
        "first", "also_second", "second", "also_never_high", "never_high", "never_low",
    ]  # fmt: skip


def test_a_success() -> None:
    stored = {
        "action": "updated",
        "record_id": "17",
        "record_url": "https://cdcs.test/17",
        "timestamp": NOW.isoformat(),
        "metadata": {"a": 1},
    }
    assert result(S.DONE, result=stored, attempts=2, error_code="old", reason="old") == DestinationResult(
        destination="cdcs", success=True, action="updated", record_id="17", record_url="https://cdcs.test/17",
        attempts=2, timestamp=NOW, metadata={"a": 1},
    )  # fmt: skip


def test_a_failure_has_no_id_and_a_message() -> None:
    found = result(
        S.FAILED, error_code="rejected", reason="no", attempts=3,
        result={"record_id": "17", "record_url": "x", "action": "created", "next_action": "fix_record"},
    )  # fmt: skip
    assert (found.success, found.record_id, found.record_url, found.action) == (False, None, None, "none")
    assert (found.error_code, found.error_message, found.next_action) == ("rejected", "no", "fix_record")
    assert found.attempts == 3


@pytest.mark.parametrize(
    ("state", "changes", "action"),
    [
        (S.DONE, {}, "none"),
        (S.SKIPPED, {}, "none"),
        (S.SUPERSEDED, {}, "none"),
        (S.SKIPPED, {"result": {"next_action": "fix_config"}}, "none"),
        (S.DONE, {"result": {"next_action": "replay"}}, "none"),
        (S.UNCERTAIN, {}, "replay"),
        (S.FAILED, {"error_code": "exhausted"}, "replay"),
        (S.FAILED, {"error_code": "dependency_failed"}, "replay"),
        (S.FAILED, {"error_code": "unknown_destination"}, "fix_config"),
        (S.FAILED, {"error_code": "unknown_strategy"}, "fix_config"),
        (S.FAILED, {"error_code": "record_malformed"}, "fix_record"),
        (S.FAILED, {"error_code": "record_changed"}, "fix_record"),
        (S.FAILED, {"error_code": "path_refused"}, "fix_record"),
        (S.FAILED, {"result": {"next_action": "fix_config"}}, "fix_config"),
        # it was to be tried again when its wait ended, so the attempt itself advised nothing
        (S.FAILED, {"error_code": "waited_too_long", "result": {"next_action": "none"}}, "replay"),
    ],
)
def test_next_action(state: StepState, changes: dict[str, Any], action: str) -> None:
    assert result(state, **changes).next_action == action


@pytest.mark.parametrize("state", [S.FAILED, S.UNCERTAIN, S.SKIPPED, S.SUPERSEDED])
def test_what_has_no_code_of_its_own_has_that_of_its_state(state: StepState) -> None:
    assert result(state).error_code == state.value
    assert result(state).skipped == (state is S.SKIPPED)


# --- outcomes ----------------------------------------------------------------------------------------------------


def test_an_exported_job() -> None:
    event = built({"user": "ada", "instrument_pid": "titan", "dt_from": "2026-11-24T09:00:00+01:00"})
    job = job_row(event, state=JobState.EXPORTED, revision=3, strategy="best_effort", facts={"user": "bob"})
    found = told(job, [step_row("cdcs", S.DONE, job)])
    assert (found.status, found.revision, found.strategy) == ("COMPLETED", 3, "best_effort")
    assert (found.cause.source, found.cause.id) == ("urn:test:builder", "event-1")
    assert (found.user, found.instrument_pid) == ("ada", "titan"), "the event's word counts before the record's"
    assert found.dt_from is not None
    assert found.dt_from.isoformat() == "2026-11-24T09:00:00+01:00"
    assert found.record == {"path": "2026/titan.xml", "sha256": SHA, "size": 7}
    assert (found.superseded_by, found.error_code) == (None, None)


def test_what_the_event_leaves_out_is_taken_from_the_record() -> None:
    facts = {"user": "ada", "instrument_pid": "titan", "dt_from": NOW.isoformat(), "dt_to": NOW.isoformat()}
    found = told(job_row(state=JobState.EXPORTED, facts=facts), [])
    assert (found.user, found.instrument_pid, found.dt_from, found.dt_to) == ("ada", "titan", NOW, NOW)


def test_an_outcome_never_holds_the_content_of_a_record() -> None:
    content = "<secret/>"
    inline = {"name": "a.xml", "content": content, "sha256": hashlib.sha256(b"x").hexdigest(), "size": 9}
    job = job_row(built({"record": inline}), state=JobState.FAILED)
    assert told(job, []).record == {"name": "a.xml", "sha256": inline["sha256"], "size": 9}
    outcome, letter = messages_of(job, [step_row("cdcs", S.FAILED, job)], NOW, NAMES)
    assert b"secret" not in outcome.body
    assert b"secret" in letter.body, "the dead letter is the event itself"


def test_no_destination() -> None:
    found = told(job_row(state=JobState.FAILED), [])
    assert (found.status, found.results) == ("BUILT_NOT_EXPORTED", ())
    assert found.error_code == "no_destination"
    assert found.error_message == "no destination is enabled, so the record went nowhere"


# --- messages ----------------------------------------------------------------------------------------------------


def test_an_exported_job_sends_one_message() -> None:
    job = job_row(built(traceparent="00-ab-cd-01"), state=JobState.EXPORTED, revision=2)
    (message,) = messages_of(job, [step_row("cdcs", S.DONE, job)], NOW, NAMES)
    name = str(outcome_id(job.id, 2))
    assert (message.kind, message.message_id, message.job_id) == ("outcome", name, job.id)
    assert (message.exchange, message.routing_key) == ("nexuslims.records", "record.exported")
    event = json.loads(message.body)
    assert (event["id"], event["type"], event["source"]) == (name, "record.exported", "urn:nexus-export")
    assert (event["traceparent"], event["subject"]) == ("00-ab-cd-01", "session-1")


def test_the_same_revision_is_the_same_bytes_and_another_has_another_id() -> None:
    job = job_row(state=JobState.EXPORTED)
    steps = [step_row("cdcs", S.DONE, job)]
    assert messages_of(job, steps, NOW, NAMES) == messages_of(job, list(steps), NOW, NAMES)
    again = messages_of(job_row(state=JobState.EXPORTED, revision=2), steps, NOW, NAMES)
    assert again[0].message_id != messages_of(job, steps, NOW, NAMES)[0].message_id


def test_a_failed_job_sends_a_dead_letter_too() -> None:
    job = job_row(state=JobState.FAILED, revision=4)
    outcome, letter = messages_of(
        job, [step_row("cdcs", S.FAILED, job, error_code="rejected", reason="not valid: ä" + "x" * 2000)], NOW, NAMES
    )
    assert (outcome.routing_key, data_of(outcome)["status"]) == ("record.export_failed", "BUILT_NOT_EXPORTED")
    assert (letter.kind, letter.exchange, letter.routing_key) == ("failed", "", "nexuslims.export.dead")
    assert letter.message_id == outcome.message_id
    assert letter.body == job.event.encode()
    assert letter.content_type == "application/cloudevents+json"
    assert letter.headers == {
        "nexus-replay-of": f"{job.id}/4",
        "nexus-error-code": "rejected",
        "nexus-error-message": ("not valid: ä" + "x" * 2000)[:1000],
        "nexus-session": "session-1",
    }


def test_a_dead_letter_names_what_failed_and_not_what_was_skipped() -> None:
    job = job_row(state=JobState.FAILED)
    steps = [
        step_row("cdcs", S.SKIPPED, job, first_attempt_at=NOW, reason="not for us"),
        step_row("local_archive", S.FAILED, job, priority=10, error_code="conflict", reason="in the way"),
    ]
    letter = messages_of(job, steps, NOW, NAMES)[1]
    assert (letter.headers["nexus-error-code"], letter.headers["nexus-error-message"]) == ("conflict", "in the way")


def test_a_dead_letter_without_results_says_why() -> None:
    letter = messages_of(job_row(state=JobState.FAILED), [], NOW, NAMES)[1]
    assert letter.headers["nexus-error-code"] == "no_destination"
    assert letter.headers["nexus-error-message"].startswith("no destination is enabled")


@pytest.mark.parametrize("state", [JobState.EXPORTED, JobState.FAILED])
def test_a_superseded_job_repeats_its_successor_s_outcome(state: JobState) -> None:
    successor = job_row(
        built(id="event-2", source="urn:test:other"), state=state, strategy="best_effort", facts={"user": "ada"}
    )
    old = job_row(superseded_by=successor.id, revision=7)
    steps = [step_row("cdcs", S.DONE if state is JobState.EXPORTED else S.FAILED, successor, attempts=2)]
    (message,) = messages_of(replace(old, state=state), steps, NOW, NAMES, answer=successor)
    assert message.message_id == str(outcome_id(old.id, 7)), "its own message, and no dead letter"
    assert message.job_id == old.id
    data = data_of(message)
    assert data["cause"] == {"source": "urn:test:builder", "id": "event-1"}
    assert data["superseded_by"] == {"source": "urn:test:other", "id": "event-2"}
    assert data["status"] == ("COMPLETED" if state is JobState.EXPORTED else "BUILT_NOT_EXPORTED")
    assert (data["revision"], data["strategy"], data["user"]) == (7, "best_effort", "ada")
    assert [one["attempts"] for one in data["results"]] == [2]


def test_reason_headers() -> None:
    assert reason_headers("code", "text", None) == {"nexus-error-code": "code", "nexus-error-message": "text"}
    assert reason_headers("code", "", "s")["nexus-session"] == "s"


# --- poison ------------------------------------------------------------------------------------------------------


LETTER = Message("poison", "digest.1", "", "nexuslims.export.dead", b"{")


def poison(error: PoisonEventError, digest: str = "aa") -> list[Message]:
    return poison_messages(error, LETTER, digest=digest, strategy="all", now=NOW, names=NAMES)


def test_poison_that_cannot_be_named_is_a_dead_letter_alone() -> None:
    known = {"source": "urn:a", "event_id": "1", "session": "s"}
    for missing in known:
        error = PoisonEventError("invalid_data", "x", **{**known, missing: None})
        assert poison(error) == [LETTER]


def test_poison_that_can_be_named_tells_its_builder() -> None:
    error = PoisonEventError("id_reused", "other data" + "x" * 2000, source="urn:a", event_id="1", session="s")
    letter, outcome = poison(error)
    assert letter is LETTER
    assert (outcome.kind, outcome.exchange, outcome.routing_key) == (
        "outcome", "nexuslims.records", "record.export_failed",
    )  # fmt: skip
    data = data_of(outcome)
    Outcome.model_validate(data)
    assert (data["session_identifier"], data["status"], data["revision"]) == ("s", "BUILT_NOT_EXPORTED", 1)
    assert data["error_code"] == "invalid_event"
    assert data["error_message"].startswith("id_reused: other data")
    assert len(data["error_message"]) == 1000
    assert data["cause"] == {"source": "urn:a", "id": "1"}
    assert data["results"] == []


def test_an_outcome_of_poison_is_not_taken_for_that_of_the_accepted_event() -> None:
    """Equal for equal bytes, but never the id of the job whose id it reuses."""
    error = PoisonEventError("id_reused", "x", source="urn:a", event_id="1", session="s")
    name = poison(error)[1].message_id
    assert name == poison(error)[1].message_id
    assert name != poison(error, digest="bb")[1].message_id
    assert name not in {str(outcome_id(job_id("urn:a", "1"), revision)) for revision in (1, 2)}
