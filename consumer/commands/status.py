"""``status``: is everything well, what waits, and why."""

from dataclasses import asdict
from typing import Any

from consumer.broker import BrokerAwayError, queue_depths
from consumer.commands import console
from consumer.config import Settings
from consumer.destinations.registry import Registry
from consumer.store import schema
from consumer.store import status as store_status
from consumer.store.connection import Database
from consumer.store.rows import LaneState
from consumer.store.status import Status


async def show_status(settings: Settings, database: Database, registry: Registry, *, as_json: bool) -> int:
    """Print the state of the service; returns 1 when something needs a person."""
    if await schema.current(database) is None:
        console.complain("the database is empty; start the service: nexus-export run")
        return 1
    async with database.read() as connection:
        status = await store_status.load(connection, await database.now(connection))
    problems = _problems(status, registry)
    depths: dict[str, int | None] = {}
    try:
        depths = await queue_depths(settings.amqp_url.get_secret_value())
    except BrokerAwayError as error:
        problems.append(f"{error}. Is RabbitMQ running?")
    if as_json:
        console.print_json({**asdict(status), "queues": depths, "problems": problems, "healthy": not problems})
    else:
        _print(status, registry, depths, problems)
    return 1 if problems else 0


def _problems(status: Status, registry: Registry) -> list[str]:
    found = []
    if not status.consumers:
        found.append("no consumer is running. Start one: nexus-export run")
    found += [
        f"consumer {owner} does not reach RabbitMQ. See: nexus-export doctor"
        for owner, _seen, connected in status.consumers
        if not connected
    ]
    if not registry.enabled:
        found.append("no destination is enabled. See: nexus-export destinations")
    for name, lane in status.lanes.items():
        if lane.state is not LaneState.ACTIVE:
            waiting = sum(status.steps.get(name, {}).get(state, 0) for state in ("due", "unsettled"))
            found.append(
                f"{name} is {lane.state} since {console.ago(lane.since)}: {lane.reason}. {waiting} records wait for "
                f"it. Mend that; it is asked again every minute. See: nexus-export destinations"
            )
    return found


def _print(status: Status, registry: Registry, depths: dict[str, int | None], problems: list[str]) -> None:
    counts = ", ".join(f"{count} {state}" for state, count in sorted(status.jobs.items())) or "none yet"
    console.say(f"records: {counts}; {status.waiting_records} wait to be read")
    names = list(registry.enabled) + [name for name in status.steps if name not in registry.enabled]
    rows: list[list[Any]] = []
    for name in names:
        steps = status.steps.get(name, {})
        lane = status.lanes.get(name)
        rows.append(
            [
                name,
                lane.state if lane else "active",
                steps.get("done", 0),
                steps.get("due", 0) + steps.get("blocked", 0),
                steps.get("running", 0),
                steps.get("unsettled", 0),
                steps.get("failed", 0) + steps.get("uncertain", 0),
                console.ago(status.oldest_due.get(name)),
            ]
        )
    console.table(("destination", "lane", "done", "wait", "run", "unsettled", "failed", "oldest wait"), rows)
    queues = ", ".join(f"{name} {'missing' if depth is None else depth}" for name, depth in depths.items())
    console.say(
        f"queues: {queues or 'not reached'}; outbox: {status.unsent} unsent, {status.unrouted} without a taker"
    )
    if status.failed:
        console.say("last failures:")
        console.table(
            ("session", "when", "destination", "error", "why"),
            [(f.session, console.ago(f.finished_at), f.destination, f.error_code, f.reason) for f in status.failed],
        )
    for problem in problems:
        console.say(f"! {problem}", "red")
    if not problems:
        console.say("healthy", "green")
