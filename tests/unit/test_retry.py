"""What the ending of an attempt or look-up makes of a step, and how long anything waits."""

import random
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.destinations.contract import Absent, ExportResult, Partial, Present, Unsure
from consumer.destinations.registry import Registered
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome
from consumer.pipeline.ending import Endings, RetrySettings, of_superseded, skipped
from consumer.pipeline.retry import (
    Facts,
    Policy,
    Verdict,
    backoff_seconds,
    judge,
    look_up_failed,
    next_probe,
    still_unknown,
    surely_absent,
)
from consumer.store.rows import CopyChange, CopyRow, LaneState, StepState
from tests.unit.builders import NOW, SHA, claim, job_row, registered, step_row

SEVEN_DAYS = timedelta(days=7)
ASKABLE = Policy(can_verify=True)
BLIND = Policy(can_verify=False)


def draw() -> random.Random:
    return random.Random(1)  # noqa: S311 - a failure has to come back


def facts(attempts: int = 1, lookups: int = 0, waited: timedelta = timedelta(0)) -> Facts:
    return Facts(attempts, lookups, NOW - waited, NOW)


def verdict(ending: Any, known: Facts | None = None, policy: Policy = ASKABLE) -> Verdict:
    return judge(ending, known or facts(), policy, draw())


# --- backoff -----------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 10_000),
    st.floats(0.001, 1e4),
    st.floats(0.001, 1e6),
    st.integers(0, 2**32),
)
def test_backoff_is_between_nothing_and_the_doubled_base(attempt: int, base: float, cap: float, seed: int) -> None:
    seconds = backoff_seconds(attempt, base, cap, random.Random(seed))  # noqa: S311 - as above
    assert 0 <= seconds <= cap
    if attempt < 60:
        assert seconds <= base * 2 ** (attempt - 1)


def test_backoff_doubles_and_uses_its_whole_room() -> None:
    rng = draw()
    for attempt, bound in ((1, 5), (2, 10), (3, 20), (4, 40), (11, 3600), (500, 3600)):
        drawn = [backoff_seconds(attempt, 5, 3600, rng) for _ in range(2000)]
        assert max(drawn) > 0.98 * bound
        assert min(drawn) < 0.02 * bound, "full jitter begins at nothing"
        assert sum(drawn) / len(drawn) == pytest.approx(bound / 2, rel=0.1)


# --- attempts ----------------------------------------------------------------------------------------------------


def test_a_success_is_done() -> None:
    assert verdict(ExportResult(success=True, destination_name="d")) == Verdict(StepState.DONE)


def test_a_returned_failure_is_tried_again_and_bounded() -> None:
    said = ExportResult(success=False, destination_name="d", error_message="no")
    found = verdict(said)
    assert (found.state, found.error_code, found.message) == (StepState.DUE, "refused", "no")
    given_up = verdict(said, facts(attempts=25))
    assert (given_up.state, given_up.error_code) == (StepState.FAILED, "refused")
    silent = verdict(ExportResult(success=False, destination_name="d"))
    assert silent.message == "the destination reported a failure without a message"


@given(st.integers(1, 24), st.integers(0, 2**32))
def test_a_transient_failure_waits_no_longer_than_the_longest_wait(attempts: int, seed: int) -> None:
    policy = Policy(base_seconds=5, max_seconds=60)
    found = judge(Transient("x"), facts(attempts), policy, random.Random(seed))  # noqa: S311 - as above
    assert found.state is StepState.DUE
    assert found.counts
    assert found.not_before is None
    assert found.next_attempt_at is not None
    assert NOW <= found.next_attempt_at <= NOW + timedelta(seconds=min(60, 5 * 2 ** (attempts - 1)))


def test_an_error_of_a_plugin_s_own_kind_is_tried_again() -> None:
    found = verdict(DestinationError("odd", code="odd"))
    assert (found.state, found.error_code, found.message) == (StepState.DUE, "odd", "odd")


@pytest.mark.parametrize("attempts", [1, 24, 25, 26])
def test_attempts_are_bounded(attempts: int) -> None:
    found = verdict(Transient("full", code="full"), facts(attempts))
    if attempts < 25:
        assert found.state is StepState.DUE
        return
    assert found == Verdict(
        StepState.FAILED, "full", f"full (given up after {attempts} attempts)", next_action="replay"
    )


def test_waiting_is_bounded() -> None:
    assert verdict(Transient("x"), facts(waited=SEVEN_DAYS - timedelta(seconds=1))).state is StepState.DUE
    found = verdict(Transient("x"), facts(waited=SEVEN_DAYS))
    assert (found.state, found.next_action) == (StepState.FAILED, "replay")


