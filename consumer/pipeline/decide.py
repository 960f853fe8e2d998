"""The one pure rule of what happens next to the steps of a job, and when the job is over.

Words: a step's *turn is over* when it is terminal, its lane is paused or open, or its first attempt has ended.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache

from consumer.store.rows import JobState, LaneState, StepState

#: First success: how long a step that only waits for its retry may hold back the next destination.
PATIENCE_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Place:
    """Where a destination stands in the order.

    ``links_to`` (soft) and ``depends_on`` (hard) replace the waiting for higher priorities.
    """

    destination: str
    priority: int
    links_to: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepView:
    """What the rule needs to know of a step."""

    place: Place
    state: StepState
    attempts: int = 0
    due_since: datetime | None = None

    @property
    def name(self) -> str:
        """Return the destination's name."""
        return self.place.destination


@dataclass(frozen=True, slots=True)
class Move:
    """A step that changes its state by decision, not by an attempt."""

    destination: str
    state: StepState
    error_code: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Moves of steps, the job's state if it is over, and when to ask again if only time will tell."""

    moves: tuple[Move, ...]
    job: JobState | None
    again_at: datetime | None = None


def decide(strategy: str, steps: Sequence[StepView], lanes: Mapping[str, LaneState], now: datetime) -> Decision:
    """Move blocked steps on, skip what is not needed, and end the job when every step is terminal.

    A destination without an entry in ``lanes`` has an active lane.
    """
    current = {step.name: step for step in steps}
    moves: dict[str, Move] = {}
    again_at: datetime | None = None
    while True:
        if strategy == "first_success":
            found, again_at = _first_success_moves(tuple(current.values()), lanes, now)
        else:
            found = _side_by_side_moves(current, lanes)
        if not found:
            break
        for move in found:
            moves[move.destination] = move
            current[move.destination] = replace(
                current[move.destination],
                state=move.state,
                due_since=now if move.state is StepState.DUE else None,
            )
    job = _job_state(strategy, tuple(current.values()))
    return Decision(tuple(moves.values()), job, None if job else again_at)


def may_start(strategy: str, step: StepView, siblings: Iterable[StepView]) -> bool:
    """Tell whether a due step may be claimed beside its siblings: first success runs one at a time.

    One that was tried yields to one that became due after it, as its patience is over; else it would always be first.
    """
    return strategy != "first_success" or not any(
        other.state.in_flight or (other.state is StepState.DUE and step.attempts > 0 and other.attempts == 0)
        for other in siblings
        if other.name != step.name
    )


def in_order(steps: Iterable[StepView]) -> list[StepView]:
    """Sort by falling priority, equal ones by name."""
    return sorted(steps, key=lambda step: (-step.place.priority, step.name))


@lru_cache(maxsize=256)
def waits(places: frozenset[Place]) -> Mapping[str, frozenset[str]]:
    """Say for each destination whose turn it waits for.

    Declared ones replace the waiting for higher priorities. A higher priority that itself waits, through any
    chain, for this destination is not waited for: order yields to links, so nothing waits in a circle.
    """
    names = {place.destination for place in places}
    edges: dict[str, set[str]] = {
        place.destination: (set(place.links_to) | set(place.depends_on)) & names for place in places
    }
    ordered = sorted(places, key=lambda place: (-place.priority, place.destination))
    for place in ordered:
        if place.links_to or place.depends_on:
            continue
        for higher in ordered:
            if higher.priority > place.priority and not _reaches(edges, higher.destination, place.destination):
                edges[place.destination].add(higher.destination)
    return {name: frozenset(targets) for name, targets in edges.items()}


def _reaches(edges: Mapping[str, set[str]], start: str, goal: str) -> bool:
    seen: set[str] = set()
    stack = [start]
    while stack:
        name = stack.pop()
        if name == goal:
            return True
        if name not in seen:
            seen.add(name)
            stack.extend(edges.get(name, ()))
    return False


def _turn_is_over(step: StepView, lanes: Mapping[str, LaneState]) -> bool:
    if step.state.terminal or _held(step, lanes):
        return True
    return step.state is StepState.UNSETTLED or step.attempts > 0


def _held(step: StepView, lanes: Mapping[str, LaneState]) -> bool:
    return (
        step.state in {StepState.BLOCKED, StepState.DUE}
        and lanes.get(step.name, LaneState.ACTIVE) is not LaneState.ACTIVE
    )


def _side_by_side_moves(current: Mapping[str, StepView], lanes: Mapping[str, LaneState]) -> list[Move]:
    order = waits(frozenset(step.place for step in current.values()))
    found = []
    for step in current.values():
        if step.state is not StepState.BLOCKED:
            continue
        broken = _broken_dependency(step, current)
        if broken:
            found.append(Move(step.name, StepState.FAILED, "dependency_failed", broken))
        elif _dependencies_done(step, current) and all(
            _turn_is_over(current[name], lanes) for name in order[step.name] if name not in step.place.depends_on
        ):
            found.append(Move(step.name, StepState.DUE))
    return found


def _broken_dependency(step: StepView, current: Mapping[str, StepView]) -> str | None:
    for name in step.place.depends_on:
        if name not in current:
            return f"it depends on {name}, which this record is not exported to"
        state = current[name].state
        if state.terminal and state is not StepState.DONE:
            return f"it depends on {name}, which is {state}"
    return None


def _dependencies_done(step: StepView, current: Mapping[str, StepView]) -> bool:
    return all(current[name].state is StepState.DONE for name in step.place.depends_on)


def _first_success_moves(
    steps: Sequence[StepView], lanes: Mapping[str, LaneState], now: datetime
) -> tuple[list[Move], datetime | None]:
    if any(step.state is StepState.DONE for step in steps):
        waiting = [step for step in steps if step.state in {StepState.BLOCKED, StepState.DUE}]
        reason = "another destination succeeded"
        return [Move(step.name, StepState.SKIPPED, None, reason) for step in waiting], None
    if any(step.state.in_flight for step in steps):
        return [], None
    for step in in_order(steps):
        if step.state is StepState.BLOCKED:
            return [_first_success_start(step)], None
        if step.state is StepState.DUE and not _held(step, lanes):
            since = step.due_since or now
            ready_at = since + timedelta(seconds=PATIENCE_SECONDS)
            if now < ready_at:
                return [], ready_at
    return [], None


def _first_success_start(step: StepView) -> Move:
    # its turn comes only when nothing before it succeeded, so a dependency cannot be satisfied any more
    if step.place.depends_on:
        needed = ", ".join(step.place.depends_on)
        return Move(step.name, StepState.FAILED, "dependency_failed", f"it depends on {needed}")
    return Move(step.name, StepState.DUE)


def _job_state(strategy: str, steps: Sequence[StepView]) -> JobState | None:
    if not all(step.state.terminal for step in steps):
        return None
    done = sum(step.state is StepState.DONE for step in steps)
    missed = sum(step.state not in {StepState.DONE, StepState.SKIPPED} for step in steps)
    good = done > 0 and (missed == 0 or strategy != "all")
    return JobState.EXPORTED if good else JobState.FAILED
