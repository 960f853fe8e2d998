"""What the ending of an attempt or look-up makes of step, copy, lane and upload_log: all that T4 will write."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from consumer.destinations.contract import Absent, Answer, ExportResult, Partial, Present
from consumer.destinations.registry import Registered
from consumer.errors import DestinationError
from consumer.pipeline.attempt import step_result, stored_result
from consumer.pipeline.links import links_digest
from consumer.pipeline.retry import (
    Facts,
    Policy,
    Verdict,
    judge,
    look_up_failed,
    next_probe,
    still_unknown,
    surely_absent,
)
from consumer.store.rows import AttemptEnd, Claim, CopyChange, LaneChange, LaneState, LogEntry, StepChange, StepState


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """Bounds of waiting that all destinations share."""

    base_seconds: float
    max_seconds: float
    max_wait_seconds: float


class Endings:
    """Turns endings into what is written; ``clock`` is the database's time."""

    def __init__(self, retry: RetrySettings, clock: Callable[[], datetime]) -> None:
        self._retry = retry
        self._clock = clock
        self._draw = random.Random()  # noqa: S311 - jitter, not a secret

    def of_attempt(
        self, claim: Claim, destination: Registered, ending: ExportResult | DestinationError, started: float
    ) -> AttemptEnd:
        """Judge an export that ended; ``started`` is its monotonic start."""
        now = self._clock()
        verdict = judge(ending, _facts(claim, now, counts=True), self._policy(destination), self._draw)
        log = _log_entry(claim, now, started, verdict)
        lane = _lane_change(destination, verdict, now)
        if verdict.state is not StepState.DONE or not isinstance(ending, ExportResult):
            result = {"next_action": verdict.next_action, "timestamp": now.isoformat()}
            recheck_at = self._recheck_at(destination, now)
            change = replace(_change(claim, verdict), result=result)
            unresolved_at = now if verdict.state is StepState.UNCERTAIN else None
            return AttemptEnd(claim, change, log, None, lane, recheck_at, unresolved_at)
        sha256 = claim.job.record_sha256
        copy = CopyChange(
            ending.record_id or ("" if not claim.step.links else None), ending.record_url, sha256,
            ending.stored_sha256 or (None if claim.step.links else sha256), claim.job.build_time,
            links_sha256=links_digest(claim.links) if claim.links else None,
        )  # fmt: skip
        log = replace(
            log, success=True, record_id=ending.record_id, record_url=ending.record_url, metadata=ending.metadata
        )
        change = replace(_change(claim, verdict), result=step_result(ending, claim))
        return AttemptEnd(claim, change, log, copy, lane, self._recheck_at(destination, now))

    @staticmethod
    def unresolved(claim: Claim) -> AttemptEnd:
        """End a step without a request: an earlier one may have made a copy, and nobody can be asked."""
        reason = "the outcome of an earlier request is not known, and this destination cannot be asked for it"
        change = StepChange(
            claim.job.id, claim.step.destination, StepState.UNCERTAIN, "unknown_outcome", reason, looked_up=True
        )
        return AttemptEnd(claim, change, None, unresolved_at=claim.copy.unresolved_at)

    def not_begun(self, claim: Claim) -> AttemptEnd:
        """Give a claimed step back as it was: nothing was asked or sent."""
        step = claim.step
        change = StepChange(
            claim.job.id, step.destination, step.state, step.error_code, step.reason, self._clock(), step.result,
            looked_up=claim.looks_up,
        )  # fmt: skip
        return AttemptEnd(claim, change, None, unresolved_at=claim.copy.unresolved_at)

    @staticmethod
    def _recheck_at(destination: Registered, now: datetime) -> datetime | None:
        """Say when to look once more: what the server still commits after H is found then, and reported."""
        return now + timedelta(seconds=destination.lane.settle_seconds) if destination.can_verify else None

    def of_look_up(
        self, claim: Claim, destination: Registered, answer: Answer | DestinationError, started: float
    ) -> AttemptEnd:
        """Judge a look-up: found, partly there, surely absent, or still unknown."""
        now = self._clock()
        if isinstance(answer, Present):
            return self._found(claim, destination, answer, started)
        if isinstance(answer, DestinationError):
            return self._raised(claim, destination, answer, started)
        facts, policy = _facts(claim, now, counts=False), self._policy(destination)
        last_request_at = claim.step.last_request_at or now
        ours = None
        if isinstance(answer, Absent | Partial):
            # what was seen is as old as the question; what is missing may still come until H has passed
            verdict = surely_absent(facts, policy, last_request_at, self._draw, asked_at=claim.claimed_at or now)
        else:
            verdict = still_unknown(facts, policy, self._draw, answer.reason or "the look-up gave no answer")
        if isinstance(answer, Partial) and not claim.step.links:
            ours = CopyChange(remembered={**claim.copy.remembered, "record_id": answer.id})
        unresolved_at = last_request_at if verdict.state is StepState.UNCERTAIN else None
        change = _change(claim, verdict, looked_up=True)
        return AttemptEnd(claim, change, None, ours, unresolved_at=unresolved_at)

    def _found(self, claim: Claim, destination: Registered, answer: Present, started: float) -> AttemptEnd:
        now = self._clock()
        action = "updated" if claim.copy.record_id is not None else "created"
        result = stored_result(claim, now, action=action, record_id=answer.id, record_url=answer.url)
        verdict = Verdict(StepState.DONE, counts=False)
        log = replace(
            _log_entry(claim, now, started, verdict),
            success=True, record_id=answer.id, record_url=answer.url, purpose="verify", attempt=claim.step.attempts,
            error_code="surplus_copy" if answer.surplus else None, error_message=surplus_message(answer) or None,
        )  # fmt: skip
        sha256 = claim.job.record_sha256
        digest = links_digest(claim.links) if claim.links else None
        copy = CopyChange(answer.id, answer.url, sha256, sha256, claim.job.build_time, links_sha256=digest)
        if claim.step.links:
            copy = CopyChange(links_sha256=digest)
        change = replace(_change(claim, verdict, looked_up=True), result=result)
        return AttemptEnd(claim, change, log, copy, None, self._recheck_at(destination, now))

    def _raised(self, claim: Claim, destination: Registered, error: DestinationError, started: float) -> AttemptEnd:
        """Judge a look-up that raised; it is no attempt, so it is logged only where it ends the step."""
        now = self._clock()
        verdict = look_up_failed(error, _facts(claim, now, counts=False), self._policy(destination), self._draw)
        log = None
        if verdict.state is StepState.FAILED:
            log = replace(_log_entry(claim, now, started, verdict), purpose="verify", attempt=claim.step.attempts)
        result = {"next_action": verdict.next_action, "timestamp": now.isoformat()}
        change = replace(_change(claim, verdict, looked_up=True), result=result)
        # refused for good or given up: what became of the request before is still not known
        unresolved_at = claim.step.last_request_at if verdict.state.terminal else None
        lane = _lane_change(destination, verdict, now)
        return AttemptEnd(claim, change, log, None, lane, unresolved_at=unresolved_at)

    def _policy(self, destination: Registered) -> Policy:
        return Policy(
            max_attempts=destination.lane.max_attempts,
            base_seconds=self._retry.base_seconds,
            max_seconds=self._retry.max_seconds,
            max_wait_seconds=self._retry.max_wait_seconds,
            settle_seconds=destination.lane.settle_seconds,
            can_verify=destination.can_verify,
        )