wishes = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-(10**12), 10**12),
    st.datetimes(timezones=st.just(UTC) | st.just(timezone(timedelta(hours=9)))),
    st.none(),
)


@given(wishes, st.sampled_from([Transient, UnknownOutcome]), st.booleans(), st.integers(0, 2**32))
def test_no_wish_of_a_server_breaks_or_outlasts_the_longest_wait(
    wish: Any, kind: type[Transient | UnknownOutcome], can_verify: bool, seed: int
) -> None:
    policy = Policy(max_wait_seconds=3600, max_seconds=60, can_verify=can_verify)
    found = judge(kind("x", retry_after=wish), facts(), policy, random.Random(seed))  # noqa: S311 - as above
    for moment in (found.next_attempt_at, found.not_before):
        assert moment is None or NOW <= moment <= NOW + timedelta(seconds=3600)


@given(st.floats(0, 600) | st.integers(0, 600), st.integers(1, 20), st.integers(0, 2**32))
def test_never_earlier_than_the_server_wished(wish: float, attempts: int, seed: int) -> None:
    """Neither this step nor, by ``not_before``, any other work of its destination."""
    wished = NOW + timedelta(seconds=wish)
    for retry_after in (wish, wished):
        for ending in (Transient("x", retry_after=retry_after), UnknownOutcome("x", retry_after=retry_after)):
            found = judge(ending, facts(attempts), ASKABLE, random.Random(seed))  # noqa: S311 - as above
            assert found.next_attempt_at is not None
            assert found.next_attempt_at >= wished
            assert found.not_before == wished


def test_a_wish_for_a_whole_destination_holds_although_this_step_has_failed() -> None:
    found = verdict(Transient("x", retry_after=90), facts(attempts=25))
    assert (found.state, found.not_before) == (StepState.FAILED, NOW + timedelta(seconds=90))
    found = verdict(UnknownOutcome("x", retry_after=90), policy=BLIND)
    assert (found.state, found.not_before) == (StepState.UNCERTAIN, NOW + timedelta(seconds=90))


@pytest.mark.parametrize("wish", ["120", object(), [1], float("nan")])
def test_what_is_no_time_is_no_wish(wish: Any) -> None:
    found = verdict(Transient("x", retry_after=wish))
    assert (found.state, found.not_before) == (StepState.DUE, None)


def test_a_wish_without_a_zone_is_local_time() -> None:
    wished = (NOW + timedelta(minutes=1)).astimezone().replace(tzinfo=None)
    assert verdict(Transient("x", retry_after=wished)).not_before == NOW + timedelta(minutes=1)


@pytest.mark.parametrize(
    ("code", "action"),
    [("rejected", "fix_record"), ("changed_at_destination", "replay"), ("conflict", "replay")],
)
def test_a_permanent_failure_is_not_tried_again(code: str, action: str) -> None:
    assert verdict(Permanent("no", code=code)) == Verdict(StepState.FAILED, code, "no", next_action=action)


@pytest.mark.parametrize("attempts", [1, 25, 1000])
def test_misconfigured_pauses_the_lane_and_burns_no_attempt(attempts: int) -> None:
    found = verdict(Misconfigured("the token ran out"), facts(attempts))
    assert found.state is StepState.DUE
    assert found.pause
    assert not found.counts
    assert found.next_attempt_at == NOW, "the lane alone holds it back"
    assert (found.error_code, found.message, found.next_action) == (
        "misconfigured",
        "the token ran out",
        "fix_config",
    )


def test_even_a_pause_ends() -> None:
    found = verdict(Misconfigured("the token ran out"), facts(waited=SEVEN_DAYS))
    assert (found.state, found.next_action, found.pause) == (StepState.FAILED, "fix_config", False)


def test_an_unknown_outcome_is_looked_up() -> None:
    found = verdict(UnknownOutcome("reset", code="reset"), facts(attempts=1000))
    assert (found.state, found.error_code, found.counts) == (StepState.UNSETTLED, "reset", True)
    assert found.next_attempt_at is not None
    assert NOW + timedelta(seconds=0.5) <= found.next_attempt_at <= NOW + timedelta(seconds=1)


@pytest.mark.parametrize("attempts", [1, 25])
def test_an_unknown_outcome_that_nobody_can_look_up_waits_for_a_person(attempts: int) -> None:
    found = verdict(UnknownOutcome("reset"), facts(attempts), BLIND)
    assert (found.state, found.next_action, found.next_attempt_at) == (StepState.UNCERTAIN, "replay", None)
    assert found.message == "reset (this destination cannot be asked whether the record arrived)"


