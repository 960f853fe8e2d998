"""``publish``: send ``record.built`` for record files, and watch what becomes of them."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from consumer.broker import Client
from consumer.clients.publish import Built, PublishOptions, UnusableFileError, build_event
from consumer.commands import console
from consumer.config import Settings


async def publish(
    settings: Settings, files: Sequence[Path], options: PublishOptions, *, wait_seconds: float | None, as_json: bool
) -> int:
    """Publish files; returns the exit code: 1 when a file could not be sent or a record did not arrive."""
    built, unusable = _build(files, options)
    outcomes: list[dict[str, Any]] = []
    async with Client(settings.amqp_url.get_secret_value(), settings.amqp_exchange) as client:
        if wait_seconds is not None:
            await client.listen()
        with _bar(as_json) as bar:
            task = bar.add_task("published", total=len(built))
            for event in built:
                await client.publish(event.body, event.event_id)
                bar.advance(task)
        if wait_seconds is not None and not as_json:
            console.say(f"{len(built)} published, waiting for their outcomes")
        if wait_seconds is not None:
            outcomes = await _outcomes(client, built, wait_seconds, as_json=as_json)
    missing = len(built) - len(outcomes) if wait_seconds is not None else 0
    if as_json:
        console.print_json(
            {"published": [_row(event) for event in built], "unusable": unusable, "outcomes": outcomes}
        )
    else:
        _summary(built, outcomes, missing, wait_seconds)
    failed = any(outcome["data"]["status"] != "COMPLETED" for outcome in outcomes)
    return 1 if unusable or missing or failed else 0


def _build(files: Sequence[Path], options: PublishOptions) -> tuple[list[Built], list[str]]:
    built, unusable = [], []
    for path in files:
        try:
            built.append(build_event(path, options))
        except UnusableFileError as error:
            unusable.append(str(error))
            console.complain(f"not published: {error}")
    return built, unusable


def _bar(as_json: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console.err, disable=as_json or not console.err.is_terminal)


async def _outcomes(client: Client, built: Sequence[Built], seconds: float, *, as_json: bool) -> list[dict[str, Any]]:
    """Collect the outcome of each event, showing each as it comes."""
    waiting = {event.event_id for event in built}
    found: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(seconds):
            while waiting:
                outcome = from_json(await client.heard.get())
                cause = outcome["data"]["cause"]["id"]
                if cause in waiting:
                    waiting.discard(cause)
                    found.append(outcome)
                    if not as_json:
                        show_outcome(outcome["data"])
    except TimeoutError:
        pass
    return found


def show_outcome(data: dict[str, Any]) -> None:
    """Print one outcome: a line for the record, a line for each destination."""
    good = data["status"] == "COMPLETED"
    console.say(f"{'exported' if good else 'NOT EXPORTED'}  {data['session_identifier']}", "green" if good else "red")
    if data.get("error_code"):
        console.say(f"    {data['error_code']}: {data['error_message']}")
    for result in data["results"]:
        if result["success"]:
            text = f"{result['action']}  {result['record_url'] or result['record_id'] or ''}"
        elif result["skipped"]:
            text = f"skipped  {result['error_message'] or ''}"
        else:
            text = f"FAILED  {result['error_code']}: {result['error_message']}"
        console.say(f"    {result['destination']:<15} {text}")


def _summary(built: Sequence[Built], outcomes: Sequence[Any], missing: int, waited: float | None) -> None:
    if waited is None:
        console.say(f"{len(built)} published; see what became of them: nexus-export status")
        return
    if missing:
        console.complain(
            f"{missing} of {len(built)} have no outcome within {waited:g} s; they go on by themselves. "
            "See where they are: nexus-export status"
        )
    console.say(f"{len(outcomes)} of {len(built)} have their outcome")


def _row(event: Built) -> dict[str, str]:
    return {"file": str(event.path), "session": event.session, "id": event.event_id}
