"""What late links need: which copies there are, and the finished steps that are to add a link."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic_core import to_json
from sqlalchemy import bindparam, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from consumer.store.jobs import step_row
from consumer.store.rows import LINK, StepRow, StepState, text_of
from consumer.store.tables import copies, jobs, steps

_CHUNK = 200


@dataclass(frozen=True, slots=True)
class LinkedCopy:
    """A copy that is there: its address, and the digest of the links that were last written into it."""

    record_url: str | None
    links_sha256: str | None


async def load_copies(
    connection: AsyncConnection, sessions: Iterable[str], destinations: Sequence[str]
) -> Mapping[str, Mapping[str, LinkedCopy]]:
    """Return the copies that are there, by session and destination."""
    found: dict[str, dict[str, LinkedCopy]] = {}
    for part in _chunks(sessions):
        query = select(copies).where(
            copies.c.session.in_(part), copies.c.destination.in_(destinations), copies.c.record_id.is_not(None)
        )
        for row in await connection.execute(query):
            found.setdefault(row.session, {})[row.destination] = LinkedCopy(row.record_url, row.links_sha256)
    return found


async def finished_steps(
    connection: AsyncConnection, sessions: Iterable[str], destinations: Sequence[str]
) -> list[StepRow]:
    """Return for each session and destination the finished step of the newest build.

    None where a step is still to run: it writes the links itself.
    """
    latest: dict[tuple[str, str], StepRow] = {}
    waiting: set[tuple[str, str]] = set()
    for part in _chunks(sessions):
        query = (
            select(steps)
            .join(jobs, jobs.c.id == steps.c.job_id)
            .where(jobs.c.session.in_(part), steps.c.destination.in_(destinations))
            .order_by(jobs.c.build_time, jobs.c.received_at)
        )
        for row in await connection.execute(query):
            key, step = (row.session, row.destination), step_row(row)
            if not step.state.terminal:
                waiting.add(key)
            elif step.state is StepState.DONE:
                latest[key] = step
            elif step.state is StepState.UNCERTAIN:  # nobody knows which build is there
                latest.pop(key, None)
    return [step for key, step in latest.items() if key not in waiting]


_make_due = (
    update(steps)
    .where(steps.c.job_id == bindparam("job"), steps.c.destination == bindparam("name"))
    .values(
        state=StepState.DUE, purpose=LINK, next_attempt_at=bindparam("at"), due_since=bindparam("at"), attempts=0,
        lookups=0, error_code=None, reason=None, result=bindparam("outcome"),
    )
)  # fmt: skip


async def make_due(connection: AsyncConnection, finished: Sequence[StepRow], now: datetime) -> None:
    """Let finished steps add their links; what the outcome says of them stays, its attempts too."""
    if finished:
        values = [
            {
                "job": text_of(step.job_id),
                "name": step.destination,
                "at": now,
                "outcome": to_json({"attempts": step.attempts, **(step.result or {})}).decode(),
            }
            for step in finished
        ]
        await connection.execute(_make_due, values)


def _chunks(values: Iterable[str]) -> Iterable[list[str]]:
    ordered = sorted(set(values))
    return (ordered[start : start + _CHUNK] for start in range(0, len(ordered), _CHUNK))