# --- look-ups ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(0, 2**32))
def test_look_ups_come_quickly_at_first_and_then_once_a_minute(lookups: int, seed: int) -> None:
    found = still_unknown(facts(lookups=lookups), ASKABLE, random.Random(seed), "?")  # noqa: S311 - as above
    assert found.state is StepState.UNSETTLED
    assert not found.counts
    bound = min(60, 2 ** min(lookups, 10))
    assert found.next_attempt_at is not None
    assert NOW + timedelta(seconds=bound / 2) <= found.next_attempt_at <= NOW + timedelta(seconds=bound)


def test_look_ups_end_at_the_longest_wait() -> None:
    found = still_unknown(facts(waited=SEVEN_DAYS), ASKABLE, draw(), "?")
    assert (found.state, found.error_code, found.next_action) == (StepState.UNCERTAIN, "uncertain", "replay")


@given(st.floats(0, 119.99), st.integers(0, 50), st.integers(1, 100), st.integers(0, 2**32))
def test_a_create_is_not_sent_again_before_the_settle_time(
    since: float, lookups: int, attempts: int, seed: int
) -> None:
    sent = NOW - timedelta(seconds=since)
    rng = random.Random(seed)  # noqa: S311 - as above
    found = surely_absent(facts(attempts, lookups), ASKABLE, sent, rng)
    assert found.state is StepState.UNSETTLED
    assert found.next_attempt_at is not None
    assert NOW < found.next_attempt_at <= sent + timedelta(seconds=120), "and not later than it may be sent"


@pytest.mark.parametrize("settle", [0, 0.5, 120])
def test_a_create_is_sent_again_once_the_settle_time_is_over(settle: float) -> None:
    policy = replace(ASKABLE, settle_seconds=settle)
    found = surely_absent(facts(), policy, NOW - timedelta(seconds=settle), draw())
    assert found == Verdict(StepState.DUE, next_attempt_at=NOW, counts=False)


def test_the_settle_time_counts_from_the_last_request_even_if_that_is_to_come() -> None:
    """A lease that ran out notes its end as the last moment at which a request can have left."""
    found = surely_absent(facts(), ASKABLE, NOW + timedelta(hours=1), draw())
    assert found.state is StepState.UNSETTLED


def test_surely_absent_after_the_last_attempt_is_a_failure() -> None:
    sent = NOW - timedelta(hours=1)
    assert surely_absent(facts(24), ASKABLE, sent, draw()).state is StepState.DUE
    found = surely_absent(facts(25), ASKABLE, sent, draw())
    assert (found.state, found.error_code, found.next_action) == (StepState.FAILED, "exhausted", "replay")
    found = surely_absent(facts(1, waited=SEVEN_DAYS), ASKABLE, sent, draw())
    assert (found.state, found.error_code) == (StepState.FAILED, "exhausted")


def test_not_settled_and_waited_too_long_is_uncertain() -> None:
    found = surely_absent(facts(waited=SEVEN_DAYS), ASKABLE, NOW, draw())
    assert found.state is StepState.UNCERTAIN


@pytest.mark.parametrize("error", [Transient("503"), UnknownOutcome("reset"), DestinationError("odd")])
@pytest.mark.parametrize("attempts", [1, 25, 99])
def test_a_look_up_that_fails_never_makes_a_failure_of_an_unknown_outcome(
    error: DestinationError, attempts: int
) -> None:
    found = look_up_failed(error, facts(attempts), ASKABLE, draw())
    assert (found.state, found.counts) == (StepState.UNSETTLED, False)
    found = look_up_failed(error, facts(attempts, waited=SEVEN_DAYS), ASKABLE, draw())
    assert (found.state, found.next_action) == (StepState.UNCERTAIN, "replay")


def test_a_look_up_heeds_what_the_server_wishes() -> None:
    found = look_up_failed(Transient("503", retry_after=300), facts(), ASKABLE, draw())
    assert found.next_attempt_at == found.not_before == NOW + timedelta(seconds=300)


def test_a_look_up_without_rights_pauses_the_lane() -> None:
    found = look_up_failed(Misconfigured("401"), facts(), ASKABLE, draw())
    assert (found.state, found.pause, found.next_action) == (StepState.UNSETTLED, True, "fix_config")
    found = look_up_failed(Misconfigured("401"), facts(waited=SEVEN_DAYS), ASKABLE, draw())
    assert (found.state, found.next_action) == (StepState.UNCERTAIN, "replay")


