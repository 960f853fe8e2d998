"""``republish``: outcomes go out once more, byte for byte, for listeners that missed them."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from consumer.commands import console
from consumer.events import read_moment
from consumer.store import consumers, outbox, schema
from consumer.store.connection import Database
from consumer.store.outbox import Chosen
from consumer.store.status import ALIVE_SECONDS

_AGE = re.compile(r"([0-9]{1,6})([smhdw])")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def choose(since: str | None, until: str | None, sessions: Sequence[str], *, unrouted: bool) -> Chosen:
    """Read the options. Raises ``ValueError`` with a sentence for the person who typed them."""
    if since is None and not sessions and not unrouted:
        raise ValueError("say which outcomes: --since, --session or --unrouted")
    if broken := [name for name in sessions if name.encode(errors="replace").decode() != name]:
        raise ValueError(f"--session {broken[0]!r} is no UTF-8 text")
    now = datetime.now(UTC)
    begin = None if since is None else _moment("--since", since, now)
    end = None if until is None else _moment("--until", until, now, whole_day=True)
    if begin is not None and end is not None and begin >= end:
        raise ValueError(f"--since {since} is not before --until {until}")
    return Chosen(begin, end, tuple(sessions), unrouted)


def _moment(option: str, text: str, now: datetime, *, whole_day: bool = False) -> datetime:
    """Read a time with a zone, a date in UTC (``whole_day``: its end), or how long ago."""
    try:
        if age := _AGE.fullmatch(text):
            return now - timedelta(**{_UNITS[age[2]]: int(age[1])})
        if _DATE.fullmatch(text):
            return read_moment(f"{text}T00:00:00Z") + timedelta(days=1 if whole_day else 0)
        return read_moment(text)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{option} {text!r} is no time: give one with its zone (2026-01-31T12:00:00Z), a date in UTC "
            "(2026-01-31), or an age (30m, 2h, 3d, 1w)"
        ) from None


async def republish(database: Database, chosen: Chosen, *, dry_run: bool, as_json: bool) -> int:
    """Mark the chosen outcomes as unsent, so that the consumer sends them; returns 1 when there is no database."""
    if await schema.current(database) is None:
        console.complain("the database is empty; start the service: nexus-export run")
        return 1
    async with database.read() as connection:  # finding them may take a while, and holds up nobody
        found = await outbox.sent_outcomes(connection, chosen)
        since = await database.now(connection) - timedelta(seconds=ALIVE_SECONDS)
        running = bool(await consumers.alive(connection, since))
    if found and not dry_run:
        async with database.write() as connection:
            await outbox.send_again(connection, found)
    if as_json:
        console.print_json({"outcomes": len(found), "dry_run": dry_run, "consumer_running": running})
    else:
        _tell(len(found), dry_run=dry_run, running=running)
    return 0


def _tell(count: int, *, dry_run: bool, running: bool) -> None:
    outcomes = "1 outcome" if count == 1 else f"{count} outcomes"
    if not count:
        console.say("no outcome matches, so nothing goes out")
    elif dry_run:
        console.say(f"{outcomes} would go out again; nothing was changed")
    elif running:
        console.say(f"{outcomes} on the way again; see whether a queue takes them: nexus-export status")
    else:
        console.say(f"{outcomes} will go out when a consumer starts; none is running. Start one: nexus-export run")
