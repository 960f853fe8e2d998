"""What happens in a run, by name. A crash may come anywhere in it, so a scenario only waits for what must come."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from tests.crash.world import World
from tests.integration.harness import DEAD_QUEUE, small
from tools.records import Record, make_record


def _other_build() -> Record:
    """Make another build of the first record's session."""
    return make_record(1, size=3_000)


def first_export(world: World) -> None:
    """Export one record to two destinations."""
    record = small(1)
    world.contents[record.session] = [record]
    world.publish(record)


def retry(world: World) -> None:
    """Try again: the server is busy twice."""
    record = small(1)
    world.contents[record.session] = [record]
    world.remote.fail(record.session, "busy", "busy:0.5")
    world.publish(record)


def unknown(world: World) -> None:
    """Lose a request, and then an answer."""
    record = small(1)
    world.contents[record.session] = [record]
    world.remote.fail(record.session, "drop", "cut")
    world.publish(record)


def newer_build(world: World) -> None:
    """Update the copies by a second build."""
    old, new = small(1), _other_build()
    world.contents[old.session] = [new, old]
    world.outcome(world.publish(old, hour=9, name="old"))
    world.publish(new, hour=10, name="new")


def older_late(world: World) -> None:
    """Let a build come after a newer one: it overwrites nothing."""
    old, new = small(1), _other_build()
    world.contents[old.session] = [new]
    world.outcome(world.publish(new, hour=10, name="new"))
    world.publish(old, hour=9, name="old", expect={"states": ("superseded",)})


def late_link(world: World) -> None:
    """Let the record that a copy links to come after that copy."""
    record = small(1)
    world.contents[record.session] = [record]
    world.remote.fail(record.session, "busy:1.5")
    world.publish(record)


def superseded(world: World) -> None:
    """Let a newer build take over while the older one waits for its retry."""
    old, new = small(1), _other_build()
    world.contents[old.session] = [new, old]
    world.remote.fail(old.session, "busy:1.2")
    world.publish(old, hour=9, name="old", expect={"states": ("superseded", "exported")})
    world.wait(world.remote.requests, "the first request")
    world.publish(new, hour=10, name="new")


def failed(world: World) -> None:
    """Let the server refuse the record for good."""
    record = small(1)
    world.contents[record.session] = [record]
    world.refused.add(record.session)
    world.letters = 1
    world.remote.fail(record.session, "forbid")
    world.publish(record, expect={"states": ("failed",), "status": "BUILT_NOT_EXPORTED"})


def replay(world: World) -> None:
    """Do the same, and move the dead letter back when the server is mended."""
    record = small(1)
    failed(world)
    letter = world.letter()
    world.outcome("event-one")
    world.refused.clear()
    world.remote.fail(record.session)
    world.replayed("event-one")
    world.bus.requeue(letter)


def poison(world: World) -> None:
    """Send two deliveries that are no events, and an event behind them."""
    world.letters = 2
    world.bus.publish(b"no event")
    invalid = (
        b'{"specversion": "1.0", "id": "poison", "source": "urn:example:builder", "type": "record.built",'
        b' "subject": "s", "data": {"session_identifier": "s"}}'
    )
    world.wait(lambda: world.bus.depth(DEAD_QUEUE), "the first dead letter")
    world.bus.publish(invalid)
    world.wait(lambda: world.bus.outcomes("poison"), "the outcome of the poison")
    first_export(world)


#: Scenarios with a second destination, which links to the first.
LINKED = frozenset({"late-link"})

SCENARIOS: Mapping[str, Callable[[World], None]] = MappingProxyType(
    {
        "first-export": first_export,
        "retry": retry,
        "unknown": unknown,
        "newer-build": newer_build,
        "older-late": older_late,
        "late-link": late_link,
        "superseded": superseded,
        "failed": failed,
        "replay": replay,
        "poison": poison,
    }
)