def test_a_look_up_that_finds_somebody_else_s_is_a_failure() -> None:
    found = look_up_failed(Permanent("taken", code="conflict"), facts(), ASKABLE, draw())
    assert (found.state, found.error_code, found.counts) == (StepState.FAILED, "conflict", False)


# --- probes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paused", "wait"), [(-3600, 5), (0, 5), (4, 5), (5, 5), (30, 30), (60, 60), (61, 60), (86400, 60)]
)
def test_a_paused_lane_is_probed_soon_and_then_once_a_minute(paused: float, wait: float) -> None:
    since = NOW - timedelta(seconds=paused)
    assert next_probe(since, NOW) == NOW + timedelta(seconds=wait)


# --- what is written ---------------------------------------------------------------------------------------------


class Asked:
    """A destination that can be asked."""

    name = "cdcs"

    def verify(self) -> None:
        """Never called here."""


def endings() -> Endings:
    return Endings(RetrySettings(5, 3600, SEVEN_DAYS.total_seconds()), lambda: NOW)


def at(**lane: Any) -> Registered:
    return registered(Asked(), **lane)


def running(attempts: int = 0, **changes: Any) -> Any:
    job = job_row()
    step = step_row("cdcs", StepState.RUNNING, job, attempts=attempts, due_since=NOW)
    return claim(step, job, **changes)


def unsettled(attempts: int = 1, sent: datetime = NOW, **changes: Any) -> Any:
    job = job_row()
    step = step_row(
        "cdcs", StepState.UNSETTLED, job, attempts=attempts, lookups=3, due_since=NOW, last_request_at=sent
    )
    return claim(step, job, **changes)


def test_a_success_is_written_to_step_copy_and_log() -> None:
    result = ExportResult(
        success=True, destination_name="cdcs", record_id="17", record_url="https://cdcs.test/17",
        timestamp=NOW, metadata={"a": 1}, stored_sha256="cd" * 32,
    )  # fmt: skip
    end = endings().of_attempt(running(), at(), result, time.monotonic())
    assert (end.step.state, end.step.counts) == (StepState.DONE, True)
    assert end.step.result is not None
    assert end.step.result["action"] == "created"
    assert end.copy == CopyChange("17", "https://cdcs.test/17", SHA, "cd" * 32, end.claim.job.build_time)
    assert end.log is not None
    assert (end.log.success, end.log.attempt, end.log.purpose) == (True, 1, "create")
    assert (end.log.event_id, end.log.source, end.log.metadata) == ("event-1", "urn:test:builder", {"a": 1})
    assert end.lane is None


def test_an_update_is_called_so() -> None:
    result = ExportResult(success=True, destination_name="cdcs", record_id="17")
    end = endings().of_attempt(running(copy=CopyRow(record_id="17")), at(), result, time.monotonic())
    assert end.step.result is not None
    assert end.step.result["action"] == "updated"
    assert end.log is not None
    assert end.log.purpose == "update"
    assert end.copy is not None
    assert end.copy.stored_sha256 == SHA, "a server that says nothing keeps what was sent"


def test_a_failure_is_logged_and_leaves_the_copy() -> None:
    end = endings().of_attempt(running(2), at(), Permanent("no", code="rejected"), time.monotonic())
    assert end.copy is None
    assert end.log is not None
    assert (end.log.success, end.log.error_code, end.log.error_message, end.log.attempt) == (
        False, "rejected", "no", 3,
    )  # fmt: skip
    assert end.step.result is not None
    assert end.step.result["next_action"] == "fix_record"


def test_this_attempt_counts_towards_the_limit() -> None:
    assert endings().of_attempt(running(3), at(), Transient("x"), 0).step.state is StepState.DUE
    assert endings().of_attempt(running(4), at(), Transient("x"), 0).step.state is StepState.FAILED


def test_misconfigured_is_written_to_the_lane() -> None:
    end = endings().of_attempt(running(), at(), Misconfigured("401"), time.monotonic())
    assert end.lane is not None
    assert (end.lane.state, end.lane.reason) == (LaneState.PAUSED, "401")
    assert end.lane.probe_at == NOW + timedelta(seconds=5)
    assert not end.step.counts


def test_a_wish_is_written_to_the_lane() -> None:
    for ending in (Transient("429", retry_after=30), UnknownOutcome("503", retry_after=30)):
        end = endings().of_attempt(running(), at(), ending, time.monotonic())
        assert end.lane is not None
        assert (end.lane.state, end.lane.not_before) == (LaneState.ACTIVE, NOW + timedelta(seconds=30))


