"""``destinations``: which ones there are, in which order, and why one is not used."""

import asyncio
import inspect
from typing import Any

from consumer.commands import console
from consumer.destinations.registry import Registered, Registry
from consumer.pipeline.attempt import Caller


async def check(registered: Registered) -> str | None:
    """Ask a destination whether it can work; returns what is wrong, or None."""
    caller = Caller(registered)
    try:
        return await caller.validate()
    finally:
        caller.close()
        close = getattr(registered.plugin, "aclose", None)
        if inspect.iscoroutinefunction(close):
            await close()


async def check_all(registry: Registry) -> dict[str, str | None]:
    """Check every enabled destination at once."""
    names = list(registry.enabled)
    answers = await asyncio.gather(*(check(registry.enabled[name]) for name in names))
    return dict(zip(names, answers, strict=True))


async def show_destinations(registry: Registry, *, as_json: bool) -> int:
    """Print every destination; returns 1 when one cannot work or something failed to load."""
    answers = await check_all(registry)
    rows: list[dict[str, Any]] = [_row(item, answers.get(item.name)) for item in registry.known.values()]
    problems = [{"origin": problem.origin, "message": problem.message} for problem in registry.problems]
    if as_json:
        console.print_json({"destinations": rows, "problems": problems})
    else:
        console.table(
            ("name", "priority", "enabled", "checked", "at once", "from", "why not"),
            [
                (
                    row["name"],
                    row["priority"],
                    "yes" if row["enabled"] else "no",
                    {True: "ok", False: "FAILED", None: "-"}[row["checked"]],
                    row["concurrency"],
                    row["origin"],
                    row["why_not"],
                )
                for row in rows
            ],
        )
        for problem in problems:
            console.say(f"! {problem['origin']}: {problem['message']}", "red")
        if not registry.enabled:
            console.say("! none is enabled; set NX_CDCS_URL and NX_CDCS_TOKEN, or NX_LOCAL_ARCHIVE_PATH", "red")
    broken = any(row["checked"] is False for row in rows)
    return 1 if broken or problems or not registry.enabled else 0


def _row(item: Registered, problem: str | None) -> dict[str, Any]:
    return {
        "name": item.name,
        "priority": item.priority,
        "enabled": item.enabled,
        "checked": (problem is None) if item.enabled else None,
        "concurrency": item.lane.concurrency,
        "min_interval_seconds": item.lane.min_interval_seconds,
        "timeout_seconds": item.lane.timeout_seconds,
        "settle_seconds": item.lane.settle_seconds,
        "max_attempts": item.lane.max_attempts,
        "links_to": list(item.links_to),
        "depends_on": list(item.depends_on),
        "can_verify": item.can_verify,
        "origin": item.origin,
        "why_not": item.disabled_because or problem or "",
    }
