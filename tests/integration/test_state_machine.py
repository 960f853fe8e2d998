"""Store and engine under every order of events, endings, crashes and passing time that Hypothesis thinks of.

Rules take one turn of a stage, deliver an event, answer a request, let time pass, or end the consumer in the middle.
After each rule the invariants of the store hold; at the end all servers are well, and whatever is due runs until
nothing is. Then every accepted event has its outcome, and there is one copy of each record where it was reported.
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from consumer.events import REPLAY_HEADER
from tests.integration.harness import built, inline, job_of, outcome_id
from tests.integration.virtual import (
    HEALTHY_EXPORT,
    HEALTHY_LOOK_UP,
    START,
    AskableRemote,
    Reply,
    World,
)

SESSIONS = ("one", "two")
STRATEGIES = ("all", "first_success", "best_effort")
IN_FLIGHT = {"running", "unsettled"}
TERMINAL = {"uncertain", "done", "failed", "skipped", "superseded"}
#: So many turns bring everything to its end when all servers are well; more means that something is stuck.
TURNS = 300

#: What becomes of a request that was given up: never committed, committed before, or later by a share of H.
EFFECTS = st.sampled_from([None, 0.0, 0.3, 0.9, 0.9])
WISHES = st.sampled_from([None, None, 7.0, 900.0])
ENDINGS = st.one_of(
    st.just(HEALTHY_EXPORT),
    st.builds(Reply, st.just("unknown"), EFFECTS, WISHES),
    st.builds(Reply, st.just("unknown"), EFFECTS),
    st.builds(Reply, st.just("transient"), st.none(), WISHES),
    st.sampled_from([Reply("permanent"), Reply("misconfigured"), Reply("refused")]),
)
ANSWERS = st.one_of(
    st.just(HEALTHY_LOOK_UP),
    st.sampled_from([Reply("early"), Reply("unsure"), Reply("misconfigured")]),
    st.builds(Reply, st.sampled_from(["transient", "unknown"]), st.none(), WISHES),
)
#: How many minutes a build is older than the newest; None: nobody says when it was.
AGES = st.sampled_from([0, 0, 0, 1, 2, None])
Work = Sequence[tuple[Reply, Reply]]
WORK: st.SearchStrategy[Work] = st.lists(st.tuples(ENDINGS, ANSWERS), min_size=2, max_size=5)
SECONDS = st.sampled_from([1.0, 15.0, 59.0, 119.0, 121.0, 600.0, 3600.0, 5 * 3600.0])
RECORDS = st.sampled_from(["a.xml", "a.xml", "a.xml", "late.xml", "refused.xml"])
DESTINATIONS = st.sampled_from([None, None, ["alpha"], ["gamma"], ["beta", "gamma"]])


@dataclass(frozen=True, slots=True)
class Sent:
    """An event that intake has accepted."""

    id: str
    session: str
    body: bytes


class Machine(RuleBasedStateMachine):
    """The rules; ``world`` is the consumer with its servers, ``sent`` what was accepted, in order of arrival."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="nexus-machine-"))
        self.world = World(self.folder, self.template)
        self.sent: list[Sent] = []
        self.minutes: Counter[str] = Counter()
        self.fences: dict[tuple[str, str], int] = {}
        self.before: dict[tuple[str, str], tuple[str, int]] = {}

    def teardown(self) -> None:
        """Bring everything to its end, and compare."""
        try:
            self.settle()
        finally:
            self.world.close()
            shutil.rmtree(self.folder)

    # --- events ------------------------------------------------------------------------------------------------

    def send(self, session: str, minute: int | None, text: str, name: str = "a.xml", **data: Any) -> None:
        """Deliver a new event."""
        time = None if minute is None else (START - timedelta(days=1) + timedelta(minutes=minute)).isoformat()
        event_id = f"event-{len(self.sent)}"
        data = {field: value for field, value in data.items() if value is not None}
        event = built(session, inline(name, f"<{text}/>".encode()), event_id=event_id, time=time, **data)
        sent = Sent(event_id, session, json.dumps(event).encode())
        accepted = self.world.deliver(sent.body)
        assert [job.event_id for job in accepted.new] == [event_id]
        self.sent.append(sent)

    @rule(
        session=st.sampled_from(SESSIONS), age=AGES, text=st.sampled_from("abc"), name=RECORDS,
        strategy=st.sampled_from([None, *STRATEGIES]), destinations=DESTINATIONS, starts=st.booleans(),
    )  # fmt: skip
    def build(
        self, *, session: str, age: int | None, text: str, name: str = "a.xml", strategy: str | None = None,
        destinations: Any = None, starts: bool = False,
    ) -> None:  # fmt: skip
        """Build a session anew, or let an older build arrive late; the content may be the same as before."""
        minute = None
        if age is not None:
            minute = self.minutes[session] = self.minutes[session] + 1
            minute -= age
        self.send(session, minute, text, name, strategy=strategy, destinations=destinations)
        if starts:
            self.turn()

    @precondition(lambda self: self.sent)
    @rule(which=st.integers(0, 9), times=st.integers(1, 2), other=st.booleans())
    def deliver_again(self, which: int, times: int, other: bool) -> None:
        """Deliver a known event again, or other data under its id."""
        body = self.sent[which % len(self.sent)].body
        if other:
            event = json.loads(body)
            event["data"]["user"] = "somebody else"
            body = json.dumps(event).encode()
        accepted = self.world.deliver(*[body] * times, again=True)
        assert accepted.new == []
        assert (accepted.known, len(accepted.poison)) == ((0, times) if other else (times, 0))

    @precondition(lambda self: self.letters())
    @rule(which=st.integers(0, 9))
    def replay(self, which: int) -> None:
        """Move a dead letter back; only the one of the job's last failure has an effect."""
        letters = self.letters()
        body, headers = letters[which % len(letters)]
        job, _, revision = headers[REPLAY_HEADER].partition("/")
        (row,) = self.world.rows("SELECT * FROM jobs WHERE id = ?", job)
        accepted = self.world.deliver(body, headers=headers)
        is_stale = (row["state"], row["revision"]) != ("failed", int(revision))
        assert not (is_stale and accepted.reopened)
        assert (accepted.new, accepted.poison) == ([], [])

    def letters(self) -> list[tuple[bytes, Mapping[str, str]]]:
        """Return the dead letters of failed jobs."""
        found = self.world.rows("SELECT body, headers FROM outbox WHERE kind = 'failed' ORDER BY seq")
        return [(bytes(row["body"]), json.loads(row["headers"])) for row in found]

    # --- turns -------------------------------------------------------------------------------------------------

    @rule()
    def turn(self) -> None:
        """Read records, and start what is due."""
        self.world.keep()
        self.world.turn()

    @rule(mended=st.sampled_from([None, "alpha", "beta", "gamma"]))
    def tick(self, mended: str | None) -> None:
        """Let housekeeping look; a token may have been mended."""
        if mended:
            self.world.remotes[mended].valid = True
        self.world.tick()

    @rule(sure=st.booleans())
    def recheck(self, sure: bool) -> None:
        """Let last look-ups run."""
        self.set_rechecks(Reply("truth" if sure else "unsure"))
        self.world.recheck()

    def set_rechecks(self, reply: Reply) -> None:
        """Say how last look-ups are answered."""
        for remote in self.world.remotes.values():
            if isinstance(remote, AskableRemote):
                remote.recheck = reply

    @precondition(lambda self: self.world.open_requests())
    @rule(which=st.integers(0, 9), ending=ENDINGS, answer=ANSWERS)
    def reply(self, which: int, ending: Reply, answer: Reply) -> None:
        """Let a server answer."""
        found = self.world.open_requests()
        remote, request = found[which % len(found)]
        self.world.answer(remote, request, answer if request.looks_up else ending)

    @initialize(work=WORK, works=st.booleans())
    def begin(self, *, work: Work, works: bool) -> None:
        """Begin with one build under way."""
        self.build(session="one", age=0, text="a", starts=True)
        if works:
            self.work(work)

    @rule(work=WORK)
    def work(self, work: Work) -> None:
        """Take turns, and let every server answer."""
        for ending, answer in work:
            self.turn()
            for remote, request in self.world.open_requests():
                self.world.answer(remote, request, answer if request.looks_up else ending)

    @rule(seconds=SECONDS, effect=EFFECTS)
    def advance(self, seconds: float, effect: float | None) -> None:
        """Let time pass, then take a turn."""
        self.world.advance(seconds, effect)
        self.world.tick()
        self.turn()

    @rule(
        busy=st.booleans(), orderly=st.booleans(), effects=st.lists(EFFECTS, min_size=1, max_size=4),
        down=st.sampled_from([0.0, 1.0, 200.0]),
    )  # fmt: skip
    def restart(self, *, busy: bool, orderly: bool, effects: Sequence[float | None], down: float) -> None:
        """End the consumer in the middle of everything, and start another one."""
        if busy:
            self.turn()
        self.world.restart(orderly=orderly, effects=effects, down_seconds=down)

    # --- what always holds -------------------------------------------------------------------------------------

    @invariant()
    def always(self) -> None:
        """Check what holds at any moment."""
        self.one_in_flight()
        self.one_outcome_a_revision()
        self.what_is_reported_is_there()
        self.one_copy()
        self.fences_only_rise()
        self.what_has_ended_stays()
        self.one_job_an_event()

    def one_in_flight(self) -> None:
        """Hold one running or unsettled step for each copy, and one for each job that tries one after the other."""
        rows = self.world.rows(
            "SELECT s.session, s.destination, s.job_id, j.strategy FROM steps s JOIN jobs j ON j.id = s.job_id"
            " WHERE s.state IN ('running', 'unsettled')"
        )
        copies = Counter((row["session"], row["destination"]) for row in rows)
        assert not {copy: count for copy, count in copies.items() if count > 1}, "two attempts at one copy"
        in_line = Counter(row["job_id"] for row in rows if row["strategy"] == "first_success")
        assert not {job: count for job, count in in_line.items() if count > 1}, "first success tries two at once"

    def one_outcome_a_revision(self) -> None:
        """Give each revision of a finished job one outcome, and none to one that is open."""
        rows = self.world.rows("SELECT message_id, count(*) AS n FROM outbox WHERE kind = 'outcome' GROUP BY 1")
        outcomes = {row["message_id"]: row["n"] for row in rows}
        assert set(outcomes.values()) <= {1}
        for job in self.world.rows("SELECT * FROM jobs"):
            for revision in range(1, job["revision"] + 1):
                is_over = revision < job["revision"] or job["finished_at"] is not None
                assert (outcome_id(job["event_id"], revision) in outcomes) == is_over, (dict(job), revision)
            assert (job["finished_at"] is None) == (job["state"] == "open" or self.waits_for_successor(job))

    def waits_for_successor(self, job: Any) -> bool:
        """Tell whether a superseded job has nothing to repeat yet."""
        if job["state"] != "superseded":
            return False
        (successor,) = self.world.rows("SELECT finished_at FROM jobs WHERE id = ?", job["superseded_by"])
        return job["finished_at"] is None and successor["finished_at"] is None

    def what_is_reported_is_there(self) -> None:
        """Find each reported copy at its server."""
        there = {name: {copy.id for copy in remote.copies} for name, remote in self.world.remotes.items()}
        for row in self.world.rows("SELECT body FROM outbox WHERE kind = 'outcome'"):
            for result in json.loads(row["body"])["data"]["results"]:
                if result["success"]:
                    assert result["record_id"] in there[result["destination"]], result

    def one_copy(self) -> None:
        """Find at most one live copy of each session at each server, at any moment."""
        for name, remote in self.world.remotes.items():
            for key, count in Counter(copy.key for copy in remote.copies).items():
                assert count <= 1, f"duplicate at {name} of {key}"

    def fences_only_rise(self) -> None:
        """Let no fence fall."""
        for row in self.world.rows("SELECT session, destination, fence FROM copies"):
            key = (row["session"], row["destination"])
            assert row["fence"] >= self.fences.get(key, 0)
            self.fences[key] = row["fence"]

    def what_has_ended_stays(self) -> None:
        """Change a finished step only by a replay, or for a link."""
        now = {}
        for row in self.world.rows("SELECT s.*, j.revision FROM steps s JOIN jobs j ON j.id = s.job_id"):
            key = (row["job_id"], row["destination"])
            state, revision = now[key] = (row["state"], row["revision"])
            old_state, old_revision = self.before.get(key, (state, revision))
            if old_state in TERMINAL and state != old_state:
                assert revision > old_revision or row["purpose"] == "link", (dict(row), old_state)
        self.before = now

    def one_job_an_event(self) -> None:
        """Hold one job for each accepted event."""
        found = [UUID(row["id"]) for row in self.world.rows("SELECT id FROM jobs")]
        assert sorted(found) == sorted(job_of(sent.id) for sent in self.sent)

    # --- the end -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let every server be well, and all that is due run, until nothing is; then compare."""
        for remote in self.world.remotes.values():
            remote.valid = True
        self.set_rechecks(HEALTHY_LOOK_UP)
        for _ in range(TURNS):
            self.turn_when_all_is_well()
            self.always()
            due = self.world.next_due()
            if due is None:
                break
            self.world.advance((due - self.world.clock.now).total_seconds())
        else:
            pytest.fail("stuck: there is always something due")
        opened = self.world.rows("SELECT event_id, state FROM jobs WHERE finished_at IS NULL")
        assert not [dict(row) for row in opened], "stuck: jobs without an outcome and nothing due"
        self.newest_content()

    def turn_when_all_is_well(self) -> None:
        """Take a turn of every stage; servers answer at once."""
        while True:
            self.world.tick()  # first: it resumes lanes and takes decisions that the turn waits for
            self.turn()
            requests = self.world.open_requests()
            for remote, request in requests:
                self.world.answer(remote, request, HEALTHY_LOOK_UP if request.looks_up else HEALTHY_EXPORT)
            if not requests:
                break
        self.world.recheck()

    def newest(self) -> dict[str, Any]:
        """Return the newest build of each session; one that failed before its record was kept does not count."""
        order = {str(job_of(sent.id)): number for number, sent in enumerate(self.sent)}
        jobs = self.world.rows("SELECT * FROM jobs WHERE state != 'failed' OR record_sha256 IS NOT NULL")
        return {job["session"]: job for job in sorted(jobs, key=lambda job: (job["build_time"], order[job["id"]]))}

    def newest_content(self) -> None:
        """Find the content of a session's newest build wherever that reports success."""
        for job in self.newest().values():
            for step in self.world.rows("SELECT * FROM steps WHERE job_id = ? AND state = 'done'", job["id"]):
                record_id = json.loads(step["result"])["record_id"]
                (copy,) = [c for c in self.world.remotes[step["destination"]].copies if c.id == record_id]
                assert copy.content == job["record_sha256"], f"an older build's content at {step['destination']}"


def test_every_order_of_events(template: Path) -> None:
    Machine.template = template
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=50, stateful_step_count=30, deadline=None, print_blob=True, derandomize=False,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