def test_what_a_look_up_finds_is_done_at_once() -> None:
    end = endings().of_look_up(unsettled(), at(), Present("17", "https://cdcs.test/17"), time.monotonic())
    assert (end.step.state, end.step.looked_up, end.step.counts) == (StepState.DONE, True, False)
    assert end.copy == CopyChange("17", "https://cdcs.test/17", SHA, SHA, end.claim.job.build_time)
    assert end.log is not None
    assert (end.log.success, end.log.purpose, end.log.attempt, end.log.record_id) == (True, "verify", 1, "17")


def test_a_part_is_remembered_and_completed() -> None:
    """What is missing may still be on its way, so it is sent again only when the server has settled."""
    sent = NOW - timedelta(seconds=60)
    known = unsettled(copy=CopyRow(remembered={"page": "3"}), sent=sent)
    end = endings().of_look_up(known, at(settle_seconds=61), Partial("17"), time.monotonic())
    assert end.step.state is StepState.UNSETTLED
    end = endings().of_look_up(known, at(settle_seconds=60), Partial("17"), time.monotonic())
    assert (end.step.state, end.step.next_attempt_at, end.log) == (StepState.DUE, NOW, None)
    assert end.copy == CopyChange(remembered={"page": "3", "record_id": "17"})


def test_absent_waits_for_the_settle_time_of_the_destination() -> None:
    sent = NOW - timedelta(seconds=60)
    end = endings().of_look_up(unsettled(sent=sent), at(settle_seconds=61), Absent(), time.monotonic())
    assert end.step.state is StepState.UNSETTLED
    end = endings().of_look_up(unsettled(sent=sent), at(settle_seconds=60), Absent(), time.monotonic())
    assert (end.step.state, end.step.counts, end.log) == (StepState.DUE, False, None)


def test_absent_is_as_old_as_the_question() -> None:
    sent, asked = NOW - timedelta(seconds=61), NOW - timedelta(seconds=2)
    claimed = replace(unsettled(sent=sent), claimed_at=asked)
    end = endings().of_look_up(claimed, at(settle_seconds=60), Absent(), time.monotonic())
    assert (end.step.state, end.step.next_attempt_at) == (StepState.UNSETTLED, NOW)


def test_what_is_given_up_stays_unresolved_for_the_next_build() -> None:
    end = endings().of_attempt(running(), registered(object()), UnknownOutcome("cut"), time.monotonic())
    assert (end.step.state, end.unresolved_at) == (StepState.UNCERTAIN, NOW)


def test_unsure_asks_again() -> None:
    end = endings().of_look_up(unsettled(), at(), Unsure("a login page"), time.monotonic())
    assert (end.step.state, end.step.reason, end.step.looked_up) == (StepState.UNSETTLED, "a login page", True)
    end = endings().of_look_up(unsettled(), at(), Unsure(), time.monotonic())
    assert end.step.reason == "the look-up gave no answer"


@pytest.mark.parametrize("attempts", [1, 5, 50])
def test_a_look_up_that_raises_is_no_attempt(attempts: int) -> None:
    for error in (Transient("503", retry_after=30), UnknownOutcome("cut"), Misconfigured("401")):
        end = endings().of_look_up(unsettled(attempts), at(), error, time.monotonic())
        assert (end.step.state, end.step.counts, end.step.looked_up) == (StepState.UNSETTLED, False, True), error
        assert end.log is None
        assert end.step.next_attempt_at is not None
    assert end.lane is not None
    assert end.lane.state is LaneState.PAUSED


def test_a_look_up_that_ends_a_step_is_logged() -> None:
    end = endings().of_look_up(unsettled(2), at(), Permanent("taken", code="conflict"), time.monotonic())
    assert end.step.state is StepState.FAILED
    assert end.log is not None
    assert (end.log.error_code, end.log.purpose, end.log.attempt) == ("conflict", "verify", 2)


def test_a_superseded_attempt_is_not_tried_again() -> None:
    end = of_superseded(endings().of_attempt(running(), at(), Transient("x"), 0))
    assert (end.step.state, end.step.next_attempt_at) == (StepState.SUPERSEDED, None)
    for ending in (UnknownOutcome("x"), Permanent("x")):
        kept = endings().of_attempt(running(), at(), ending, 0)
        assert of_superseded(kept) == kept


def test_a_record_that_a_destination_does_not_want_is_skipped() -> None:
    end = skipped(running(), "not for us")
    assert (end.step.state, end.step.reason, end.step.counts, end.log) == (
        StepState.SKIPPED, "not for us", False, None,
    )  # fmt: skip
