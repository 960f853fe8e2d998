"""What the stateful test has found, one step at a time, by its virtual clock."""

import json
from datetime import timedelta

import pytest

from tests.integration.harness import built, inline, sha256
from tests.integration.virtual import (
    HEALTHY_EXPORT,
    HEALTHY_LOOK_UP,
    MAX_WAIT_SECONDS,
    SETTLE_SECONDS,
    START,
    Reply,
    World,
)


def event(number: int, text: str, destination: str = "alpha", *, minute: int | None = None) -> bytes:
    """Write a build of session one for one destination."""
    time = (START - timedelta(days=1) + timedelta(minutes=number if minute is None else minute)).isoformat()
    record = inline("a.xml", f"<{text}/>".encode())
    found = built("one", record, event_id=f"event-{number}", time=time, destinations=[destination])
    return json.dumps(found).encode()


def go(world: World, ending: Reply = HEALTHY_EXPORT, answer: Reply = HEALTHY_LOOK_UP) -> None:
    """Take a turn of every stage; servers answer at once."""
    world.tick()
    world.keep()
    world.turn()
    for remote, request in world.open_requests():
        world.answer(remote, request, answer if request.looks_up else ending)


def contents(world: World, name: str = "alpha") -> list[str]:
    """Return the content of each copy."""
    digests = {sha256(f"<{text}/>".encode()): text for text in "abc"}
    return [digests[copy.content] for copy in world.remotes[name].copies]


@pytest.mark.parametrize("name", ["alpha", "gamma"])
def test_a_newer_build_after_an_uncertain_one_makes_no_second_copy(world: World, name: str) -> None:
    world.deliver(event(1, "a", name))
    go(world, Reply("unknown", effect=0.0))
    for _ in range(14):  # past the end of every wait, and nobody can be asked
        world.advance(MAX_WAIT_SECONDS / 12)
        go(world, answer=Reply("unsure"))
    assert [row["state"] for row in world.rows("SELECT state FROM steps")] == ["uncertain"]
    world.deliver(event(2, "b", name))
    go(world)
    go(world)
    assert len(contents(world, name)) == 1


def test_a_look_up_counts_from_when_it_was_asked(world: World) -> None:
    """Asked before H has passed and answered after it, "absent" does not say that H has passed without a commit."""
    world.deliver(event(1, "a"))
    go(world, Reply("unknown", effect=0.9))
    asked_from = START + timedelta(seconds=0.6 * SETTLE_SECONDS)
    while not world.open_requests() or world.clock.now < asked_from:
        for remote, request in world.open_requests():
            world.answer(remote, request, Reply("unsure"))
        world.advance(1)
        world.turn()
    settled_at = START + timedelta(seconds=SETTLE_SECONDS + 1)
    world.advance((settled_at - world.clock.now).total_seconds())
    ((remote, request),) = world.open_requests()
    world.answer(remote, request, Reply("early"))
    go(world)
    go(world)
    assert contents(world) == ["a"]


def test_an_update_that_is_committed_late_does_not_bring_old_content_back(world: World) -> None:
    world.deliver(event(1, "a"))
    go(world)
    world.deliver(event(2, "b"))
    go(world, Reply("unknown", effect=0.9))
    world.deliver(event(3, "c"))
    for seconds in (5, 5, 5, SETTLE_SECONDS, 5, 5):
        world.advance(seconds)
        go(world)
    assert [row["state"] for row in world.rows("SELECT state FROM jobs")].count("open") == 0
    assert contents(world) == ["c"]


def test_a_replay_of_an_older_build_overwrites_nothing(world: World) -> None:
    world.deliver(event(1, "a"))
    go(world, Reply("permanent"))
    world.deliver(event(2, "b"))
    go(world)
    (letter,) = world.rows("SELECT body, headers FROM outbox WHERE kind = 'failed'")
    world.deliver(bytes(letter["body"]), headers=json.loads(letter["headers"]))
    go(world)
    go(world)
    assert contents(world) == ["b"]


def test_a_last_look_up_ends(world: World) -> None:
    """Of two builds of one time the one that came later was written; the other's content is not looked for."""
    world.deliver(event(1, "a"))
    go(world)
    world.deliver(event(2, "b", minute=1))
    go(world, Reply("unknown", effect=0.0))
    for _ in range(40):
        world.advance(SETTLE_SECONDS)
        go(world)
        world.recheck()
    assert world.rows("SELECT recheck_at FROM copies WHERE recheck_at IS NOT NULL") == []


def test_what_was_given_up_stays_so(world: World) -> None:
    """A look-up under way when the longest wait ends may not end the step a second time."""
    world.deliver(event(1, "a"))
    go(world, Reply("unknown", effect=0.0))
    world.advance(MAX_WAIT_SECONDS - 30)
    world.turn()
    ((remote, request),) = world.open_requests()
    world.advance(31)
    world.tick()
    world.answer(remote, request, HEALTHY_LOOK_UP)
    ((job, step),) = world.rows("SELECT j.state, s.state FROM jobs j JOIN steps s ON s.job_id = j.id")
    assert (job, step) == ("failed", "uncertain")
