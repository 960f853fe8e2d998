"""What a finished job tells the world: an outcome event, and a dead letter when it failed. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from consumer.errors import PoisonEventError
from consumer.events import (
    REPLAY_HEADER,
    BuiltEvent,
    Cause,
    DestinationResult,
    Outcome,
    RecordInline,
    job_id,
    outcome_body,
    outcome_id,
    outcome_type,
    restore_built,
)
from consumer.store.rows import JobRow, JobState, Message, StepRow, StepState

_TEXT_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class Names:
    """Where messages go and who they come from."""

    exchange: str
    dead_queue: str
    source: str


def results_of(steps: Sequence[StepRow]) -> tuple[DestinationResult, ...]:
    """Return the results of all steps in the order tried."""
    started = sorted(
        steps, key=lambda s: (s.first_attempt_at is None, s.first_attempt_at, -s.priority, s.destination)
    )
    return tuple(_result(step) for step in started)


def _result(step: StepRow) -> DestinationResult:
    known = dict(step.result or {})
    done = step.outcome_state is StepState.DONE
    return DestinationResult(
        destination=step.destination,
        success=done,
        skipped=step.outcome_state is StepState.SKIPPED,
        action=known.get("action", "none") if done else "none",
        record_id=known.get("record_id") if done else None,
        record_url=known.get("record_url") if done else None,
        error_code=None if done else (step.error_code or (step.state if step.state.terminal else None)),
        error_message=None if done else step.reason,
        next_action=_next_action(step, known.get("next_action")),
        attempts=known.get("attempts", step.attempts),
        timestamp=known.get("timestamp"),
        metadata=known.get("metadata") or {},
    )


def _next_action(step: StepRow, advised: str | None) -> Any:
    if step.outcome_state in {StepState.DONE, StepState.SKIPPED, StepState.SUPERSEDED}:
        return "none"
    if advised and advised != "none":  # an attempt that was to be repeated advised nothing, but there is no other
        return advised
    code = step.error_code or ""
    if code in {"unknown_destination", "unknown_strategy"}:
        return "fix_config"
    if code.startswith("record_") or code == "path_refused":
        return "fix_record"
    return "replay"


def outcome_of(job: JobRow, event: BuiltEvent, steps: Sequence[StepRow], answer: JobRow) -> Outcome:
    """Build the outcome of ``job``; ``answer`` is the job that decided it: itself, or its successor."""
    data = event.data
    facts = answer.facts
    record = data.record.model_dump(
        mode="json", exclude={"content"} if isinstance(data.record, RecordInline) else None
    )
    exported = answer.state is JobState.EXPORTED
    return Outcome(
        session_identifier=job.session,
        status="COMPLETED" if exported else "BUILT_NOT_EXPORTED",
        revision=job.revision,
        strategy=answer.strategy,
        cause=Cause(source=job.source, id=job.event_id),
        superseded_by=None if answer is job else Cause(source=answer.source, id=answer.event_id),
        user=data.user or facts.get("user"),
        instrument_pid=data.instrument_pid or facts.get("instrument_pid"),
        dt_from=data.dt_from or facts.get("dt_from"),
        dt_to=data.dt_to or facts.get("dt_to"),
        record=record,
        results=results_of(steps),
        error_code=None if steps else "no_destination",
        error_message=None if steps else "no destination is enabled, so the record went nowhere",
    )


def messages_of(
    job: JobRow, steps: Sequence[StepRow], now: datetime, names: Names, *, answer: JobRow | None = None
) -> list[Message]:
    """Return what goes out for a finished job; ``answer``: the successor whose outcome it repeats."""
    event = restore_built(job.event)
    outcome = outcome_of(job, event, steps, answer or job)
    message_id = str(outcome_id(job.id, job.revision))
    body = outcome_body(outcome, event_id=message_id, source=names.source, time=now, traceparent=event.traceparent)
    found = [Message("outcome", message_id, names.exchange, outcome_type(outcome), body, job_id=job.id)]
    if answer is None and job.state is JobState.FAILED:
        first = next((r for r in outcome.results if r.error_code and not r.skipped), None)
        code = first.error_code if first else outcome.error_code
        text = first.error_message if first else outcome.error_message
        found.append(
            Message(
                "failed", message_id, "", names.dead_queue, job.event.encode(), job_id=job.id,
                headers={
                    REPLAY_HEADER: f"{job.id}/{job.revision}",
                    **reason_headers(code or "failed", text or "", job.session),
                },
            )
        )  # fmt: skip
    return found


def reason_headers(code: str, text: str, session: str | None) -> dict[str, str]:
    """Return the headers that tell a reader of the dead letters what happened."""
    headers = {"nexus-error-code": code, "nexus-error-message": text[:_TEXT_LIMIT]}
    if session:
        headers["nexus-session"] = session
    return headers


def poison_messages(
    error: PoisonEventError, letter: Message, *, digest: str, strategy: str, now: datetime, names: Names
) -> list[Message]:
    """Return the dead letter of a poison delivery, and an outcome if its event can be named."""
    found = [letter]
    if error.source and error.event_id and error.session:
        outcome = Outcome(
            session_identifier=error.session,
            status="BUILT_NOT_EXPORTED",
            revision=1,
            strategy=strategy,
            cause=Cause(source=error.source, id=error.event_id),
            error_code="invalid_event",
            error_message=f"{error.code}: {error}"[:_TEXT_LIMIT],
        )
        # not the id of the job's own outcome: the event may reuse the id of an accepted one
        name = str(outcome_id(job_id(error.source, f"{error.event_id}#{digest}"), 1))
        body = outcome_body(outcome, event_id=name, source=names.source, time=now, traceparent=None)
        found.append(Message("outcome", name, names.exchange, outcome_type(outcome), body))
    return found
