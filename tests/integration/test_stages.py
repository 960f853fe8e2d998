"""What an independent reading has found, one stage at a time: links, lanes, and whose turn it is."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from consumer.destinations.contract import Answer, ExportContext, ExportResult, Present, request_turn
from consumer.errors import Misconfigured, Transient, UnknownOutcome
from consumer.pipeline.lanes import FAILURES_IN_A_ROW
from consumer.pipeline.recheck import BATCH
from consumer.store import lanes, recovery
from consumer.store.rows import LaneChange, LaneState
from tests.integration.harness import sha256
from tests.integration.stages import LANE, AskableDestination, Destination, Stages
from tests.integration.virtual import MAX_WAIT_SECONDS, SETTLE_SECONDS, Clock

AWAY = Transient("no route to the server", code="cannot_connect")
BROKEN = Transient("the server stumbled", code="server_error")
LOST = UnknownOutcome("the answer was lost")
DAY_SECONDS = 86400.0
LONG_DIGEST = "sha512:" + "a" * 128

Begin = Callable[..., Stages]


@pytest.fixture
async def begin(tmp_path: Path, template: Path) -> AsyncIterator[Begin]:
    """Give a function that starts a consumer with some destinations; keywords change their lanes."""
    shutil.copy(template, tmp_path / "test.db")
    clock, begun = Clock(), list[Stages]()

    def start(*destinations: Any, **lane: Any) -> Stages:
        begun.append(Stages(tmp_path, clock, destinations, replace(LANE, **lane)))
        return begun[-1]

    yield start
    for stages in begun:
        await stages.close()


# --- links -------------------------------------------------------------------------------------------------------


class DeclinesLinks(AskableDestination):
    """Does not want links that come late."""

    def accepts(self, context: ExportContext) -> bool:
        """Say no to a link."""
        return context.purpose != "link"


async def without_its_link(begin: Begin, alpha: Destination, beta: Destination) -> Stages:
    """Let ``beta`` have a copy while ``alpha``, to which it links, cannot be reached; then it can be."""
    stages = begin(alpha, beta)
    alpha.error = AWAY
    await stages.deliver(1, "a")
    await stages.turns(2)
    assert [context.links for context in beta.written] == [{}]
    alpha.error = None
    stages.advance(60)
    return stages


async def test_a_link_of_an_older_build_writes_nothing_after_a_newer_one(begin: Begin) -> None:
    alpha, beta = AskableDestination("alpha"), AskableDestination("beta", priority=90, links_to=["alpha"])
    stages = await without_its_link(begin, alpha, beta)
    beta.error = BROKEN
    await stages.turns(2)
    assert beta.calls[-1].purpose == "link"
    beta.error = None
    await stages.deliver(2, "b")
    await stages.turns(2)
    await stages.turns(10, apart_seconds=30)
    assert [context.record_sha256 for context in beta.written] == [sha256(b"<a/>"), sha256(b"<b/>")]
    assert set(stages.column("SELECT state FROM steps")) == {"done"}


async def test_a_link_that_is_declined_is_not_asked_for_again(begin: Begin) -> None:
    stages = await without_its_link(
        begin, AskableDestination("alpha"), DeclinesLinks("beta", priority=90, links_to=["alpha"])
    )
    # the target, and one attempt for the link
    assert await stages.turns(20) == 2


async def test_an_unchanged_build_does_not_count_as_a_written_link(begin: Begin) -> None:
    alpha, beta = Destination("alpha"), Destination("beta", priority=90, links_to=["alpha"])
    stages = await without_its_link(begin, alpha, beta)
    await stages.deliver(2, "a")
    await stages.turns(10, apart_seconds=5)
    assert [context.links for context in beta.written] == [{}, {"alpha": alpha.address()}]


async def test_a_link_leaves_open_what_became_of_another_build(begin: Begin) -> None:
    alpha, beta = Destination("alpha"), Destination("beta", priority=90, links_to=["alpha"])
    stages = await without_its_link(begin, alpha, beta)
    beta.error = BROKEN
    await stages.turns(2)
    beta.error = LOST
    await stages.deliver(2, "b", destinations=["beta"])
    await stages.turn()
    beta.error = None
    await stages.turns(10, apart_seconds=SETTLE_SECONDS)
    states = stages.column("SELECT state FROM steps WHERE destination = 'beta' ORDER BY purpose = 'link'")
    assert states == ["uncertain", "done"]
    assert stages.column("SELECT unresolved_at FROM copies WHERE destination = 'beta'") != [None]


# --- lanes -------------------------------------------------------------------------------------------------------


async def test_the_longest_wait_of_a_batch_counts(begin: Begin) -> None:
    waits = [Transient("busy", retry_after=seconds) for seconds in (100.0, 1.0)]
    stages = begin(AskableDestination("alpha", *waits))
    await stages.deliver(1, session="one")
    await stages.deliver(2, session="two")
    assert await stages.turn() == 2
    (not_before,) = stages.column("SELECT not_before FROM lanes")
    assert datetime.fromisoformat(not_before) == stages.clock.now + timedelta(seconds=100)


async def test_a_pause_is_not_lost_to_a_wait_of_the_same_batch(begin: Begin) -> None:
    stages = begin(AskableDestination("alpha", Misconfigured("the token ran out"), Transient("busy", retry_after=0)))
    await stages.deliver(1, session="one")
    await stages.deliver(2, session="two")
    assert await stages.turn() == 2
    assert stages.column("SELECT state FROM lanes") == ["paused"]


class Hanging(Destination):
    """Hangs in its thread with the session of that name until it is released; asks for less with ``refused``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.released = threading.Event()

    def export(self, context: ExportContext) -> ExportResult:  # type: ignore[override]  # a plain function may be one
        """Block the thread, or answer."""
        if context.session_identifier == "refused":
            raise Transient("busy", retry_after=0)
        if context.session_identifier == "hangs":
            self.released.wait(30)
        return self.result(context)


