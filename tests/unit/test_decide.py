"""Section 6 of the design, every sentence of it: which step begins when, and when a job is over.

Covered without sampling, for each strategy and each order below: up to three destinations in every combination of
the nine step states (a due and a running step also with an attempt behind it; for first success a due one also past
its patience) and the three lane states; four destinations in every combination of step states, with lanes active or
paused where a lane can matter, which is for a blocked and a due step. Each answer is held against the rules as a
reader of the design would check them by hand; none of them is taken from the code. Beyond that, whole lives of jobs
with random orders, destinations and lanes are played to their end.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumer.pipeline.decide import Decision, Move, Place, StepView, decide, in_order, may_start, waits
from consumer.store.rows import JobState, LaneState, StepState

S, L = StepState, LaneState
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
PATIENCE = timedelta(minutes=5)
OVER = {S.UNCERTAIN, S.DONE, S.FAILED, S.SKIPPED, S.SUPERSEDED}
IN_FLIGHT = {S.RUNNING, S.UNSETTLED}


@dataclass(frozen=True)
class Order:
    """Destinations, and whose turn each of them has to wait for by section 6, worked out by hand."""

    places: tuple[Place, ...]
    waits_for: Mapping[str, str]


ORDERS = {
    "one": Order((Place("a", 100),), {"a": ""}),
    "two, falling": Order((Place("a", 100), Place("b", 90)), {"a": "", "b": "a"}),
    "two, equal": Order((Place("a", 90), Place("b", 90)), {"a": "", "b": ""}),
    "two, b depends on a": Order((Place("a", 100), Place("b", 90, depends_on=("a",))), {"a": "", "b": "a"}),
    "two, a links to the lower b": Order((Place("a", 100, links_to=("b",)), Place("b", 90)), {"a": "b", "b": ""}),
    "two, b depends on one that is not wanted": Order(
        (Place("a", 100), Place("b", 90, depends_on=("gone",))), {"a": "", "b": ""}
    ),
    "three, falling": Order((Place("a", 100), Place("b", 90), Place("c", 85)), {"a": "", "b": "a", "c": "ab"}),
    "three, two equal": Order((Place("a", 100), Place("b", 90), Place("c", 90)), {"a": "", "b": "a", "c": "a"}),
    "three, a chain of dependencies": Order(
        (Place("a", 100), Place("b", 90, depends_on=("a",)), Place("c", 80, depends_on=("b",))),
        {"a": "", "b": "a", "c": "b"},
    ),
    "three, a links to the lowest": Order(
        # what the highest needs goes before it; c cannot wait for b, which waits for a, which waits for c
        (Place("a", 100, links_to=("c",)), Place("b", 90), Place("c", 80)),
        {"a": "c", "b": "a", "c": ""},
    ),
    "three, links and a dependency": Order(
        (Place("a", 100), Place("b", 90, links_to=("a",)), Place("c", 85, links_to=("b",), depends_on=("a",))),
        {"a": "", "b": "a", "c": "ab"},
    ),
    "four, falling": Order(
        (Place("a", 100), Place("b", 90), Place("c", 85), Place("d", 10)),
        {"a": "", "b": "a", "c": "ab", "d": "abc"},
    ),
    "four, as delivered": Order(
        # CDCS, then LabArchives and eLabFTW together, then the archive
        (Place("a", 100), Place("b", 90, links_to=("a",)), Place("c", 85, links_to=("a",)), Place("d", 10)),
        {"a": "", "b": "a", "c": "a", "d": "abc"},
    ),
    "four, two dependencies": Order(
        (Place("a", 50), Place("b", 50), Place("c", 90, depends_on=("a", "b")), Place("d", 70, links_to=("c",))),
        {"a": "", "b": "", "c": "ab", "d": "c"},
    ),
    "four, the first links to the last": Order(
        (Place("a", 100, links_to=("d",)), Place("b", 90), Place("c", 90), Place("d", 10)),
        {"a": "d", "b": "a", "c": "a", "d": ""},
    ),
}


def situations(place: Place, lanes: Sequence[LaneState], *, every_lane: bool, waiting: bool) -> Iterator[tuple]:  # type: ignore[type-arg]
    """Yield each state that a step can be in, with its lane; ``waiting``: with time instead of attempts."""
    views = [StepView(place, state, due_since=NOW if state is S.DUE else None) for state in S]
    if waiting:
        views.append(StepView(place, S.DUE, 1, NOW - PATIENCE))
        views.append(StepView(place, S.DUE, 0, NOW - PATIENCE + timedelta(seconds=1)))
    else:
        views.append(StepView(place, S.DUE, 1, NOW))
        views.append(StepView(place, S.RUNNING, 1))
    for view in views:
        matters = every_lane or view.state in {S.BLOCKED, S.DUE}
        for lane in lanes if matters else lanes[:1]:
            yield view, lane


def combinations(order: Order, *, waiting: bool) -> Iterator[tuple[list[StepView], dict[str, LaneState]]]:
    few = len(order.places) < 4
    lanes = (L.ACTIVE, L.PAUSED, L.OPEN) if few else (L.ACTIVE, L.PAUSED)
    each = [list(situations(place, lanes, every_lane=few, waiting=waiting)) for place in order.places]
    for combination in itertools.product(*each):
        yield [view for view, _ in combination], {view.name: lane for view, lane in combination}


def after(steps: Sequence[StepView], decision: Decision) -> list[StepView]:
    """Return the steps once the moves are made; one that becomes due now is due since now."""
    moves = {move.destination: move for move in decision.moves}
    assert len(moves) == len(decision.moves), "one move for a step"
    return [
        replace(step, state=moves[step.name].state, due_since=NOW if moves[step.name].state is S.DUE else None)
        if step.name in moves
        else step
        for step in steps
    ]


def turn_is_over(step: StepView, lane: LaneState) -> bool:
    """Say whether a step is terminal, its lane is paused or open, or its first attempt has ended."""
    return step.state in OVER or lane is not L.ACTIVE or step.attempts > 0 or step.state is S.UNSETTLED


def check_always(strategy: str, steps: list[StepView], lanes: dict[str, LaneState], decision: Decision) -> None:
    """Check what holds for every strategy."""
    before = {step.name: step for step in steps}
    result = after(steps, decision)
    for move in decision.moves:
        allowed = {S.BLOCKED, S.DUE} if move.state is S.SKIPPED else {S.BLOCKED}
        assert before[move.destination].state in allowed, "only a step that waits is moved"
        assert move.state in {S.DUE, S.SKIPPED, S.FAILED}
        assert (move.error_code == "dependency_failed") == (move.state is S.FAILED)
        assert (move.reason is None) == (move.state is S.DUE), "what does not run says why"
    if decision.moves:
        again = decide(strategy, result, lanes, NOW)
        assert again.moves == (), "asked again at once, it moves nothing more"
        assert (again.job, again.again_at) == (decision.job, decision.again_at)
    states = {step.state for step in result}
    assert (decision.job is not None) == (states <= OVER), "over if and only if every step is terminal"
    if decision.job is not None:
        missed = states - {S.DONE, S.SKIPPED}
        good = S.DONE in states and (strategy != "all" or not missed)
        assert decision.job is (JobState.EXPORTED if good else JobState.FAILED)
        assert decision.again_at is None
    elif not states & {S.DUE, *IN_FLIGHT}:
        pytest.fail("nothing is due or in flight, and the job is not over: it never would be")


def check_side_by_side(order: Order, steps: list[StepView], lanes: dict[str, LaneState], decision: Decision) -> None:
    """Check the order of ``all`` and ``best_effort``."""
    assert decision.again_at is None, "no time is waited for"
    before = {step.name: step for step in steps}
    result = {step.name: step for step in after(steps, decision)}
    for name, step in result.items():
        if before[name].state is not S.BLOCKED:
            assert step.state is before[name].state
            continue
        needed = [result[other].state if other in result else S.FAILED for other in step.place.depends_on]
        others = [other for other in order.waits_for[name] if other not in step.place.depends_on]
        if any(state in OVER and state is not S.DONE for state in needed):
            assert step.state is S.FAILED, "a dependency failed"
        elif step.state is S.DUE:
            assert all(state is S.DONE for state in needed), "began before its dependency was done"
            assert all(turn_is_over(result[other], lanes[other]) for other in others), "began before its turn"
        else:
            assert step.state is S.BLOCKED
            # an attempt that runs is waited for although its lane was paused meanwhile: it ends by its time limit
            held_up = [
                other
                for other in others
                if result[other].state is S.RUNNING or not turn_is_over(result[other], lanes[other])
            ]
            assert held_up or any(state is not S.DONE for state in needed), "waits for nobody"


def check_first_success(order: Order, steps: list[StepView], lanes: dict[str, LaneState], decision: Decision) -> None:
    """Check that destinations run strictly one after the other until one succeeds."""
    moves = {move.destination: move.state for move in decision.moves}
    waiting = {step.name for step in steps if step.state in {S.BLOCKED, S.DUE}}
    if any(step.state is S.DONE for step in steps):
        assert moves == dict.fromkeys(waiting, S.SKIPPED), "after a success the rest is skipped"
        return
    assert S.SKIPPED not in moves.values()
    if any(step.state in IN_FLIGHT for step in steps):
        assert not moves, "the next one starts only when nothing is running or unsettled"
        assert decision.again_at is None
        return
    result = {step.name: step for step in after(steps, decision)}
    earlier: list[StepView] = []
    ready: list[datetime] = []
    for place in sorted(order.places, key=lambda place: -place.priority):
        step = result[place.destination]
        if moves.get(step.name) is S.DUE:
            assert not ready, "an earlier one is neither failed, nor paused, nor over its patience"
        elif moves.get(step.name) is S.FAILED:
            assert place.depends_on
        if step.state is S.BLOCKED:
            assert ready, "nothing holds it up"
            assert decision.again_at == ready[0]
        if step.state is S.DUE and lanes[step.name] is L.ACTIVE and (step.due_since or NOW) + PATIENCE > NOW:
            ready.append((step.due_since or NOW) + PATIENCE)
        earlier.append(step)
    if decision.again_at is not None:
        assert decision.again_at in ready
        assert decision.again_at > NOW


@pytest.mark.parametrize("name", ORDERS)
def test_every_combination_side_by_side(name: str) -> None:
    for steps, lanes in combinations(ORDERS[name], waiting=False):
        decision = decide("all", steps, lanes, NOW)
        weaker = decide("best_effort", steps, lanes, NOW)
        try:
            check_always("all", steps, lanes, decision)
            check_side_by_side(ORDERS[name], steps, lanes, decision)
            assert weaker.moves == decision.moves, "the two differ in the verdict alone"
            assert (weaker.job is None) == (decision.job is None)
            if weaker.job is not None:
                done = any(step.state is S.DONE for step in steps)
                assert weaker.job is (JobState.EXPORTED if done else JobState.FAILED)
        except AssertionError as error:
            pytest.fail(f"{error}\n{steps}\n{lanes}\n{decision}")


@pytest.mark.parametrize("name", [name for name in ORDERS if "equal" not in name and "two dep" not in name])
def test_every_combination_of_first_success(name: str) -> None:
    for steps, lanes in combinations(ORDERS[name], waiting=True):
        decision = decide("first_success", steps, lanes, NOW)
        try:
            check_always("first_success", steps, lanes, decision)
            check_first_success(ORDERS[name], steps, lanes, decision)
        except AssertionError as error:
            pytest.fail(f"{error}\n{steps}\n{lanes}\n{decision}")


# --- the sentences one by one ------------------------------------------------------------------------------------

CDCS, LAB, ELAB, ARCHIVE = (
    Place("cdcs", 100),
    Place("labarchives", 90, links_to=("cdcs",)),
    Place("elabftw", 85, links_to=("cdcs",)),
    Place("local_archive", 10),
)
DELIVERED = (CDCS, LAB, ELAB, ARCHIVE)


def job(places: Sequence[Place], **known: StepState | StepView) -> list[StepView]:
    """Return the steps of a job, blocked where nothing else is said."""
    found = []
    for place in places:
        state = known.get(place.destination, S.BLOCKED)
        found.append(replace(state, place=place) if isinstance(state, StepView) else StepView(place, state))
    return found


def waited(seconds: float, attempts: int = 1) -> StepView:
    return StepView(CDCS, S.DUE, attempts, NOW - timedelta(seconds=seconds))


def moved(decision: Decision) -> dict[str, StepState]:
    return {move.destination: move.state for move in decision.moves}


def ask(strategy: str, steps: Sequence[StepView], **lanes: LaneState) -> Decision:
    return decide(strategy, steps, lanes, NOW)


def test_the_highest_priority_begins() -> None:
    assert moved(ask("all", job(DELIVERED))) == {"cdcs": S.DUE}


def test_after_cdcs_labarchives_and_elabftw_run_together() -> None:
    steps = job(DELIVERED, cdcs=S.DONE)
    assert moved(ask("all", steps)) == {"labarchives": S.DUE, "elabftw": S.DUE}


def test_the_archive_waits_for_all_of_higher_priority() -> None:
    steps = job(DELIVERED, cdcs=S.DONE, labarchives=S.DONE, elabftw=S.RUNNING)
    assert moved(ask("all", steps)) == {}
    steps = job(DELIVERED, cdcs=S.DONE, labarchives=S.DONE, elabftw=S.FAILED)
    assert moved(ask("all", steps)) == {"local_archive": S.DUE}


def test_equal_priorities_run_together() -> None:
    assert moved(ask("all", job((Place("a", 50), Place("b", 50))))) == {"a": S.DUE, "b": S.DUE}


@pytest.mark.parametrize("state", [S.DONE, S.FAILED, S.UNCERTAIN, S.SKIPPED, S.SUPERSEDED, S.UNSETTLED])
def test_a_turn_is_over_when_a_step_is_terminal_or_unsettled(state: StepState) -> None:
    assert moved(ask("all", job((CDCS, ARCHIVE), cdcs=state))) == {"local_archive": S.DUE}


@pytest.mark.parametrize("lane", [L.PAUSED, L.OPEN])
def test_a_turn_is_over_when_the_lane_is_paused_or_open(lane: LaneState) -> None:
    assert moved(ask("all", job((CDCS, ARCHIVE), cdcs=S.DUE), cdcs=lane)) == {"local_archive": S.DUE}
    both = ask("all", job((CDCS, ARCHIVE)), cdcs=lane)
    assert moved(both) == {"cdcs": S.DUE, "local_archive": S.DUE}


def test_a_turn_is_over_when_the_first_attempt_has_ended() -> None:
    assert moved(ask("all", job((CDCS, ARCHIVE), cdcs=waited(1, attempts=0)))) == {}
    assert moved(ask("all", job((CDCS, ARCHIVE), cdcs=waited(1, attempts=1)))) == {"local_archive": S.DUE}


def test_a_turn_stays_over_while_a_later_attempt_runs() -> None:
    """Two are waited for; the retry of the one runs while the other fails."""
    steps = job(DELIVERED, cdcs=StepView(CDCS, S.RUNNING, 3), labarchives=S.DONE, elabftw=S.FAILED)
    assert moved(ask("all", steps)) == {"local_archive": S.DUE}


def test_a_first_attempt_that_runs_is_waited_for() -> None:
    assert moved(ask("all", job((CDCS, ARCHIVE), cdcs=S.RUNNING))) == {}


@pytest.mark.parametrize("strategy", ["all", "best_effort"])
def test_the_outcome_goes_out_when_every_step_is_terminal(strategy: str) -> None:
    for state in (S.BLOCKED, S.DUE, S.RUNNING, S.UNSETTLED):
        assert ask(strategy, job((CDCS, ARCHIVE), cdcs=S.DONE, local_archive=state)).job is None
    assert ask(strategy, job((CDCS, ARCHIVE), cdcs=S.DONE, local_archive=S.DONE)).job is JobState.EXPORTED


def test_links_to_replaces_the_waiting_for_higher_priorities() -> None:
    places = (Place("a", 100), Place("b", 90), Place("c", 10, links_to=("b",)))
    assert moved(ask("all", job(places, a=S.RUNNING, b=S.DONE))) == {"c": S.DUE}


def test_links_to_is_soft() -> None:
    assert moved(ask("all", job((CDCS, LAB), cdcs=S.FAILED))) == {"labarchives": S.DUE}


def test_a_link_to_a_destination_that_is_not_wanted_holds_nothing_up() -> None:
    assert moved(ask("all", job((LAB, ELAB)))) == {"labarchives": S.DUE, "elabftw": S.DUE}


def test_depends_on_is_hard() -> None:
    places = (CDCS, Place("report", 50, depends_on=("cdcs",)))
    assert moved(ask("all", job(places, cdcs=waited(1)))) == {}, "its first attempt ended, but it is not done"
    assert moved(ask("all", job(places, cdcs=S.DUE), cdcs=L.PAUSED)) == {}
    assert moved(ask("all", job(places, cdcs=S.DONE))) == {"report": S.DUE}


@pytest.mark.parametrize("state", [S.FAILED, S.UNCERTAIN, S.SKIPPED, S.SUPERSEDED])
def test_dependency_failed(state: StepState) -> None:
    places = (CDCS, Place("report", 50, depends_on=("cdcs",)))
    decision = ask("all", job(places, cdcs=state))
    assert decision.moves == (Move("report", S.FAILED, "dependency_failed", f"it depends on cdcs, which is {state}"),)
    assert decision.job is JobState.FAILED


def test_a_dependency_that_this_record_is_not_exported_to() -> None:
    decision = ask("best_effort", job((Place("report", 50, depends_on=("cdcs",)), ARCHIVE)))
    (failed,) = [move for move in decision.moves if move.state is S.FAILED]
    assert failed.error_code == "dependency_failed"
    assert failed.reason == "it depends on cdcs, which this record is not exported to"
    assert moved(decision)["local_archive"] is S.DUE


def test_a_failed_dependency_fails_all_that_hang_on_it_at_once() -> None:
    chain = (CDCS, Place("b", 50, depends_on=("cdcs",)), Place("c", 40, depends_on=("b",)), Place("d", 30))
    decision = ask("best_effort", job(chain, cdcs=S.FAILED))
    assert moved(decision) == {"b": S.FAILED, "c": S.FAILED, "d": S.DUE}


def test_a_high_priority_that_links_to_a_low_one_lets_it_go_first() -> None:
    places = (Place("a", 100, links_to=("c",)), Place("b", 50), Place("c", 10))
    assert waits(frozenset(places)) == {"a": {"c"}, "b": {"a"}, "c": set()}
    assert moved(ask("all", job(places))) == {"c": S.DUE}
    assert moved(ask("all", job(places, c=S.DONE))) == {"a": S.DUE}
    assert moved(ask("all", job(places, c=S.DONE, a=S.DONE))) == {"b": S.DUE}


def test_first_success_runs_one_after_the_other() -> None:
    decision = ask("first_success", job(DELIVERED))
    assert moved(decision) == {"cdcs": S.DUE}
    assert decision.again_at == NOW + PATIENCE
    assert moved(ask("first_success", job(DELIVERED, cdcs=S.FAILED))) == {"labarchives": S.DUE}
    decision = ask("first_success", job(DELIVERED, cdcs=S.FAILED, labarchives=S.FAILED))
    assert moved(decision) == {"elabftw": S.DUE}, "not beside another, as with all"


@pytest.mark.parametrize("lane", [L.PAUSED, L.OPEN])
def test_first_success_goes_past_a_paused_lane(lane: LaneState) -> None:
    decision = ask("first_success", job(DELIVERED), cdcs=lane)
    assert moved(decision) == {"cdcs": S.DUE, "labarchives": S.DUE}
    assert decision.again_at == NOW + PATIENCE


def test_first_success_has_five_minutes_of_patience() -> None:
    decision = ask("first_success", job(DELIVERED, cdcs=waited(299)))
    assert moved(decision) == {}
    assert decision.again_at == NOW + timedelta(seconds=1)
    decision = ask("first_success", job(DELIVERED, cdcs=waited(300)))
    assert moved(decision) == {"labarchives": S.DUE}
    assert decision.again_at == NOW + PATIENCE


@pytest.mark.parametrize("state", [S.RUNNING, S.UNSETTLED])
def test_first_success_never_goes_past_one_that_may_have_succeeded(state: StepState) -> None:
    old = StepView(CDCS, state, 9, NOW - timedelta(days=1))
    decision = ask("first_success", job(DELIVERED, cdcs=old))
    assert moved(decision) == {}
    assert decision.again_at is None, "the end of the attempt or look-up asks again"
    assert moved(ask("first_success", job(DELIVERED, cdcs=old), cdcs=L.PAUSED)) == {}


def test_first_success_skips_the_rest_after_a_success() -> None:
    decision = ask("first_success", job(DELIVERED, cdcs=waited(900), labarchives=S.DONE))
    assert moved(decision) == {"cdcs": S.SKIPPED, "elabftw": S.SKIPPED, "local_archive": S.SKIPPED}
    assert decision.moves[0].reason == "another destination succeeded"
    assert decision.job is JobState.EXPORTED


def test_first_success_lets_what_is_in_flight_end_after_a_success() -> None:
    decision = ask("first_success", job(DELIVERED, cdcs=S.UNSETTLED, labarchives=S.DONE))
    assert "cdcs" not in moved(decision)
    assert decision.job is None


def test_first_success_that_depends_on_an_earlier_one_has_no_turn() -> None:
    places = (CDCS, Place("report", 50, depends_on=("cdcs",)), ARCHIVE)
    assert moved(ask("first_success", job(places, cdcs=S.FAILED))) == {"report": S.FAILED, "local_archive": S.DUE}


def test_one_claim_at_a_time_for_first_success() -> None:
    cdcs, lab = job((CDCS, LAB), cdcs=waited(900), labarchives=S.DUE)
    assert may_start("first_success", lab, [cdcs, lab])
    for state in (S.RUNNING, S.UNSETTLED):
        assert not may_start("first_success", lab, [replace(cdcs, state=state), lab])
        assert may_start("all", lab, [replace(cdcs, state=state), lab])
    looking = replace(lab, state=S.UNSETTLED)
    assert may_start("first_success", looking, [cdcs, looking]), "its own look-up is not another's"


@pytest.mark.parametrize(
    ("states", "everything", "something"),
    [
        pytest.param((S.DONE, S.DONE), True, True, id="every step succeeded"),
        pytest.param((S.DONE, S.FAILED), False, True, id="one failed"),
        pytest.param((S.DONE, S.UNCERTAIN), False, True, id="uncertain counts as failed"),
        pytest.param((S.DONE, S.SUPERSEDED), False, True, id="superseded is no success"),
        pytest.param((S.DONE, S.SKIPPED), True, True, id="skipped is not missing"),
        pytest.param((S.SKIPPED, S.SKIPPED), False, False, id="skipped alone is no success"),
        pytest.param((S.FAILED, S.SKIPPED), False, False, id="none succeeded"),
        pytest.param((S.UNCERTAIN, S.UNCERTAIN), False, False, id="nobody knows"),
    ],
)
def test_verdicts(states: tuple[StepState, StepState], *, everything: bool, something: bool) -> None:
    steps = job((CDCS, ARCHIVE), cdcs=states[0], local_archive=states[1])
    for strategy, good in (("all", everything), ("best_effort", something), ("first_success", something)):
        assert ask(strategy, steps).job is (JobState.EXPORTED if good else JobState.FAILED), strategy


@pytest.mark.parametrize("strategy", ["all", "best_effort", "first_success"])
def test_an_empty_list_is_never_success(strategy: str) -> None:
    assert decide(strategy, [], {}, NOW) == Decision((), JobState.FAILED, None)


def test_in_order_is_by_falling_priority_and_then_by_name() -> None:
    steps = job((Place("b", 10), Place("z", 90), Place("a", 10)))
    assert [step.name for step in in_order(steps)] == ["z", "a", "b"]


# --- whole lives -------------------------------------------------------------------------------------------------


@st.composite
def orders(draw: st.DrawFn) -> tuple[Place, ...]:
    """Draw up to six destinations; each declares links and dependencies only to those before it in a random order."""
    count = draw(st.integers(1, 6))
    places: list[Place] = []
    for name in draw(st.permutations("abcdef"))[:count]:
        before = [place.destination for place in places]
        some = st.lists(st.sampled_from(before), unique=True, max_size=2) if before else st.just([])
        links, needs = (draw(some), draw(some)) if draw(st.booleans()) else ([], [])
        places.append(Place(name, draw(st.sampled_from([10, 50, 90])), tuple(links), tuple(needs)))
    return tuple(places)


ENDS = [S.DONE, S.FAILED, S.UNCERTAIN, S.SKIPPED, S.DUE, S.DUE, S.UNSETTLED]


def live(strategy: str, places: tuple[Place, ...], rng: random.Random) -> tuple[JobState, list[StepView]]:
    """Play a job to its end: attempts end as they like, lanes pause and go on, time passes; patience is finite."""
    steps = {place.destination: StepView(place, S.BLOCKED) for place in places}
    lanes = dict.fromkeys(steps, L.ACTIVE)
    now = NOW
    for turn in range(1000):
        decision = decide(strategy, list(steps.values()), lanes, now)
        for move in decision.moves:
            since = now if move.state is S.DUE else None
            steps[move.destination] = replace(steps[move.destination], state=move.state, due_since=since)
        if decision.job is not None:
            return decision.job, list(steps.values())
        name = rng.choice(list(lanes))
        lanes[name] = rng.choice(list(L)) if turn < 200 else L.ACTIVE
        able = [
            step
            for step in steps.values()
            if (step.state in IN_FLIGHT)
            or (step.state is S.DUE and lanes[step.name] is L.ACTIVE and may_start(strategy, step, steps.values()))
        ]
        if not able:
            assert decision.again_at is not None or any(lane is not L.ACTIVE for lane in lanes.values()), steps
            now = max(now + timedelta(seconds=1), decision.again_at or now)
            continue
        step = rng.choice(able)
        if step.state is S.DUE:
            assert all(steps[other].state is S.DONE for other in step.place.depends_on)
            if strategy == "first_success":
                assert not any(other.state in IN_FLIGHT for other in steps.values())
            steps[step.name] = replace(step, state=S.RUNNING)
            continue
        end = rng.choice(ENDS) if turn < 300 else S.FAILED
        attempts = step.attempts + (step.state is S.RUNNING)
        steps[step.name] = replace(step, state=end, attempts=attempts)
        now += timedelta(seconds=rng.choice([1, 60, 400]))
    pytest.fail(f"not over after a thousand turns: {steps}")


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["all", "best_effort", "first_success"]), orders(), st.integers(0, 2**32))
def test_every_job_ends(strategy: str, places: tuple[Place, ...], seed: int) -> None:
    state, steps = live(strategy, places, random.Random(seed))  # noqa: S311 - a failure has to come back
    done = [step for step in steps if step.state is S.DONE]
    complete = all(step.state in {S.DONE, S.SKIPPED} for step in steps)
    assert (state is JobState.EXPORTED) == (bool(done) and (complete or strategy != "all"))


@settings(max_examples=300, deadline=None)
@given(orders())
def test_nothing_waits_in_a_circle(places: tuple[Place, ...]) -> None:
    order = {name: set(targets) for name, targets in waits(frozenset(places)).items()}
    while order:
        free = {name for name, targets in order.items() if not targets & set(order)}
        assert free, f"a circle: {order}"
        for name in free:
            del order[name]


@settings(max_examples=300, deadline=None)
@given(orders())
def test_declared_order_is_kept_and_priority_where_none_is_declared(places: tuple[Place, ...]) -> None:
    order = waits(frozenset(places))
    for place in places:
        declared = set(place.links_to) | set(place.depends_on)
        if declared:
            assert order[place.destination] == declared
        else:
            higher = {other.destination for other in places if other.priority > place.priority}
            assert order[place.destination] <= higher
    if not any(place.links_to or place.depends_on for place in places):
        for place in places:
            assert order[place.destination] == {o.destination for o in places if o.priority > place.priority}
