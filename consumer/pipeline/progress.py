"""Moves jobs on inside a transaction: asks ``decide``, writes what it says, and ends what is over."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from consumer.pipeline.decide import Place, StepView, decide
from consumer.pipeline.outcome import Names, messages_of
from consumer.pipeline.signals import Handoff
from consumer.store import jobs, lanes, outbox, steps
from consumer.store.connection import Connection
from consumer.store.rows import JobRow, JobState, Message, StepChange, StepRow, StepState
from consumer.telemetry import get_logger

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that just ended, for the log."""

    job: JobRow
    steps: tuple[StepRow, ...]


@dataclass(frozen=True, slots=True)
class Advanced:
    """What moved in a transaction, to be announced after its commit."""

    ended: tuple[Ended, ...] = ()
    messages: tuple[Message, ...] = ()
    begun: bool = False


class Progress:
    """Knows the order of destinations and where outcomes go."""

    def __init__(
        self, links: Mapping[str, Place], names: Names, outcomes: Handoff[Message], *, is_sqlite: bool
    ) -> None:
        self._outcomes = outcomes
        self._links = links
        self._names = names
        self._is_sqlite = is_sqlite

    @property
    def names(self) -> Names:
        """Return where messages go."""
        return self._names

    def announce(self, *advanced: Advanced) -> None:
        """After the commit: log what ended, and hand its messages to the relay."""
        for item in advanced:
            log_ended(item.ended)
            if item.messages:
                self._outcomes.give(item.messages)

    async def advance(self, connection: Connection, ids: Iterable[UUID], now: datetime) -> Advanced:
        """Decide about open jobs, write the moves, and put the outcome of ended ones into the outbox."""
        wanted = set(ids)
        if not wanted:
            return Advanced()
        found = await jobs.load_jobs(connection, wanted, lock=not self._is_sqlite)
        return await self.advance_loaded(connection, found.values(), now)

    async def advance_loaded(self, connection: Connection, loaded: Iterable[JobRow], now: datetime) -> Advanced:
        """Do the same for jobs that this transaction has loaded (and locked) already."""
        opened = [job for job in loaded if job.state is JobState.OPEN]
        if not opened:
            return Advanced()
        all_steps = await jobs.load_steps(connection, [job.id for job in opened if not job.new_steps])
        all_steps |= {job.id: jobs.new_step_rows(job) for job in opened if job.new_steps}
        states = {name: lane.state for name, lane in (await lanes.load(connection)).items()}
        changes: list[StepChange] = []
        again: list[tuple[UUID, datetime | None]] = []
        ended: list[Ended] = []
        for job in opened:
            before = all_steps.get(job.id, [])
            if job.record_sha256 is None and not all(step.state.terminal for step in before):
                continue  # nothing begins before the record is kept
            decision = decide(job.strategy, [self.view(step) for step in before], states, now)
            moved = {move.destination: move for move in decision.moves}
            changes += [
                StepChange(job.id, move.destination, move.state, move.error_code, move.reason,
                           now if move.state is StepState.DUE else None)
                for move in decision.moves
            ]  # fmt: skip
            if decision.job is not None:
                after = tuple(
                    replace(step, state=moved[step.destination].state, error_code=moved[step.destination].error_code,
                            reason=moved[step.destination].reason) if step.destination in moved else step
                    for step in before
                )  # fmt: skip
                ended.append(Ended(replace(job, state=decision.job), after))
            elif decision.again_at is not None:
                again.append((job.id, decision.again_at))
        await steps.move_steps(connection, changes)
        await jobs.decide_later(connection, again)
        begun = any(change.state is StepState.DUE for change in changes)
        return Advanced(tuple(ended), await self._end(connection, ended, now), begun)

    async def _end(self, connection: Connection, ended: list[Ended], now: datetime) -> tuple[Message, ...]:
        if not ended:
            return ()
        messages: list[Message] = []
        over = [(item.job.id, item.job.state) for item in ended]
        for item in ended:
            messages += messages_of(item.job, item.steps, now, self._names)
        repeated = await jobs.superseded_jobs(connection, [item.job.id for item in ended])
        by_id = {item.job.id: item for item in ended}
        for job in repeated:
            answer = by_id[job.superseded_by] if job.superseded_by else None
            if answer:
                messages += messages_of(job, answer.steps, now, self._names, answer=answer.job)
                over.append((job.id, JobState.SUPERSEDED))
        await jobs.finish_jobs(connection, over, now)
        await outbox.add(connection, messages, now, is_sqlite=self._is_sqlite)
        return tuple(messages)

    async def repeat_outcome(self, connection: Connection, successor: JobRow, now: datetime) -> Advanced:
        """Answer events that were superseded by a job which has ended already."""
        answers = await jobs.load_steps(connection, [successor.id])
        messages: list[Message] = []
        waiting = await jobs.superseded_jobs(connection, [successor.id])
        for job in waiting:
            messages += messages_of(job, answers.get(successor.id, []), now, self._names, answer=successor)
        await jobs.finish_jobs(connection, [(job.id, JobState.SUPERSEDED) for job in waiting], now)
        await outbox.add(connection, messages, now, is_sqlite=self._is_sqlite)
        return Advanced((), tuple(messages))

    def view(self, step: StepRow) -> StepView:
        """Return what the rules need to know of a step."""
        declared = self._links.get(step.destination)
        place = Place(
            step.destination,
            step.priority,
            declared.links_to if declared else (),
            declared.depends_on if declared else (),
        )
        return StepView(place, step.outcome_state, step.attempts, step.due_since)


def log_ended(ended: Iterable[Ended]) -> None:
    """Log each ended job once, after the commit that ended it."""
    for item in ended:
        done = sum(step.outcome_state is StepState.DONE for step in item.steps)
        event = "job_exported" if item.job.state is JobState.EXPORTED else "job_failed"
        write = _log.info if item.job.state is JobState.EXPORTED else _log.error
        write(
            event,
            session=item.job.session,
            event_id=item.job.event_id,
            destinations=f"{done}/{len(item.steps)}",
            failed={s.destination: s.error_code for s in item.steps if s.state is StepState.FAILED} or None,
        )