async def test_a_thread_that_hangs_leaves_a_lowered_limit_its_slot(begin: Begin) -> None:
    alpha = Hanging("alpha")
    stages = begin(alpha, concurrency=8, timeout_seconds=0.3)
    lane = stages.engine.lanes["alpha"]
    try:
        for number, session in enumerate(["refused", "hangs"]):
            await stages.deliver(number, session=session)
            await stages.turn()
        assert (lane.limit.limit, len(lane.caller.hung)) == (1, 1)
        await stages.deliver(2, session="new")
        await stages.turn()
        assert stages.column("SELECT state FROM steps WHERE session = 'new'") == ["done"]
    finally:
        alpha.released.set()


async def test_a_clock_set_back_does_not_keep_a_paced_lane_waiting(begin: Begin) -> None:
    stages = begin(AskableDestination("alpha"), min_interval_seconds=1.0)
    await stages.deliver(1, session="one")
    await stages.turn()
    stages.advance(-365 * DAY_SECONDS)
    await stages.deliver(2, session="two")
    assert await stages.turns(2, apart_seconds=60) == 1


async def test_a_clock_set_back_does_not_keep_an_open_lane_from_its_probe(begin: Begin) -> None:
    stages = begin(AskableDestination("alpha"))
    far = stages.clock.now + timedelta(days=365)
    async with stages.database.write() as connection:
        opened = LaneChange("alpha", LaneState.OPEN, "it was away", None, far)
        await lanes.change(connection, [opened], far, is_sqlite=True)
    await stages.deliver(1)
    assert await stages.turns(2, apart_seconds=60) == 1
    assert stages.column("SELECT state FROM lanes") == ["active"]


async def test_a_probe_is_repeated_when_the_destination_says(begin: Begin) -> None:
    alpha = AskableDestination("alpha")
    alpha.error = AWAY
    stages = begin(alpha, concurrency=12)
    for number in range(2 * FAILURES_IN_A_ROW):
        await stages.deliver(number, session=f"session-{number}")
    await stages.turns(4)
    assert stages.column("SELECT state FROM lanes") == ["open"]
    alpha.error = Transient("busy", retry_after=1)
    # the first comes after 5 s, each of the others a second after the one before
    assert await stages.turns(60, apart_seconds=1) > 50
    assert stages.column("SELECT state FROM lanes") == ["open"]


class Paced(Destination):
    """Waits for its turn while the store has lost the table of the lanes."""

    paces_requests = True
    stages: Stages

    async def export(self, context: ExportContext) -> ExportResult:
        """Ask for a turn, then write."""
        self.stages.file.execute("ALTER TABLE lanes RENAME TO lost")
        try:
            await request_turn.get()()
        finally:
            self.stages.file.execute("ALTER TABLE lost RENAME TO lanes")
        return await super().export(context)


async def test_a_request_without_its_turn_has_not_left(begin: Begin) -> None:
    alpha = Paced("alpha")
    alpha.stages = stages = begin(alpha, min_interval_seconds=0.01)
    await stages.deliver(1)
    await stages.turn()
    assert stages.column("SELECT state || ' ' || error_code FROM steps") == ["due busy"]
    assert alpha.calls == []


# --- whose turn it is --------------------------------------------------------------------------------------------


