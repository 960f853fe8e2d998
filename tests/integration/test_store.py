"""The store's transactions T1 to T5 on both databases: who may write what, and what survives."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError, StatementError

from consumer.events import job_id
from consumer.store import consumers, jobs, lanes, outbox, recovery, schema, status, steps
from consumer.store.connection import Database, is_data_error
from consumer.store.rows import (
    AttemptEnd,
    Claim,
    CopyChange,
    JobState,
    LaneChange,
    LaneState,
    LogEntry,
    Message,
    NewJob,
    NewStep,
    StepChange,
    StepState,
)
from consumer.store.steps import Wanted
from consumer.store.tables import outbox as outbox_table
from consumer.store.tables import upload_log

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
LATER = NOW + timedelta(minutes=10)
SHA = "ab" * 32
WANTED = Wanted("cdcs", 10, 150.0)

#: What people and servers write: quotes and markup, letters of two code units, right to left, no letters at all.
HOSTILE = (
    "'; DROP TABLE jobs; --\"\\ %s {0} :name ?1 $1 <b>&amp;\r\n\t\N{ZERO WIDTH SPACE}ñ文字"
    "\N{MATHEMATICAL FRAKTUR CAPITAL U}\N{MICROSCOPE}\N{RIGHT-TO-LEFT OVERRIDE}\x7f\x1b[31m"
)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """Give a database with all tables."""
    async with Database(database_url) as found:
        await schema.upgrade(found)
        yield found


def new_job(event_id: str, session: str = "session", *destinations: str) -> NewJob:
    """Return a job that is about to be accepted."""
    return NewJob(
        id=job_id("urn:test", event_id),
        source="urn:test",
        event_id=event_id,
        data_sha256=SHA,
        session=session,
        build_time=NOW,
        event="{}",
        strategy="all",
        steps=tuple(NewStep(name, 100) for name in destinations or ("cdcs",)),
    )


async def accept(database: Database, *new: NewJob) -> None:
    """Accept jobs (T1) whose record is kept already."""
    async with database.write() as connection:
        await jobs.insert_jobs(connection, new, NOW)
        await jobs.keep_snapshots(connection, [(job.id, SHA, "a.xml", {}) for job in new])


async def due(database: Database, *new: NewJob) -> None:
    """Let all steps of jobs be due."""
    changes = [
        StepChange(job.id, step.destination, StepState.DUE, next_attempt_at=NOW) for job in new for step in job.steps
    ]
    async with database.write() as connection:
        await steps.move_steps(connection, changes)


async def claim(database: Database, owner: str = "one", wanted: Wanted = WANTED, now: datetime = NOW) -> list[Claim]:
    """Claim what is due (T2)."""
    async with database.write() as connection:
        found = await steps.due_steps(connection, wanted, now, lock=not database.is_sqlite)
        known = await jobs.load_jobs(connection, {step.job_id for step in found})
        until = now + timedelta(seconds=wanted.lease_seconds)
        ready = [steps.unclaimed(step, known[step.job_id], until) for step in found]
        return await steps.claim(connection, ready, owner, now, can_verify=False, is_sqlite=database.is_sqlite)


def ended(taken: Claim, state: StepState = StepState.DONE, copy: CopyChange | None = None) -> AttemptEnd:
    """Return the end of an attempt."""
    at = LATER if state in {StepState.DUE, StepState.UNSETTLED} else None
    change = StepChange(taken.job.id, taken.step.destination, state, next_attempt_at=at, counts=True)
    entry = LogEntry(
        taken.job.session, taken.step.destination, state is StepState.DONE, LATER, None, None, None, {},
        taken.job.event_id, taken.job.source, 1, None, 0.5, "create",
    )  # fmt: skip
    return AttemptEnd(taken, change, entry, copy)


async def write(database: Database, *ends: AttemptEnd) -> list[AttemptEnd]:
    """Write ends of attempts (T4); returns those whose fence held."""
    async with database.write() as connection:
        held = await steps.lock_copies(connection, ends)
        await steps.write_ends(connection, held, LATER)
    return held


async def state_of(database: Database, job: NewJob, destination: str = "cdcs") -> StepState:
    async with database.read() as connection:
        found = await jobs.load_steps(connection, [job.id])
    return next(step.state for step in found[job.id] if step.destination == destination)


# --- T1 --------------------------------------------------------------------------------------------------------


async def test_a_batch_is_accepted_as_a_whole_or_not_at_all(database: Database) -> None:
    await accept(database, new_job("known"))
    with pytest.raises(IntegrityError) as caught:
        await accept(database, new_job("fresh"), new_job("known"))
    assert is_data_error(caught.value)
    async with database.read() as connection:
        assert set(await jobs.known_digests(connection, [job_id("urn:test", n) for n in ("known", "fresh")])) == {
            job_id("urn:test", "known")
        }


async def test_a_newer_build_takes_over_what_has_not_begun(database: Database) -> None:
    old, new = new_job("old", "s", "cdcs", "local_archive"), new_job("new", "s")
    await accept(database, old)
    await due(database, old)
    (running,) = await claim(database)
    async with database.write() as connection:
        await jobs.insert_jobs(connection, [new], NOW)
        await jobs.supersede(connection, old.id, new.id)
        assert (await jobs.newest_builds(connection, ["s"]))["s"].id == new.id
        assert [job.id for job in await jobs.superseded_jobs(connection, [new.id])] == [old.id]
    assert await state_of(database, old) is StepState.RUNNING
    assert await state_of(database, old, "local_archive") is StepState.SUPERSEDED
    # the copy is held until the running attempt has ended
    await due(database, new)
    assert await claim(database) == []
    await write(database, ended(running))
    assert [taken.job.id for taken in await claim(database)] == [new.id]


async def test_a_job_is_reopened_only_at_the_revision_it_failed_at(database: Database) -> None:
    job = new_job("event")
    await accept(database, job)
    async with database.write() as connection:
        assert not await jobs.reopen(connection, job.id, 1, NOW)  # it is open
        await jobs.fail_all_steps(connection, job.id, "code", "why")
        await jobs.finish_jobs(connection, [(job.id, JobState.FAILED)], NOW)
        assert not await jobs.reopen(connection, job.id, 2, NOW)
        assert not await jobs.reopen(connection, uuid4(), 1, NOW)
        assert await jobs.reopen(connection, job.id, 1, NOW)
        assert not await jobs.reopen(connection, job.id, 1, NOW)
        loaded = (await jobs.load_jobs(connection, [job.id]))[job.id]
    assert (loaded.state, loaded.revision) == (JobState.OPEN, 2)
    assert await state_of(database, job) is StepState.BLOCKED


# --- T2 --------------------------------------------------------------------------------------------------------


async def test_one_claim_for_each_session_and_destination(database: Database) -> None:
    same = [new_job(f"same {number}", "same") for number in range(3)]
    other = new_job("other", "other", "cdcs", "local_archive")
    await accept(database, *same, other)
    await due(database, *same, other)
    taken = await claim(database)
    assert sorted(item.job.session for item in taken) == ["other", "same"]
    assert all(item.fence == 1 for item in taken)
    assert await claim(database) == []
    # another destination of the same session is another copy
    assert len(await claim(database, wanted=replace(WANTED, destination="local_archive"))) == 1


async def test_claims_at_once_share_and_never_overlap(database: Database) -> None:
    work = [new_job(f"event {number}", f"session {number}") for number in range(40)]
    await accept(database, *work)
    await due(database, *work)
    found = await asyncio.gather(*(claim(database, f"owner {n}", replace(WANTED, limit=7)) for n in range(8)))
    taken = [item.job.id for claims in found for item in claims]
    assert len(taken) == len(set(taken))
    while more := await claim(database):
        taken += [item.job.id for item in more]
    assert sorted(taken) == sorted(job.id for job in work)


async def test_nothing_is_claimed_before_it_is_due(database: Database) -> None:
    job = new_job("event")
    await accept(database, job)
    assert await claim(database) == []
    await due(database, job)
    assert await claim(database, now=NOW - timedelta(seconds=1)) == []
    (taken,) = await claim(database)
    await write(database, ended(taken, StepState.DUE))
    assert await claim(database) == []
    (again,) = await claim(database, now=LATER)
    assert again.fence == 2


async def test_an_unsettled_step_keeps_its_copy_from_others(database: Database) -> None:
    first, second = new_job("first"), new_job("second")
    await accept(database, first, second)
    await due(database, first)
    (taken,) = await claim(database)
    await write(database, ended(taken, StepState.UNSETTLED))
    await due(database, second)
    (again,) = await claim(database, now=LATER)
    assert (again.job.id, again.looks_up) == (first.id, True)
    assert await state_of(database, first) is StepState.UNSETTLED  # a look-up sends nothing


# --- T3, T4 ----------------------------------------------------------------------------------------------------


async def test_a_fence_refuses_facts_and_results_that_come_late(database: Database) -> None:
    job = new_job("event")
    await accept(database, job)
    await due(database, job)
    (lost,) = await claim(database)
    async with database.write() as connection:
        assert await steps.remember(connection, lost, {"page": "1"})
        assert await recovery.abandoned_steps(connection, NOW, everything=False) == []
        found = await recovery.abandoned_steps(connection, LATER, everything=False)
        assert found == [(job.id, "cdcs")]
        await recovery.abandon(connection, job.id, "cdcs", LATER, can_verify=True, dead=False)
    assert await state_of(database, job) is StepState.UNSETTLED
    async with database.write() as connection:
        assert not await steps.remember(connection, lost, {"page": "2"})
    assert await write(database, ended(lost, copy=CopyChange("late"))) == []
    assert await state_of(database, job) is StepState.UNSETTLED

    (mine,) = await claim(database, now=LATER)
    assert mine.copy.remembered == {"page": "1"}
    assert mine.copy.record_id is None
    assert await write(database, ended(lost), ended(mine, copy=CopyChange("mine"))) == [
        ended(mine, copy=CopyChange("mine"))
    ]
    async with database.read() as connection:
        rows = list(await connection.execute(select(upload_log.c.error_code).order_by(upload_log.c.id)))
    assert [row.error_code for row in rows] == ["interrupted", None]


@pytest.mark.parametrize(("can_verify", "state"), [(True, StepState.UNSETTLED), (False, StepState.UNCERTAIN)])
async def test_at_the_start_of_the_only_engine_every_running_step_is_abandoned(
    database: Database, can_verify: bool, state: StepState
) -> None:
    job = new_job("event")
    await accept(database, job)
    await due(database, job)
    await claim(database)
    async with database.write() as connection:
        for found, destination in await recovery.abandoned_steps(connection, NOW, everything=True):
            await recovery.abandon(connection, found, destination, NOW, can_verify=can_verify, dead=True)
    assert await state_of(database, job) is state


async def test_a_result_that_knows_less_leaves_the_copy_as_it_is(database: Database) -> None:
    job = new_job("event")
    await accept(database, job)
    await due(database, job)
    (taken,) = await claim(database)
    full = CopyChange("17", "https://x.test/17", SHA, SHA, NOW, {"page": "1"})
    await write(database, ended(taken, StepState.DUE, full))
    (again,) = await claim(database, now=LATER)
    await write(database, ended(again, StepState.DUE))
    (last,) = await claim(database, now=LATER)
    copy = last.copy
    assert (copy.record_id, copy.record_url, copy.sent_sha256) == ("17", "https://x.test/17", SHA)
    assert (copy.build_time, copy.remembered, copy.fence) == (NOW, {"page": "1"}, 3)
    assert last.step.attempts == 2


# --- T5 --------------------------------------------------------------------------------------------------------


async def test_a_message_is_added_once_and_sent_once(database: Database) -> None:
    message = Message("outcome", "id-1", "exchange", "key", b"first")
    async with database.write() as connection:
        await outbox.add(connection, [message], NOW, is_sqlite=database.is_sqlite)
    async with database.write() as connection:
        again = [replace(message, body=b"second"), replace(message, kind="failed")]
        await outbox.add(connection, again, NOW, is_sqlite=database.is_sqlite)
    async with database.read() as connection:
        assert await outbox.unsent(connection, NOW - timedelta(seconds=1), 10) == []
        found = await outbox.unsent(connection, NOW, 10)
    assert [(item.kind, item.body) for item in found] == [("outcome", b"first"), ("failed", b"first")]
    async with database.write() as connection:
        await outbox.mark_sent(connection, [(message, True)], LATER)
    async with database.read() as connection:
        assert [item.kind for item in await outbox.unsent(connection, LATER, 10)] == ["failed"]
        seen = await status.load(connection, LATER)
    assert (seen.unsent, seen.unrouted) == (1, 1)


async def test_two_rows_of_one_message_are_impossible(database: Database) -> None:
    row = {
        "kind": "outcome", "message_id": "id-1", "exchange": "", "routing_key": "", "content_type": "",
        "headers": "{}", "body": b"", "created_at": NOW,
    }  # fmt: skip
    with pytest.raises(IntegrityError):
        async with database.write() as connection:
            await connection.execute(insert(outbox_table), [row, row])


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_relays_of_two_processes_do_not_send_the_same_message(database: Database) -> None:
    messages = [Message("outcome", f"id-{number}", "e", "k", b"") for number in range(4)]
    async with database.write() as connection:
        await outbox.add(connection, messages, NOW, is_sqlite=False)
    async with database.write() as one, database.write() as two:
        first = await outbox.unsent(one, NOW, 2, lock=True)
        second = await outbox.unsent(two, NOW, 10, lock=True)
    assert [item.message_id for item in first + second] == [f"id-{number}" for number in range(4)]


# --- what is stored --------------------------------------------------------------------------------------------


async def test_a_time_without_a_zone_is_refused_and_every_zone_is_one_moment(database: Database) -> None:
    naive = NOW.replace(tzinfo=None)
    with pytest.raises(StatementError, match="naive"):
        await accept(database, replace(new_job("event"), build_time=naive))
    abroad = NOW.astimezone(datetime.fromisoformat("2026-01-01T00:00:00-11:30").tzinfo)
    job = replace(new_job("event"), build_time=abroad)
    await accept(database, job)
    async with database.read() as connection:
        loaded = (await jobs.load_jobs(connection, [job.id]))[job.id]
    assert loaded.build_time == NOW
    assert loaded.build_time.utcoffset() == timedelta(0)


async def test_hostile_texts_survive_in_every_column(database: Database) -> None:
    event = json.dumps({"text": HOSTILE}, ensure_ascii=False)
    job = NewJob(
        id=job_id(HOSTILE, HOSTILE), source=HOSTILE, event_id=HOSTILE, data_sha256=SHA, session=HOSTILE,
        build_time=NOW, event=event, strategy="all", steps=(NewStep("cdcs", 1),),
    )  # fmt: skip
    await accept(database, job)
    async with database.write() as connection:
        await jobs.keep_snapshots(connection, [(job.id, SHA, HOSTILE, {"user": HOSTILE})])
    await due(database, job)
    (taken,) = await claim(database)
    async with database.write() as connection:
        assert await steps.remember(connection, taken, {HOSTILE: HOSTILE})
    end = ended(taken, StepState.DUE, CopyChange(HOSTILE, HOSTILE))
    change = replace(end.step, error_code="code", reason=HOSTILE, result={"metadata": {HOSTILE: HOSTILE}})
    assert end.log is not None
    entry = replace(end.log, record_id=HOSTILE, record_url=HOSTILE, error_message=HOSTILE, metadata={"a": HOSTILE})
    await write(database, replace(end, step=change, log=entry))
    message = Message("outcome", HOSTILE, HOSTILE, HOSTILE, HOSTILE.encode(), {HOSTILE: HOSTILE}, job_id=job.id)
    async with database.write() as connection:
        await outbox.add(connection, [message], NOW, is_sqlite=database.is_sqlite)
        pause = LaneChange("cdcs", LaneState.PAUSED, HOSTILE)
        await lanes.change(connection, [pause], NOW, is_sqlite=database.is_sqlite)
        await consumers.beat(connection, HOSTILE, NOW, connected=True, is_sqlite=database.is_sqlite)

    async with database.read() as connection:
        assert await outbox.unsent(connection, NOW, 10) == [message]
        assert (await lanes.load(connection))["cdcs"].reason == HOSTILE
        assert [owner for owner, _, _ in await consumers.alive(connection, NOW)] == [HOSTILE]
        loaded = (await jobs.load_jobs(connection, [job.id]))[job.id]
        (row,) = await connection.execute(select(upload_log))
    assert (loaded.source, loaded.event_id, loaded.session) == (HOSTILE, HOSTILE, HOSTILE)
    assert (loaded.event, loaded.record_name, loaded.facts) == (event, HOSTILE, {"user": HOSTILE})
    texts = {row.session_identifier, row.event_id, row.source, row.record_id, row.record_url, row.error_message}
    assert texts == {HOSTILE}
    assert json.loads(row.metadata_json) == {"a": HOSTILE}
    (again,) = await claim(database, now=LATER)
    assert (again.step.reason, again.step.result) == (HOSTILE, {"metadata": {HOSTILE: HOSTILE}})
    assert (again.copy.record_id, again.copy.remembered) == (HOSTILE, {HOSTILE: HOSTILE})


async def test_a_lane_that_is_asked_to_wait_never_waits_shorter(database: Database) -> None:
    async with database.write() as connection:
        for minutes in (10, 5):
            change = LaneChange("cdcs", LaneState.ACTIVE, "slow", NOW + timedelta(minutes=minutes))
            await lanes.change(connection, [change], NOW, is_sqlite=database.is_sqlite)
    async with database.read() as connection:
        assert (await lanes.load(connection))["cdcs"].not_before == LATER