def surplus_message(answer: Present) -> str:
    """Say which further copies of ours a look-up found; empty when there are none."""
    if not answer.surplus:
        return ""
    return f"besides {answer.id} there are copies of ours that the server committed late: {', '.join(answer.surplus)}"


def skipped(claim: Claim, reason: str) -> AttemptEnd:
    """Return the end of a step that its destination did not want."""
    change = StepChange(claim.job.id, claim.step.destination, StepState.SKIPPED, None, reason)
    return AttemptEnd(claim, change, None)


def of_superseded(end: AttemptEnd) -> AttemptEnd:
    """Let an attempt end whose job a newer build has superseded: it is not tried again."""
    if end.step.state is not StepState.DUE or end.claim.step.links:
        return end
    return replace(end, step=replace(end.step, state=StepState.SUPERSEDED, next_attempt_at=None))


def _lane_change(destination: Registered, verdict: Verdict, now: datetime) -> LaneChange | None:
    if verdict.pause:
        return LaneChange(destination.name, LaneState.PAUSED, verdict.message, None, next_probe(now, now))
    if verdict.not_before is not None:
        return LaneChange(destination.name, LaneState.ACTIVE, verdict.message, verdict.not_before)
    return None


def _change(claim: Claim, verdict: Verdict, *, looked_up: bool = False) -> StepChange:
    return StepChange(
        claim.job.id, claim.step.destination, verdict.state, verdict.error_code, verdict.message,
        verdict.next_attempt_at, counts=verdict.counts, looked_up=looked_up,
    )  # fmt: skip


def _facts(claim: Claim, now: datetime, *, counts: bool) -> Facts:
    step = claim.step
    return Facts(step.attempts + (1 if counts else 0), step.lookups, step.due_since or now, now)


def _log_entry(claim: Claim, now: datetime, started: float, verdict: Verdict) -> LogEntry:
    return LogEntry(
        session=claim.job.session,
        destination=claim.step.destination,
        success=False,
        timestamp=now,
        record_id=None,
        record_url=None,
        error_message=verdict.message,
        metadata={},
        event_id=claim.job.event_id,
        source=claim.job.source,
        attempt=claim.step.attempts + 1,
        error_code=verdict.error_code,
        duration_seconds=round(time.monotonic() - started, 6),
        purpose="update" if claim.copy.record_id is not None else "create",
    )