async def test_what_is_given_up_was_not_claimed_meanwhile(begin: Begin) -> None:
    stages = begin(AskableDestination("alpha", Transient("busy", retry_after=MAX_WAIT_SECONDS + 30)))
    await stages.deliver(1)
    await stages.turn()
    stages.advance(MAX_WAIT_SECONDS + 30)
    async with stages.database.read() as connection:
        late = await recovery.waited_too_long(connection, stages.clock.now - timedelta(seconds=MAX_WAIT_SECONDS))
    assert len(late) == 1
    assert await stages.attempt() == 1
    async with stages.database.write() as connection:
        await recovery.give_up(connection, late)
    await stages.write()
    assert stages.column("SELECT state FROM steps") == ["done"]
    assert stages.column("SELECT record_id FROM copies") == ["one"]


async def test_what_may_not_start_does_not_stand_in_the_way(begin: Begin) -> None:
    """Of a record for the first that takes it, one destination waits until the other's outcome is known."""
    alpha, beta = AskableDestination("alpha"), AskableDestination("beta", priority=90)
    alpha.error, beta.error = BROKEN, LOST
    stages = begin(alpha, beta, concurrency=1)
    await stages.deliver(1, session="one", strategy="first_success")
    await stages.turns(40, apart_seconds=10)
    assert stages.column("SELECT state FROM steps ORDER BY destination") == ["due", "unsettled"]
    stages.advance(3600)
    alpha.error = None
    await stages.deliver(2, session="two", destinations=["alpha"])
    await stages.turns(2)
    assert stages.column("SELECT state FROM steps WHERE session = 'two'") == ["done"]


async def test_copies_of_a_destination_that_is_gone_keep_no_other_from_its_last_look_up(begin: Begin) -> None:
    alpha, gone = AskableDestination("alpha"), AskableDestination("gone")
    both = begin(alpha, gone, concurrency=64)
    for number in range(BATCH):
        await both.deliver(number, session=f"session-{number}", destinations=["gone"])
    await both.deliver(BATCH, destinations=["alpha"])
    await both.turns(4)
    for name, moment in (("gone", both.clock.now - timedelta(days=1)), ("alpha", both.clock.now)):
        values = moment.isoformat(timespec="microseconds"), name
        both.file.execute("UPDATE copies SET recheck_at = ? WHERE destination = ?", values)
    assert both.column("SELECT count(*) FROM copies WHERE recheck_at IS NOT NULL") == [BATCH + 1]
    alpha.answer = Present("one", None, ())
    await begin(alpha).pipeline.rechecks.run_once()
    assert both.column("SELECT recheck_at FROM copies WHERE destination = 'alpha'") == [None]


class Overtaken(AskableDestination):
    """Learns during its last look-up that a newer attempt has begun."""

    stages: Stages

    async def verify(self, context: ExportContext) -> Answer:
        """Try to remember something."""
        self.stages.file.execute("UPDATE copies SET fence = fence + 1")
        await context.remember(seen=True)
        return Present(context.session_identifier, None, ())


async def test_a_last_look_up_that_is_overtaken_ends_only_itself(begin: Begin) -> None:
    alpha = Overtaken("alpha")
    alpha.stages = stages = begin(alpha)
    await stages.deliver(1)
    await stages.turn()
    stages.file.execute("UPDATE copies SET recheck_at = ?", [stages.clock.now.isoformat(timespec="microseconds")])
    assert await stages.pipeline.rechecks.run_once() == 1
    assert stages.column("SELECT recheck_at FROM copies") != [None]


# --- what is written ---------------------------------------------------------------------------------------------


class LongDigest(Destination):
    """Names what it stores by a digest that the store's column is too short for."""

    def result(self, context: ExportContext) -> ExportResult:
        """Add the digest."""
        return replace(super().result(context), stored_sha256=LONG_DIGEST)


async def test_a_long_digest_is_stored_as_its_own_digest(begin: Begin) -> None:
    stages = begin(LongDigest("alpha"))
    await stages.deliver(1)
    await stages.turn()
    assert stages.column("SELECT stored_sha256 FROM copies") == [sha256(LONG_DIGEST.encode())]


class Spoiling(Destination):
    """Spoils the row that the result is written to."""

    stages: Stages

    async def export(self, context: ExportContext) -> ExportResult:
        """Write nonsense into the store."""
        self.stages.file.execute("UPDATE jobs SET state = 'nonsense'")
        return await super().export(context)


async def test_an_engine_ends_with_its_writer(begin: Begin) -> None:
    alpha = Spoiling("alpha")
    alpha.stages = stages = begin(alpha)
    await stages.deliver(1)
    running = asyncio.create_task(stages.engine.run())
    ended, _ = await asyncio.wait({running}, timeout=10)
    running.cancel()
    with pytest.raises(ValueError, match="nonsense"):
        await running
    assert ended
